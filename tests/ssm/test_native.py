"""The C++ kernels against the recurrence in float64; where they come from, and what happens where they cannot be had."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from llmrec.ssm import native, selective_scan, ssd
from llmrec.ssm.conv import conv_silu
from tests.ssm.oracles import assert_near, conv_by_steps, conv_inputs, results, scan_by_steps, scan_inputs, ssd_by_steps, ssd_inputs

LENGTHS = [1, 7, 63, 64, 65, 257, 600]  # a state is kept every 64 positions, and 256 are a span
SCANS = [(ssd, ssd_inputs), (selective_scan, scan_inputs)]
CASES = [{}, {"state": False, "D": False}, {"packed": True}, {"packed": True, "state": False}]


@pytest.fixture
def kernels():
    if native.library() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture
def threads():
    """Sets how many; afterwards it is as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def single(inputs):
    """In float32, which is then exact for the reference in float64."""
    return {name: t.float() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


def graph(tensor):
    """The names of the functions a tensor comes from."""
    names, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [before for before, _ in node.next_functions]
    return names


def assert_native_is_right(function, reference, inputs, to=5e-6, **settings):
    ours, expected = results(function, inputs, torch.float32, **settings), results(reference, inputs, torch.float64, **settings)
    assert any(name.startswith("Native") for name in graph(ours[0]))
    for one, other in zip(ours, expected, strict=True):
        assert_near(one, other, to)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("d_state", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("headdim", [1, 3, 4, 8, 16])
def test_ssd_of_all_tiles(headdim, d_state, groups):
    assert_native_is_right(ssd, ssd_by_steps, single(ssd_inputs(66, 1, 4, headdim, groups, d_state, packed=False)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("d_state", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 48])
def test_selective_scan_of_all_tiles(channels, d_state):
    assert_native_is_right(selective_scan, scan_by_steps, single(scan_inputs(66, 1, channels, d_state)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_ssd_of_all_lengths(length, case):
    assert_native_is_right(ssd, ssd, single(ssd_inputs(length, d_state=16, **case)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_selective_scan_of_all_lengths(length, case):
    assert_native_is_right(selective_scan, selective_scan, single(scan_inputs(length, d_state=16, **case)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("function", "inputs"), SCANS)
def test_one_of_the_results_may_go_without_a_gradient(function, inputs, which):
    one = lambda **inputs: function(**inputs)[which : which + 1]  # noqa: E731
    assert_native_is_right(one, one, single(inputs(70, d_state=16)))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", [{}, {"bias": False}, {"before": True}, {"packed": True}, {"before": True, "packed": True}])
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_convolution(length, ahead, case):
    inputs = single(conv_inputs(length, channels=60, **case))
    assert_native_is_right(conv_silu, conv_by_steps, inputs, sizes=[32, 5, 16, 7], ahead=ahead)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_convolution_of_all_widths(width):
    assert_native_is_right(conv_silu, conv_by_steps, single(conv_inputs(20, channels=17, width=width, before=True)), sizes=[17])
