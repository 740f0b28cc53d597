"""The wheel carries recipes, prompts and the report's template, and works away from the checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # a copy, because setuptools builds inside the source folder
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", "--prefix", f"{folder}/source/"], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", str(folder), str(folder / "source")], check=True, capture_output=True)
    (wheel,) = folder.glob("llmrec-*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "site"


def run(installed, folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(installed), "LLMREC_HOME": str(folder / "cache"), "LLMREC_OFFLINE": "1"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_wheel_has_every_recipe_prompt_and_template(installed):
    for kind in ("recipes", "prompts"):
        names = {path.relative_to(ROOT / kind) for path in (ROOT / kind).rglob("*.yaml")}
        assert names == {path.relative_to(installed / "llmrec" / kind) for path in (installed / "llmrec" / kind).rglob("*.yaml")}
    assert (installed / "llmrec/evaluation/report.html.j2").exists()
    assert {path.name for path in (installed / "llmrec/ssm/cpp").iterdir()} == {path.name for path in (ROOT / "llmrec/ssm/cpp").iterdir()}


def test_a_dry_run_from_the_wheel(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import llmrec; print(llmrec.__file__)")
    assert where.startswith(str(installed))
    outcome = json.loads(run(installed, tmp_path, "-m", "llmrec", "evaluate", "--chain", "--dry_run").splitlines()[-1])
    assert [step["stage"] for step in outcome["steps"]] == ["prepare", "retrieve", "retrieve", "pairs", "sft", "orpo", "evaluate"]
    assert not (tmp_path / "runs").exists()
