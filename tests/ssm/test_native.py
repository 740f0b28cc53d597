"""The C++ kernels against the recurrence in float64; where they come from, and what happens where they cannot be had."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from llmrec.ssm import native, selective_scan, ssd
from llmrec.ssm.conv import conv_silu
from tests.ssm.oracles import (
    assert_near,
    assert_right_in_float32,
    conv_by_steps,
    conv_inputs,
    log_uniform,
    random_input,
    results,
    scan_by_steps,
    scan_inputs,
    source,
    ssd_by_steps,
    ssd_inputs,
)

LENGTHS = [1, 7, 63, 64, 65, 257, 600]  # a state is kept every 64 positions, and 256 are a span
CASES = [{}, {"state": False, "D": False}, {"packed": True}, {"packed": True, "state": False}]


@pytest.fixture
def kernels():
    if native.library() is None:
        pytest.skip("no C++ kernels: no compiler, or LLMREC_NATIVE=0")


@pytest.fixture
def threads():
    """Sets how many; afterwards it is as it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def functions_behind(tensor):
    """The names of the autograd functions a tensor comes from."""
    names, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.add(node.name())
            todo += [before for before, _ in node.next_functions]
    return names


def ssd_call(**sizes):
    return ssd, ssd_inputs(**{"length": 70, "d_state": 16, **sizes}), {}


def scan_call(**sizes):
    return selective_scan, scan_inputs(**{"length": 70, "d_state": 16, **sizes}), {}


def conv_call(**sizes):
    inputs = conv_inputs(**{"length": 40, "channels": 60, "before": True, "packed": True, **sizes})
    return conv_silu, inputs, {"sizes": [inputs["x"].shape[2] - 28, 5, 16, 7]}


CALLS = [ssd_call, scan_call, conv_call]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("d_state", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("headdim", [1, 3, 4, 8, 16])
def test_ssd_of_all_tiles(headdim, d_state, groups):
    assert_right_in_float32(ssd, ssd_by_steps, ssd_inputs(66, 1, 4, headdim, groups, d_state))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("d_state", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 16, 48])
def test_selective_scan_of_all_tiles(channels, d_state):
    assert_right_in_float32(selective_scan, scan_by_steps, scan_inputs(66, 1, channels, d_state))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_ssd_of_all_lengths(length, case):
    """The torch code in float64, which test_ssd.py compares with the recurrence, takes the place of that: it is faster."""
    assert_right_in_float32(ssd, ssd, ssd_inputs(length, d_state=16, **case))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("case", CASES)
def test_selective_scan_of_all_lengths(length, case):
    assert_right_in_float32(selective_scan, selective_scan, scan_inputs(length, d_state=16, **case))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", [{}, {"bias": False}, {"before": True}, {"packed": True}, {"before": True, "packed": True}])
@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("length", [1, 3, 40])
def test_convolution(length, ahead, case):
    inputs = conv_inputs(length, channels=60, **case)
    assert_right_in_float32(conv_silu, conv_by_steps, inputs, sizes=[32, 5, 16, 7], ahead=ahead)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_convolution_of_all_widths(width):
    assert_right_in_float32(conv_silu, conv_by_steps, conv_inputs(20, channels=17, width=width, before=width > 1), sizes=[17])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("call", CALLS)
