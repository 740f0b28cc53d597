"""The command line: recipes stack, keys are strict, errors are one line, start-up is light."""

import json
import subprocess
import sys

import pytest
import yaml

from llmrec import resources
from llmrec.cli import SUMMARY, main, read_settings
from llmrec.errors import UserError
from llmrec.inspection import COMMANDS
from llmrec.stages import RECIPES, STAGES


def settings(*arguments, command="evaluate"):
    return read_settings(command, list(arguments))[0]


def test_later_settings_win(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("training: {batch: 3, epochs: 7}\n")
    second.write_text("training: {batch: 4}\n")
    config = settings("--retriever", "sasrec", "--config", str(first), "--config", str(second), "--training.max_length", "9")
    assert config.model.mixer.name == "attention"  # the recipe over the default
    assert (config.training.batch, config.training.epochs, config.training.max_length) == (4, 7, 9)


def test_every_command_of_the_overview_is_there_and_no_other():
    assert sorted(SUMMARY) == sorted([*STAGES, *COMMANDS])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_no_stage_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"usage: llmrec {command}" in shown
    assert (COMMANDS[command].teaches or SUMMARY[command])[:40] in shown


def test_a_variant_of_a_retriever_has_its_recipe():
    assert settings("--retriever", "sasrec.wide", "--model.dim", "128").model.mixer.name == "attention"


@pytest.mark.parametrize("command", STAGES)
def test_unknown_keys_name_the_nearest(command, capsys, tmp_path):
    assert main([command, "--split.tie", "random"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"llmrec {command}: unknown option 'split.tie': did you mean 'split.ties'?")
    file = tmp_path / "own.yaml"
    file.write_text("split: {minimum_event: 3}\n")
    assert main([command, "--config", str(file)]) == 2
    assert "did you mean 'split.minimum_events'" in capsys.readouterr().err


def test_an_unknown_key_in_a_recipe_names_the_file(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("source: {format: csv}\nfilters: {core: 3}\n")
    assert main(["prepare", "--dataset", str(file)]) == 2
    assert f"{file}: unknown key 'filters': did you mean 'filter'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--dataset", "ml-100"], "unknown dataset 'ml-100': did you mean ml-100k?"),
        (["retrieve", "--retriever", "2mamba4re"], "did you mean 2mamba4rec?"),
        (["retreive"], "did you mean retrieve?"),
        (["retrieve", "--training.batch", "many"], "training.batch"),
        (["prepare", "--dataset", "no/such.yaml"], "no/such.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(("option", "kind"), RECIPES.items())
def test_every_recipe_is_read_and_says_how_to_launch_it(option, kind):
    assert resources.names(kind)
    for name in resources.names(kind):
        text = resources.find(kind, name).read_text()
        assert text.startswith("#"), f"{name}: a recipe begins with what it is"
        assert "make " in text.split("\n\n")[0], f"{name}: a recipe's header has its launch line"
        settings(f"--{option}", name)


def test_print_config_shows_the_recipe_and_can_be_used_again(tmp_path):
    command = [sys.executable, "-m", "llmrec", "retrieve", "--retriever", "sasrec", "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert yaml.safe_load(printed)["model"]["mixer"]["name"] == "attention"
    file = tmp_path / "again.yaml"
    file.write_text(printed)
    assert settings("--config", str(file), command="retrieve") == settings("--retriever", "sasrec", command="retrieve")


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in STAGES)
    done = subprocess.run([sys.executable, "-m", "llmrec", "orpo", "--help"], capture_output=True, text=True, check=True)
    assert "Weight of the odds-ratio term" in done.stdout


def test_nothing_heavy_is_imported_before_it_is_needed():
    """`--help`, the plan of a chain, data, metrics, prompts and pairs start without torch."""
    light = ("cli", "stages.execution", "runs", "preferences", "prompting", "data.prepare", "evaluation.compare", "evaluation.protocol")
    modules = ", ".join(f"llmrec.{name}" for name in light)
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_model_rooms_import_no_tables():
    rooms = ("ssm", "rankers.orpo", "rankers.sft", "rankers.letters", "rankers.backbone")
    code = f"import sys, {', '.join(f'llmrec.{name}' for name in rooms)}; print('polars' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_runs_of_an_empty_folder(tmp_path, capsys):
    assert main(["runs", "--runs", str(tmp_path)]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == []


def test_doctor_names_the_state_space_kernels(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    *_, last = text.splitlines()
    assert set(json.loads(last)["kernels"]) == {"mamba-ssm", "causal-conv1d", "flash-linear-attention", "GPU", "C++ compiler"}
    assert "state-space kernels: mamba-ssm" in text


def test_unknown_recipe_kinds_raise():
    with pytest.raises(UserError, match="unknown ranker"):
        resources.find("recipes/rankers", "gpt-9")
