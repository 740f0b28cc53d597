"""Several processes make what one process makes: adapters, logs, retrievers, scores, and one run folder."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from llmrec import distributed, resources
from llmrec.cli import main
from llmrec.errors import UserError
from llmrec.stages import STAGES, execution

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
WORKER = Path(__file__).with_name("processes.py")
MEASURED = {
    "seconds",
    "tokens_per_second",
    "peak_memory_mb",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
}


def environment(**more: str) -> dict[str, str]:
    """Without what an outer launcher may have set."""
    outer = {name: value for name, value in os.environ.items() if name not in {"LOCAL_RANK", "RANK", "WORLD_SIZE"}}
    return {**outer, "OMP_NUM_THREADS": "1", "LLMREC_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def module_from(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe(name: str) -> str:
    return str(resources.find("recipes/accelerate", name))


# ------------------------------------------------------------------ two processes against one


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Results of one process, and of each of two."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    command = [*LAUNCH, "--config_file", recipe("cpu"), str(WORKER), str(together)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as two:
        module_from(WORKER).work(alone)
        out, errors = two.communicate()
    assert two.returncode == 0, errors
    assert out == ""
    return [
        (json.loads((folder / f"{rank}.json").read_text()), load_file(folder / f"{rank}.safetensors"), folder)
        for folder, rank in ((alone, 0), (together, 0), (together, 1))
    ]


def test_there_are_two(both):
    assert [(facts["rank"], facts["world"]) for facts, _, _ in both] == [(0, 1), (0, 2), (1, 2)]


@pytest.mark.parametrize("name", ["sft", "orpo", "budget", "titles", "mamba2", "gpt2", "softmax", "sampled"])
def test_two_processes_end_with_the_weights_of_one(both, name):
    expected, *found = ({key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")} for _, tensors, _ in both)
    assert expected
    for tensors in found:
        assert_close(tensors, expected, atol=1e-5, rtol=1e-5)


def comparable(log):
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in log]


@pytest.mark.parametrize("name", ["sft", "orpo", "budget", "titles", "mamba2", "gpt2", "softmax", "sampled"])
def test_two_processes_log_the_numbers_of_one(both, name):
    expected, *found = (comparable(facts["logs"][name]) for facts, _, _ in both)
    assert len(expected) >= 2
    for log in found:
        for row, alone in zip(log, expected, strict=True):
            assert row == pytest.approx(alone, abs=1e-5, rel=1e-5)


def test_the_log_has_what_is_expected_of_it(both):
    rows = [row for row in both[1][0]["logs"]["orpo"] if "loss" in row]
    assert len(rows) == 3
    assert {"rewards/margins", "tokens", "seconds", "tokens_per_second", "peak_memory_mb", "grad_norm"} <= rows[0].keys()
    assert sum(row["tokens"] for row in rows) == sum(6 + 3 * number for number in range(9))
    assert len([row for row in both[1][0]["logs"]["orpo"] if "valid_ndcg@10" in row]) == 3


def test_a_budget_changes_no_number(both):
    for _, tensors, _ in both:
        for name, tensor in tensors.items():
            if name.startswith("budget."):
                assert_close(tensor, tensors[name.replace("budget.", "orpo.")], atol=1e-5, rtol=1e-5)


def test_blocks_of_scores_come_together_and_are_kept(both):
    expected = both[0][1]["scores"]
    assert (expected[:, 0, 0] == np.array([6, 9, 12, 0, 18, 21, 24])).all()
    for _, tensors, folder in both[1:]:
        assert (tensors["scores"] == expected).all()
        assert len(list((folder / "scores").iterdir())) == 3


def test_rows_gradients_and_order(both):
    assert [facts["rows"] for facts, _, _ in both] == [[0, 1, 2, 3, 4]] * 3
    assert [facts["gradient"] for facts, _, _ in both] == [[0, 1, 2], [1, 3, 5], [1, 3, 5]]
    assert [facts["saw"] for facts, _, _ in both] == [[], [], ["order.0"]]


@pytest.mark.slow
def test_a_base_split_over_two_processes_learns_the_same(tmp_path):
    """FSDP2 on CPUs, by the recipe for GPUs."""
    worker = WORKER.with_name("sharded.py")
    on_cpus = tmp_path / "fsdp2.yaml"
    on_cpus.write_text(Path(recipe("fsdp2")).read_text().replace("num_processes: 8", "num_processes: 2\nuse_cpu: true"))
    command = [*LAUNCH, "--config_file", str(on_cpus), str(worker), str(tmp_path / "split")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-c", f"import sharded, pathlib; sharded.work(pathlib.Path({str(tmp_path / 'whole')!r}))"],
        env=environment(), cwd=WORKER.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in ("sft", "orpo"):
        split, whole = (tmp_path / side / kind for side in ("split", "whole"))
        logs = [[json.loads(line) for line in (folder / "train_log.jsonl").open()] for folder in (split, whole)]
        for row, expected in zip(comparable(logs[0]), comparable(logs[1]), strict=True):
            assert row == pytest.approx(expected, abs=2e-3)  # Adam's steps
        adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (split, whole)]
        assert_close(adapters[0], adapters[1], atol=5e-3, rtol=1e-2)


# ------------------------------------------------------------------ launching


def test_alone_everything_is_free(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("RANK", "3")  # other programs set this, too
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("x") == ["x"]
    rows = np.arange(6).reshape(3, 2)
    assert distributed.gather_rows(rows) is rows
    assert distributed.share(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", resources.names("recipes/accelerate"))
def test_accelerate_accepts_every_recipe(name, monkeypatch):
    """Its loader, and the part of `accelerate launch` that turns settings into the processes' environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    machine = ["--machine_rank", "1", "--main_process_ip", "127.0.0.1"] if name == "multinode" else []
    arguments = launch_command_parser().parse_args(["--config_file", recipe(name), *machine, "-m", "llmrec", "orpo"])
    checked, defaults, _ = _validate_launch_command(arguments)
    assert checked.num_processes == defaults.num_processes >= 2
    assert checked.use_fsdp == (name == "fsdp2")
    assert checked.use_deepspeed == name.startswith("zero")
    if name == "fsdp2":
        assert prepare_multi_gpu_env(checked)["FSDP_VERSION"] == "2"
    if name.startswith("zero"):
        assert str(checked.zero_stage) == name[-1]
    text = Path(recipe(name)).read_text()
    assert text.startswith("#")
    assert f"recipes/accelerate/{name}.yaml" in text


