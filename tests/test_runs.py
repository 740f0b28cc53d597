"""Run folders: complete or absent, fingerprints that see what matters, errors that say what to do."""

import json
from dataclasses import replace

import pytest

from llmrec import resources, runs
from llmrec.config import Config, Filter, Prompting, Retrieval, Source, Split, Training
from llmrec.errors import UserError
from llmrec.stages import STAGES, ranker_name, run_folder, upstream


@pytest.fixture
def config(tmp_path):
    return Config(runs=str(tmp_path / "runs"))


def make(stage, config, sources=None, result="done"):
    run = runs.plan(stage, config, sources or {})
    with runs.working(run):
        (run.work / "result.txt").write_text("done")
        (run.work / "table.parquet").write_text(result)
        (run.checkpoints / "last").write_text("checkpoint")
    return run


def test_a_finished_folder_is_complete_and_up_to_date(config):
    run = make("prepare", config)
    assert {path.name for path in run.folder.iterdir()} == {"result.txt", "table.parquet", "stage.json"}
    assert [path.name for path in run.folder.parent.iterdir()] == ["prepare"]
    assert runs.plan("prepare", config, {}).up_to_date
    made = json.loads((run.folder / "stage.json").read_text())
    assert {"fingerprint", "settings", "inputs", "versions", "git", "seed", "seconds", "peak_memory_mb", "status"} <= made.keys()


def test_a_failed_stage_leaves_no_folder_and_its_checkpoints_are_found_again(config):
    run = runs.plan("prepare", config, {})
    with pytest.raises(RuntimeError), runs.working(run):
        (run.checkpoints / "last").write_text("epoch 3")
        raise RuntimeError
    assert not run.folder.exists()
    with runs.working(runs.plan("prepare", config, {})) as again:
        assert (again.checkpoints / "last").read_text() == "epoch 3"


def test_checkpoints_of_other_settings_are_not_taken_up(config):
    run = runs.plan("prepare", config, {})
    with pytest.raises(RuntimeError), runs.working(run):
        (run.checkpoints / "last").write_text("epoch 3")
        raise RuntimeError
    with runs.working(runs.plan("prepare", replace(config, filter=Filter(core=9)), {})) as other:
        assert not (other.checkpoints / "last").exists()


def test_a_remake_that_fails_leaves_the_old_folder(config):
    folder = make("prepare", config).folder
    changed = runs.plan("prepare", replace(config, filter=Filter(core=9)), {})
    with pytest.raises(RuntimeError), runs.working(changed):
        raise RuntimeError
    assert (folder / "result.txt").read_text() == "done"
    assert runs.plan("prepare", config, {}).up_to_date


def test_other_settings_are_not_overwritten_silently(config):
    make("prepare", config)
    run = runs.plan("prepare", replace(config, filter=Filter(core=9)), {})
    assert not run.up_to_date
    with pytest.raises(UserError, match=r"filter\.core=5 \(now 9\).*--force"):
        runs.refuse_overwrite(run)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"training": Training(batch=3)}, False),
        ({"seed": 4}, False),
        ({"limit_users": 3}, True),
        ({"variant": "b"}, True),
    ],
)
def test_a_stage_sees_the_settings_that_decide_it_and_no_others(config, change, same):
    make("prepare", config)
    before, after = (runs.plan("retrieve", c, {}).fingerprint for c in (config, replace(config, **change)))
    assert (before == after) == same


def test_one_and_one_point_zero_are_the_same_setting(config):
    whole, real = (replace(config, training=Training(learning_rate=rate)) for rate in (1, 1.0))
    assert json.dumps(STAGES["retrieve"].decides(whole)) == json.dumps(STAGES["retrieve"].decides(real))


def test_settings_that_are_younger_than_a_finished_run_leave_it_up_to_date(config):
    """What stage.json of a `prepare` folder said before there was a temporal split, and when it must say more."""
    old = {
        "source.format": "csv",
        "source.interactions": None,
        "source.items": None,
        "source.columns.user": "user",
        "source.columns.item": "item",
        "source.columns.rating": "rating",
        "source.columns.timestamp": "timestamp",
        "source.columns.title": "title",
        "source.timestamp_unit": "s",
        "filter.on_bad_rows": "error",
        "filter.untitled": "error",
        "filter.duplicates": "first",
        "filter.minimum_rating": None,
        "filter.core": 5,
        "split.ties": "file_order",
        "split.minimum_events": 5,
    }
    decides = STAGES["prepare"].decides
    assert decides(config) == decides(replace(config, source=Source(files_of="ml-1m"))) == old
    assert decides(replace(config, split=Split(kind="temporal"))) == old | {"split.kind": "temporal"}
    later = Split(kind="temporal", target="successive", valid_quantile=0.85)
    added = {"split.kind": "temporal", "split.target": "successive", "split.valid_quantile": 0.85}
    assert decides(replace(config, split=later)) == old | added
    make("prepare", config)
    assert runs.plan("prepare", replace(config, split=Split(kind="temporal")), {}).made_from == "split.kind=leave_one_out (now temporal)"


