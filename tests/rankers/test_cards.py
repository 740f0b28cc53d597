"""The card says which weights were tuned, and its code loads."""

from __future__ import annotations

import re

import yaml

from llmrec.config import Base
from llmrec.rankers.cards import model_card

FACTS = {"steps": 3, "seconds": 4.5, "tokens_per_second": 1200, "peak_memory_mb": 900, "final": {"step": 3, "loss": 1.25, "seconds": 1.5}}


def card(**other) -> str:
    values = {
        "stage": "orpo",
        "base": Base(id="some/model", revision="abc", licence="Apache-2.0"),
        "weights": "some/model: Q4_1 dequantised from x.gguf",
        "data": "ml-100k, candidates of sasrec",
        "data_licence": "research | only\n<b>",
        "rows": {"sft": {"rows": 7}, "preferences": {"prompts": 5, "losers": {}}},
        "lora": {"r": 8},
        "tuning": {"learning_rate": 5e-6, "beta": 0.05},
        "prompt": "llamarec",
        "result": FACTS,
    }
    return model_card(**values | other)


def test_header_is_the_hubs():
    header = yaml.safe_load(card().split("---")[1])
    assert (header["base_model"], header["license"], header["library_name"]) == ("some/model", "apache-2.0", "peft")
    assert "license" not in yaml.safe_load(card(base=Base(id="a/b")).split("---")[1])


def test_says_weights_rows_settings_and_last_numbers():
    text = card()
    for line in ["weights tuned | some/model: Q4_1 dequantised", "| prompts | 5 |", "| beta | 0.05 |", "| loss | 1.25 |", "| lora r | 8 |"]:
        assert line in text
    assert "| seconds |" not in text
    assert "| rows | 7 |" in card(stage="sft")


def test_code_is_python_and_pins_the_revision():
    code = re.search(r"```python\n(.*?)```", card(), re.S).group(1)
    compile(code, "card", "exec")
    assert 'from_pretrained("some/model", revision="abc")' in code


def test_text_from_outside_stays_in_its_cell():
    assert "| licence of the data | research \\| only <b> |" in card()
