"""The sweep over history lengths: what grows with them, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llmrec.cli import read_settings
from llmrec.config import Bench
from llmrec.errors import UserError
from llmrec.stages import bench_lengths
from llmrec.stages.retrieve import sequence_model

QUICK = Bench(repeats=2, samples=2)


def settings(retriever, *extra):
    return read_settings("retrieve", ["--retriever", retriever, "--model.dim", "16", "--model.inner", "16", *extra])[0]


def test_lengths_are_read_in_order_and_once():
    assert bench_lengths.lengths_of(Bench(lengths="1000, 50,50")) == [50, 1000]
    assert bench_lengths.lengths_of(Bench()) == []


@pytest.mark.parametrize("lengths", ["", "50,", "1.5", "-3", "0"])
def test_what_is_no_length_is_named(lengths):
    with pytest.raises(UserError, match=r"bench\.lengths"):
        bench_lengths.lengths_of(Bench(lengths=lengths))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_a_training_step_holds_the_attention_of_all_pairs_of_positions():
    """HSTU keeps at least one float32 for every head and pair."""
    own, lengths = settings("hstu"), [128, 1024]
    small, large = (row["training_memory_mb"] for row in bench_lengths.sweep("hstu", own, 30, lengths, QUICK, 0).facts["lengths"])
    assert large - small > own.model.mixer.heads * (1024**2 - 128**2) * 4 / 2**20


@pytest.mark.parametrize("length", [1, 2, 150])
def test_a_step_gives_the_scores_of_the_whole_history(length):
    model = sequence_model(settings("2mamba4rec", "--model.mixer.d_state", "8", "--model.mixer.headdim", "8"), 30)
    histories = [np.random.default_rng(seed).integers(1, 31, length) for seed in range(3)]
    whole, step = bench_lengths.whole(model, histories)(1), bench_lengths.step(model, histories)(1)
    assert whole.shape == (1, 30)
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-5)


def test_models_that_are_trained_on_prefixes_are_measured_on_full_windows(monkeypatch):
    from llmrec.retrievers import windows

    seen = []
    real = windows.batches

    def looking(pieces, *arguments, **named):
        seen.extend(len(piece) for piece in pieces)
        return real(pieces, *arguments, **named)

    monkeypatch.setattr(windows, "batches", looking)
    own = settings("hydra4rec", "--model.mixer.headdim", "16", "--model.mixer.d_state", "8")
    measured = bench_lengths.sweep("hydra4rec", own, 30, [20, 60], QUICK, seed=0)
    assert seen[1:] == [21, 61]  # inputs, and the target
    assert [row["length"] for row in measured.facts["lengths"]] == [20, 60]
    assert measured.rows["way"].unique(maintain_order=True).to_list() == ["length 20", "length 60"]
    assert (measured.rows["user"] == -1).all()


def test_a_length_that_might_not_fit_is_left_out(monkeypatch, capsys):
    """With so little free memory that the square of the length would not fit, the sweep ends before the longest one."""
    monkeypatch.setattr(bench_lengths, "free_mb", lambda: 1000.0)
    monkeypatch.setattr(bench_lengths, "peak_growth_mb", lambda work: 10.0)
    found = bench_lengths.sweep("sasrec", settings("sasrec"), 30, [8, 16, 400], QUICK, 0)
    assert [row["length"] for row in found.facts["lengths"]] == [8, 16]
    assert "sasrec at length 400: left out, as a training step may need 6,250 MB, and 1,000 MB are free" in capsys.readouterr().err
