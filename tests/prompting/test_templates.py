"""Templates: the shipped ones load, wrong ones are refused with the remedy, and a model's prompt.yaml comes back as it was."""

import pytest
import yaml

from llmrec.config import Prompting
from llmrec.errors import UserError
from llmrec.templates import load_prompt, load_template, save_prompt

GOOD = {
    "instruction": "Choose.",
    "layout": "{instruction} {history} {candidates}\n",
    "history_item": "{number} {title}",
    "candidate_item": "{letter} {title}",
    "separator": "\n",
    "answer": "{letter}",
}


def write(folder, **changes):
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_a_template_loads_from_a_path(tmp_path):
    template = load_template(write(tmp_path))
    assert (template.name, template.layout) == ("mine", GOOD["layout"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instructoin": "x"}, "did you mean instruction"),
        ({"separator": None}, "'separator' is missing"),
        ({"layout": "{instruction} {history}"}, "layout needs {candidates}"),
        ({"layout": "{instruction} {history} {history} {candidates}"}, "each once"),
        ({"candidate_item": "{letter} {title} {year}"}, "candidate_item needs {letter}, {title}"),
        ({"answer": "{letter.__class__}"}, "answer needs {letter}"),
        ({"answer": "{letter"}, "unpaired brace"),
        ({"separator": 3}, "put a text in quotes"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load_template(write(tmp_path, **changes))
    assert message in str(error.value)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match="llamarec"):
        load_template("lamarec")


@pytest.mark.parametrize("name", ["llamarec", "paper"])
def test_the_prompt_of_a_model_comes_back_as_it_was(tmp_path, name):
    config = Prompting(template=name, history=7, budget=300, years="keep")
    save_prompt(tmp_path / "prompt.yaml", load_template(name), config)
    assert load_prompt(tmp_path / "prompt.yaml") == (load_template(name), config)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.yaml"]


def test_a_foreign_prompt_file_is_a_user_error(tmp_path):
    (tmp_path / "prompt.yaml").write_text("template: {}\nprompt: 3\n")
    with pytest.raises(UserError, match=r"prompt\.yaml"):
        load_prompt(tmp_path / "prompt.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_prompt(tmp_path / "none.yaml")
