import json
import subprocess
import sys
from dataclasses import asdict

from llmrec.config import Config, Filter
from llmrec.evaluation.protocol import ProtocolCard, card

KNOWN = {"data_fingerprint": "ab12", "ambiguous_targets": 7, "users_evaluated": 943, "candidate_set": "all items", "history_masked": False}


def test_a_card_survives_metrics_json():
    made = card(Config(), **KNOWN)
    assert ProtocolCard(**json.loads(json.dumps(asdict(made)))) == made


def test_a_card_says_what_the_filter_kept():
    assert card(Config(), **KNOWN).filter == "iterative 5-core"
    kept = card(Config(filter=Filter(core=0, minimum_rating=3.5, untitled="drop")), **KNOWN).filter
    assert kept == "no core, ratings of at least 3.5, items with a title"


def test_evaluation_loads_no_torch():
    names = ("metrics", "significance", "protocol", "compare", "plots", "report")
    code = f"import sys; from llmrec.evaluation import {', '.join(names)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