def test_a_result_may_go_without_a_gradient(call):
    function, inputs, settings = call()
    if "dt" in inputs:  # where the gradients of the decays do not cancel
        inputs["dt"] = log_uniform(source(1)(*inputs["dt"].shape), 1e-3, 0.1)
    inputs = {name: t.float() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}
    for which in (0, 1):
        ours, expected = (
            results(lambda **inputs: function(**inputs, **settings)[which : which + 1], inputs, dtype)  # noqa: B023
            for dtype in (torch.float32, torch.float64)
        )
        for one, other in zip(ours, expected, strict=True):
            assert_near(one, other, to=5e-6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("call", CALLS)
def test_the_same_bits_every_time(call, threads):
    function, inputs, settings = call(length=300)
    threads(4)
    for one, other in zip(*(results(function, inputs, torch.float32, **settings) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("call", [lambda **sizes: ssd_call(heads=6, **sizes), lambda **sizes: scan_call(channels=64, **sizes), conv_call])
def test_the_number_of_threads_changes_nothing(call, batch, threads):
    """With few rows, a row is split among the threads."""
    function, inputs, settings = call(batch=batch)
    if inputs["seq_idx"] is not None:
        inputs["seq_idx"] = inputs["seq_idx"][:1].expand(batch, -1)
    threads(1)
    alone = results(function, inputs, torch.float32, **settings)
    for count in (2, 3, 8):
        threads(count)
        for ours, expected in zip(results(function, inputs, torch.float32, **settings), alone, strict=True):
            assert_near(ours, expected, to=1e-6)


def strange(t):
    """The same numbers, every second element of memory, in another order of the dimensions."""
    order = torch.arange(t.dim() - 1, -1, -1).tolist()
    memory = torch.zeros(*(t.shape[i] for i in order), 2)
    memory[..., 0] = t.permute(order)
    return memory[..., 0].permute(order)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("call", [*CALLS, lambda: conv_call(before=False)])
def test_memory_in_another_order(call):
    function, inputs, settings = call()
    strangers = {name: t if t is None or not t.is_floating_point() else strange(t) for name, t in inputs.items()}
    assert not any(t.is_contiguous() for t in strangers.values() if t is not None and t.is_floating_point())

    def transposed(**inputs):  # so that the gradient, too, comes in another order
        return [t.transpose(1, 2) for t in function(**inputs, **settings)]

    def transposed_afterwards(**inputs):
        found = function(**inputs, **settings)
        for t in found:
            t.register_hook(torch.Tensor.contiguous)
        return [t.transpose(1, 2) for t in found]

    ours, expected = results(transposed, strangers, torch.float32), results(transposed_afterwards, inputs, torch.float32)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("kernels")
def test_parts_of_wider_rows_need_no_copy():
    """What a projection's output is split into."""
    inputs = conv_inputs(30, channels=21)
    wide = random_input(2, 30, 40).float()
    wide[..., 7:28] = inputs["x"]
    assert_right_in_float32(conv_silu, conv_by_steps, inputs | {"x": wide[..., 7:28]}, sizes=[21])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("call", CALLS)
def test_inputs_are_left_alone(call):
    function, inputs, settings = call()
    before = {name: None if t is None else t.clone() for name, t in inputs.items()}
    results(function, inputs, torch.float32, **settings)
    assert_close(inputs, before, rtol=0, atol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("call", "dtype", "taken"),
    [
        (ssd_call(), torch.float32, True),
        (ssd_call(), torch.bfloat16, True),
        (ssd_call(), torch.float64, False),
        (ssd_call(d_state=24), torch.float32, False),
        (scan_call(), torch.float32, True),
        (scan_call(d_state=5), torch.float32, False),
        (conv_call(), torch.float32, True),
        (conv_call(), torch.float64, False),
        (conv_call(width=9), torch.float32, False),
        ((conv_silu, conv_inputs(9, channels=9), {"sizes": [1] * 9}), torch.float32, False),
    ],
)
def test_what_they_cannot_do_the_torch_code_does(call, dtype, taken):
    function, inputs, settings = call
    ours, expected = results(function, inputs, dtype, **settings), results(function, inputs, torch.float64, **settings)
    assert any(name.startswith("Native") for name in functions_behind(ours[0])) == taken
    for one, other in zip(ours, expected, strict=True):
        assert_near(one, other, to=0.05 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("width", [1, 15, 16, 64, 100, 300])
@pytest.mark.parametrize("rows", [(1,), (2,), (3,), (7,), (2, 4), (8,), ()])
@torch.no_grad()
def test_linear_of_a_few_rows(rows, width):
    x, weight, bias = (random_input(*shape).float() for shape in ((*rows, 2 * width), (21, width), (21,)))
    x = x[..., ::2]
    weight[5] = torch.nan  # is in no other output
    assert native.takes_linear(x, weight)
    for offset in (bias, None):
        expected = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        ours, others = native.linear(x, weight, offset), torch.arange(21) != 5
        assert ours[..., 5].isnan().all()
        assert_near(ours[..., others], expected[..., others], to=1e-6)


@pytest.mark.usefixtures("kernels")
def test_linear_is_torchs_where_it_should_be():
    x, weight = torch.ones(8, 16), torch.ones(5, 16)
    assert not native.takes_linear(x, weight)  # a gradient may be wanted
    with torch.no_grad():
        assert native.takes_linear(x, weight)
        assert not native.takes_linear(torch.ones(9, 16), weight)
        assert not native.takes_linear(x.double(), weight.double())
        assert not native.takes_linear(x, torch.ones(16, 5).T)
        assert not native.takes_linear(torch.ones(0, 16), weight)
        assert not native.takes_linear(torch.ones(2, 32), weight)  # torch refuses it
        with torch.autocast("cpu", torch.bfloat16):
            assert not native.takes_linear(x, weight)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("heads", "headdim", "groups", "d_state"), [(4, 3, 2, 16), (6, 8, 1, 128), (2, 1, 2, 48)])
@torch.no_grad()
def test_one_step_in_place(heads, headdim, groups, d_state):
    inputs = ssd_inputs(1, heads=heads, headdim=headdim, groups=groups, d_state=d_state)
    y, end = ssd_by_steps(**inputs)
    single = {name: inputs[name].float() for name in ("x", "dt", "A", "B", "C", "D", "state")}
    now = {name: t if name in ("A", "D", "state") else strange(t)[:, 0] for name, t in single.items()}
    assert_near(native.scan_step_(**now), y[:, 0], to=1e-6)
    assert_near(now["state"], end, to=1e-6)


@pytest.fixture
def home(monkeypatch, tmp_path):
    """As in a new process, with an empty folder for the kernels."""
    monkeypatch.setenv("LLMREC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLMREC_NATIVE", raising=False)
    native.library.cache_clear()
    yield tmp_path / "home"
    native.library.cache_clear()


@pytest.fixture
def compiler(kernels, monkeypatch, tmp_path):
    """A quick one in a folder: `compiler` takes what it makes from `made`, writes into `log`, and waits until `$CALLS` are there."""
    log, made, script = tmp_path / "log", tmp_path / "made", tmp_path / "compiler"
    log.touch()
    shutil.copy(native.library()._name, made)
    script.write_text(
        f"""#!/bin/sh
echo called >> {log}
until [ "$(wc -l < {log})" -ge "${{CALLS:-1}}" ]; do sleep 0.05; done
while [ "$1" != -o ]; do shift; done
cp {made} "$2"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path


def assert_torch_code_is_used():
    inputs = {name: None if t is None else t.float() for name, t in ssd_inputs(9, d_state=16).items()}
    assert native.library() is None
    y, _ = ssd(**inputs | {"x": inputs["x"].requires_grad_()})
    assert not any(name.startswith("Native") for name in functions_behind(y))
    assert_near(y, ssd_by_steps(**inputs)[0], to=1e-5)


def test_compiled_once(compiler, home):
    for _ in range(2):
        assert native.library() is not None
        native.library.cache_clear()
    assert (compiler / "log").read_text() == "called\n"
    assert len(list((home / "kernels").iterdir())) == 1  # nothing is left over


def test_two_processes_that_compile_at_once(compiler, home):
    code = """
import torch
from llmrec.ssm import native, ssd
torch.manual_seed(0)
x, dt, A, B = torch.randn(1, 70, 2, 4), torch.rand(1, 70, 2), -torch.rand(2), torch.randn(1, 70, 1, 16)
expected, _ = ssd(*(t.double() for t in (x, dt, A, B, B)))
print(native.library() is not None, (ssd(x, dt, A, B, B)[0] - expected).abs().max().item() < 1e-4)
"""
    settings = {"env": os.environ | {"CALLS": "2"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **settings) for _ in range(2)]
    assert [process.communicate(timeout=100)[0] for process in processes] == ["True True\n"] * 2
    assert (compiler / "log").read_text() == "called\n" * 2
    assert len(list((home / "kernels").iterdir())) == 1


@pytest.mark.parametrize("setting", [("LLMREC_NATIVE", "0"), ("CXX", "/bin/false"), ("CXX", "no-such-compiler"), ("CXX", "")])
@pytest.mark.filterwarnings("error")
def test_without_a_compiler_the_torch_code_works_silently(setting, home, monkeypatch, capfd):
    monkeypatch.setenv(*setting)
    assert_torch_code_is_used()
    assert not list(home.glob("kernels/*"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)], ids=["empty", "text", "header"])
@pytest.mark.filterwarnings("error")
def test_a_spoilt_library_means_the_torch_code(content, compiler, home, capfd):
    (compiler / "made").write_bytes(content)
    for _ in range(2):  # just made, and found
        assert_torch_code_is_used()
        native.library.cache_clear()
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("error")
def test_a_folder_that_cannot_be_written_means_the_torch_code(home):
    home.write_text("a file where the folder should be")
    assert_torch_code_is_used()