def test_the_launcher_is_found_by_name():
    assert execution.launcher(None, None) == []
    assert execution.launcher("cpu", 3)[-4:] == ["--config_file", recipe("cpu"), "--num_processes", "3"]
    with pytest.raises(UserError, match="did you mean fsdp2"):
        execution.launcher("fsdp", 8)
    with pytest.raises(UserError, match="--processes needs --accelerate"):
        execution.launcher(None, 8)
    with pytest.raises(UserError, match=r"multinode.yaml is for several machines, .* in its header"):
        execution.launcher("multinode", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare"], "prepare works in one process"),
        (["evaluate", "--chain"], "leave accelerate launch away"),
    ],
)
def test_what_cannot_be_launched_says_so(arguments, message, monkeypatch, capsys, tmp_path):
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main([*arguments, "--runs", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ the stages, minutes


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """40 users who each go up through 30 films, as csv files and a data set recipe."""
    folder = tmp_path_factory.mktemp("shop")
    draw = np.random.default_rng(0)
    events = [
        f"u{user},i{(int(first) + step) % 30},{draw.integers(1, 6)},{1_700_000_000_000 + (user * 9 + step) * 60_000}"
        for user, first in enumerate(draw.integers(0, 30, 40))
        for step in range(9)
    ]
    (folder / "ratings.csv").write_text("\n".join(["user,item,rating,timestamp", *events]) + "\n")
    (folder / "titles.csv").write_text("item,title\n" + "".join(f"i{n},Film number {n}\n" for n in range(30)))
    source = "source: {format: csv, interactions: ratings.csv, items: titles.csv, timestamp_unit: ms}\nfilter: {core: 2}\n"
    (folder / "shop.yaml").write_text(source)
    return folder


def settings(stage: str, runs: str, model: Path) -> list[str]:
    """Those of a stage; without dropout, whose random numbers depend on who draws them."""
    small = {
        "dataset": "shop.yaml", "runs": runs, "base.id": str(model), "base.dtype": "float32", "retriever": "sasrec",
        "model.dim": 16, "model.inner": 32, "model.dropout": 0, "model.mixer.dropout": 0, "training.epochs": 4, "training.batch": 7,
        "lightfm.epochs": 3, "lightfm.components": 8, "prompt.candidates": 10, "prompt.history": 5, "evaluation.resamples": 200,
        "lora.dropout": 0, "sft.eval_steps": 3, "sft.eval_users": 10, "orpo.max_tokens_per_batch": 1500, "orpo.eval_steps": 4,
    }  # fmt: skip
    known = {name: value for name, value in small.items() if name.split(".")[0] in STAGES[stage].options}
    return [word for name, value in known.items() for word in (f"--{name}", str(value))]


def llmrec(stage: str, runs: str, shop: Path, model: Path, *more: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [*(launcher or [sys.executable]), "-m", "llmrec", stage, *settings(stage, runs, model), *more]
    return subprocess.run(command, cwd=shop, env=environment(LLMREC_HOME=str(shop / "cache")), capture_output=True, text=True)


@pytest.fixture(scope="module")
def alone(shop, tiny_llama):
    done = llmrec("evaluate", "alone", shop, tiny_llama, "--chain")
    assert done.returncode == 0, done.stderr
    return shop / "alone" / "shop"


NAME = "sasrec.llamarec-smollm2-135m"


@pytest.mark.slow
def test_the_whole_pipeline_by_two_processes(alone, shop, tiny_llama):
    done = llmrec("evaluate", "together", shop, tiny_llama, "--chain", "--accelerate", "cpu", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["status"] == "made"
    assert done.stderr.count("tokens/s, last loss") == 2  # sft and orpo, once each
    together = shop / "together" / "shop"
    files = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
    assert files == {path.relative_to(together) for path in together.rglob("*") if path.is_file()}
    for stage in ("sft", "orpo"):
        logs = [[json.loads(line) for line in (root / stage / NAME / "train_log.jsonl").open()] for root in (alone, together)]
        for row, expected in zip(comparable(logs[1]), comparable(logs[0]), strict=True):
            assert row == pytest.approx(expected, abs=1e-3)  # Adam's steps
    one, two = (pl.read_parquet(root / "evaluate" / NAME / "rankings.parquet") for root in (alone, together))
    assert one.select("user", "split", "target", "items").equals(two.select("user", "split", "target", "items"))
    for column in ("retriever_scores", "ranker_scores"):
        assert np.allclose(np.vstack(one[column].to_list()), np.vstack(two[column].to_list()), atol=2e-2)


@pytest.mark.slow
def test_evaluation_by_two_processes_writes_the_same_rankings(alone, shop, tiny_llama):
    path = alone / "evaluate" / NAME / "rankings.parquet"
    before = path.read_bytes()
    launcher = (*LAUNCH, "--config_file", recipe("cpu"))
    done = llmrec("evaluate", "alone", shop, tiny_llama, "--force", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == before
    again = llmrec("evaluate", "alone", shop, tiny_llama, launcher=launcher)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("up to date") == 1
    assert len(again.stdout.splitlines()) == 1


@pytest.mark.slow
def test_two_machines(alone, shop, tiny_llama):
    """The two commands in multinode.yaml's header, with one process on each."""
    expected = load_file(alone / "orpo" / NAME / "adapter_model.safetensors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    machines = [
        subprocess.Popen(
            [*LAUNCH, "--config_file", recipe("multinode"), "--main_process_ip", "127.0.0.1", "--machine_rank", str(number),
             "--num_processes", "2", "--main_process_port", port,
             "-m", "llmrec", "orpo", "--force", *settings("orpo", "alone", tiny_llama)],
            cwd=shop, env=environment(LLMREC_HOME=str(shop / "cache")), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate() for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert json.loads(outputs[0][0])["status"] == "made"
    assert outputs[1][0] == ""
    found = load_file(alone / "orpo" / NAME / "adapter_model.safetensors")
    for name, weight in expected.items():
        assert_close(found[name], weight, atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_a_mistake_ends_all_processes_and_is_said_once(alone, shop, tiny_llama):
    launcher = (*LAUNCH, "--config_file", recipe("cpu"))
    done = llmrec("sft", "alone", shop, tiny_llama, "--force", "--lora.targets", "[no_such_layer]", launcher=launcher)
    assert done.returncode != 0
    assert done.stdout == ""
    assert sum("llmrec sft: " in line for line in done.stderr.splitlines()) == 1