def test_sampled_negatives_decide_with_their_seed(config):
    plain = replace(config, retrieval=Retrieval(kind="popularity"), seed=3)
    before = STAGES["retrieve"].decides(plain)
    assert before == {"retrieval.kind": "popularity", "retrieval.candidates": 100, "retrieval.repeats": False}
    drawn = replace(plain, retrieval=Retrieval(kind="popularity", legacy="uniform"))
    assert STAGES["retrieve"].decides(drawn) == before | {"retrieval.legacy": "uniform", "seed": 3}


def test_new_inputs_make_a_stage_stale(config):
    make("prepare", config, {"ratings": "a"})
    make("retrieve", config)
    make("prepare", config, {"ratings": "b"})
    assert "another" in runs.plan("retrieve", config, {}).made_from


def test_a_remake_with_another_result_makes_later_stages_stale(config):
    make("prepare", config)
    make("retrieve", config)
    make("prepare", config)
    assert runs.plan("retrieve", config, {}).up_to_date
    make("prepare", config, result="other")
    assert not runs.plan("retrieve", config, {}).up_to_date


def test_a_missing_input_names_the_command_that_makes_it(config):
    with pytest.raises(UserError, match="run `llmrec prepare --dataset ml-100k` first"):
        runs.plan("retrieve", config, {})


def test_two_processes_do_not_work_in_one_folder(config):
    run = runs.plan("prepare", config, {})
    with runs.working(run), pytest.raises(UserError, match="another process"), runs.working(runs.plan("prepare", config, {})):
        pass
    assert run.folder.exists()


def test_a_mistake_leaves_nothing_but_checkpoints(config):
    run = runs.plan("prepare", config, {})
    with pytest.raises(UserError), runs.working(run):
        (run.work / "half.parquet").write_text("half")
        raise UserError("bad row")
    assert not run.work.exists()
    with pytest.raises(UserError), runs.working(run):
        (run.checkpoints / "last").write_text("epoch 3")
        raise UserError("bad row")
    assert (run.work / "checkpoints/last").exists()


def test_a_stage_refuses_inputs_made_with_other_settings(config):
    make("prepare", config)
    with pytest.raises(UserError, match=r"filter\.core=5 \(now 9\): give the same settings"):
        runs.plan("retrieve", replace(config, filter=Filter(core=9)), {})


def test_an_edited_template_makes_pairs_stale(config, tmp_path):
    text = resources.find("prompts", "llamarec").read_text()
    template = tmp_path / "mine.yaml"
    template.write_text(text)
    own = replace(config, prompt=Prompting(template=str(template)))
    before = STAGES["pairs"].decides(own)
    template.write_text(text.replace("recommend an item", "pick an item"))
    assert STAGES["pairs"].decides(own) != before


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    config = Config(runs=str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"cannot write .*--runs"):
        make("prepare", config)


def test_a_full_disk_is_one_clear_error(config):
    run = runs.plan("prepare", config, {})
    with pytest.raises(UserError, match="no space left"), runs.working(run):
        raise OSError(28, "No space left on device")
    assert not run.folder.exists()


def test_names_and_order_follow_the_contract():
    config = Config(retriever="sasrec", ranker="llamarec-smollm2-135m", variant="long", seed=3, runs="r")
    assert ranker_name(config) == "sasrec.llamarec-smollm2-135m.long.seed3"
    assert [str(run_folder(stage, c)) for stage, c in upstream("evaluate", config)] == [
        "r/ml-100k/prepare",
        "r/ml-100k/retrieve/sasrec.seed3",
        "r/ml-100k/retrieve/lightfm.seed3",
        "r/ml-100k/pairs/sasrec.llamarec-smollm2-135m.long.seed3",
        "r/ml-100k/sft/sasrec.llamarec-smollm2-135m.long.seed3",
        "r/ml-100k/orpo/sasrec.llamarec-smollm2-135m.long.seed3",
    ]


def test_every_stage_accepts_what_its_inputs_need():
    for stage in STAGES.values():
        for name, _ in stage.needs(Config()):
            assert set(STAGES[name].options) <= set(stage.options)
