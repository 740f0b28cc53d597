import json
import subprocess
import sys
from dataclasses import asdict

from llmrec.config import Config, Filter, Split
from llmrec.evaluation.protocol import ProtocolCard, card

KNOWN = {"data_fingerprint": "ab12", "ambiguous_targets": 7, "users_evaluated": 943, "candidate_set": "all items", "history_masked": False}


def test_a_card_survives_metrics_json():
    made = card(Config(), **KNOWN)
    assert ProtocolCard(**json.loads(json.dumps(asdict(made)))) == made


def test_a_card_from_before_there_were_other_splits_reads_as_leave_one_out():
    made = asdict(card(Config(), **KNOWN))
    younger = ("split_kind", "target", "targets_evaluated", "valid_from", "valid_from_date", "test_from", "test_from_date")
    old = {name: value for name, value in made.items() if name not in younger}
    assert len(old) == len(made) - len(younger)
    assert ProtocolCard(**old) == card(Config(), **KNOWN)


def test_a_card_says_where_the_periods_begin_and_how_users_with_several_targets_count():
    bounds = {"valid_from": 7, "valid_from_date": "1998-03-06", "test_from": 9, "test_from_date": "1998-03-31"}
    made = card(Config(split=Split(kind="temporal", target="successive")), **KNOWN, periods=bounds, targets_evaluated=4_000)
    assert ProtocolCard(**json.loads(json.dumps(asdict(made)))) == made
    assert (made.split_kind, made.target, made.valid_from, made.test_from_date) == ("temporal", "successive", 7, "1998-03-31")
    assert made.metric_averaging == "every user counts once, as the mean over his targets"
    assert made.split.startswith("temporal, every event of the period: training before 1998-03-06, test from 1998-03-31")
    last = card(Config(split=Split(kind="temporal")), **KNOWN, periods=bounds)
    assert (last.target, last.metric_averaging) == ("last", "every user counts once")
    assert last.filter == "iterative 5-core of all periods together"


def test_a_card_says_what_the_filter_kept():
    assert card(Config(), **KNOWN).filter == "iterative 5-core"
    kept = card(Config(filter=Filter(core=0, minimum_rating=3.5, untitled="drop")), **KNOWN).filter
    assert kept == "no core, ratings of at least 3.5, items with a title"


def test_evaluation_loads_no_torch():
    measures = ("metrics", "significance", "ambiguity", "beyond_accuracy", "calibration", "preference", "sampled")
    names = (*measures, "protocol", "compare", "plots", "report")
    code = f"import sys; from llmrec.evaluation import {', '.join(names)}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
