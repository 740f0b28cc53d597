"""Other packages' kernels: used where they are right, refused with a warning where they are not.

The packages run on GPUs only. In their place stand functions with the released signatures (mamba-ssm 2.3.2, fla-core
0.6.0, causal-conv1d 1.7.0), the checks those make of their arguments, and the mathematics as a plain recurrence.
"""

import sys
import types
import warnings
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from llmrec.ssm import kernels
from llmrec.ssm.conv import conv_silu
from llmrec.ssm.scan import selective_scan
from llmrec.ssm.ssd import ssd
from tests.ssm.oracles import results, rows_of_sequences

CHUNK = 8


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    batch, length, heads, headdim = x.shape
    assert x.dtype == B.dtype == C.dtype
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length))
    B, C = (t.float().repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    h = x.new_zeros(batch, heads, headdim, B.shape[3], dtype=torch.float32) if initial_states is None else initial_states
    current = torch.zeros(batch, dtype=torch.int32)  # as the kernel: the initial state is sequence 0's
    outputs = []
    for t in range(length):
        if seq_idx is not None:
            h = h * (seq_idx[:, t] == current)[:, None, None, None]
            current = seq_idx[:, t]
        h = (dt[:, t] * A).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1)
    y = (y if D is None else y + D[:, None] * x).to(x.dtype)
    return (y, h) if return_final_states else y


def chunk_simple_gla(
    q,
    k,
    v,
    g=None,
    g_gamma=None,
    scale=None,
    initial_state=None,
    output_final_state=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    **kwargs,
):
    assert not kwargs
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[:3] == k.shape[:3] == v.shape[:3] == g.shape
    assert g.dtype == torch.float32
    if cu_seqlens is None:
        pieces = [slice(0, q.shape[1])]
    else:
        assert cu_seqlens.dtype == torch.int64
        assert len(q) == 1
        assert initial_state is None or len(initial_state) == len(cu_seqlens) - 1
        pieces = [slice(start, end) for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
        assert all(piece.start < piece.stop for piece in pieces)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    outputs, ends = [], []
    for n, piece in enumerate(pieces):
        h = q.new_zeros(len(q), *q.shape[2:], v.shape[-1], dtype=torch.float32)
        if initial_state is not None:
            h = initial_state if cu_seqlens is None else initial_state[n : n + 1]
        for t in range(piece.start, piece.stop):
            h = g[:, t].exp()[..., None, None] * h + (k[:, t, :, :, None] * v[:, t, :, None]).float()
            outputs.append((scale * q[:, t, :, :, None] * h).sum(-2))
        ends.append(h)
    return torch.stack(outputs, 1).to(q.dtype), torch.cat(ends) if output_final_state else None


class LastStateWithoutGradient(torch.autograd.Function):
    """What `SelectiveScanFn.backward(ctx, dout, *args)` does with `args`."""

    @staticmethod
    def forward(ctx, state):
        return state.clone()

    @staticmethod
    def backward(ctx, dstate):
        return torch.zeros_like(dstate)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    batch, _, length = u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert B.shape == C.shape == (batch, A.shape[1], length)
    h = u.new_zeros(batch, *A.shape)
    outputs = []
    for t in range(length):
        h = (delta[:, :, t, None] * A).exp() * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, 2)
    y = y if D is None else y + D[:, None] * u
    return (y, LastStateWithoutGradient.apply(h)) if return_last_state else y


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    batch, channels, length = x.shape
    width = weight.shape[1]
    assert 2 <= width <= 4
    assert x.stride(1) == 1, "seq_idx is only supported for channel last layout"
    assert channels % 8 == x.stride(2) % 8 == x.stride(0) % 8 == x.data_ptr() % 16 == 0
    assert bias is None or bias.dtype == weight.dtype
    assert activation == "silu"
    assert initial_states is None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        assert seq_idx.is_contiguous()
        assert seq_idx.min() >= 0
    y = torch.zeros(batch, channels, length) if bias is None else bias.float()[:, None].expand(batch, channels, length)
    for back in range(min(width, length)):
        tap = F.pad(x.float(), (back, 0))[..., :length] * weight.float()[:, width - 1 - back, None]
        if seq_idx is not None and back:
            tap = tap * F.pad(seq_idx[:, back:] == seq_idx[:, :-back], (back, 0))[:, None]
        y = y + tap
    return F.silu(y).to(x.dtype)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """The tensors here count as a GPU's; no package is installed but what a test installs; nothing is decided yet."""
    monkeypatch.setattr(kernels, "on_accelerator", lambda tensor: True)
    for package in kernels.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    decisions = (kernels._ssd_that_agrees, kernels._scan_that_agrees, kernels._conv_that_agrees)
    for decide in decisions:
        decide.cache_clear()
    yield
    for decide in decisions:
        decide.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Puts a function where its package has it; returns the list of its calls."""
    homes = {
        "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
        "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
        "chunk_simple_gla": "fla.ops.simple_gla",
        "causal_conv1d_fn": "causal_conv1d",
    }

    def put(name, function):
        calls = []

        def recorded(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        parts = homes[name].split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            module = types.ModuleType(path)
            module.__spec__, module.__path__ = ModuleSpec(path, None, is_package=True), []
            monkeypatch.setitem(sys.modules, path, module)
        setattr(module, name, recorded)
        return calls

    return put


def doubled(inputs):
    """For the torch code as the oracle: in float64 it takes no kernel."""
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ssd_inputs(length=29, heads=4, headdim=3, groups=2, d_state=5, D=True, state=True, packed=False):
    return {
        "x": normal(2, length, heads, headdim),
        "dt": normal(2, length, heads).exp() / 5,
        "A": -normal(heads).exp(),
        "B": normal(2, length, groups, d_state),
        "C": normal(2, length, groups, d_state) + 1,
        "D": normal(heads) if D else None,
        "state": normal(2, heads, headdim, d_state) if state else None,
        "seq_idx": rows_of_sequences(length) if packed else None,
    }


def scan_inputs(length=29, channels=6, d_state=5):
    return {
        "x": normal(2, length, channels),
        "dt": normal(2, length, channels + 1)[..., 1:].exp() / 5,
        "A": -normal(channels, d_state).exp(),
        "B": normal(2, length, d_state),
        "C": normal(2, length, d_state) + 1,
        "D": normal(channels),
    }


def conv_inputs(length=29, channels=16, width=4, bias=True, before=False, packed=False):
    return {
        "x": normal(2, length, channels + 3)[..., 3:],  # not aligned, as a slice of a projection may be
        "weight": normal(channels, 1, width),
        "bias": normal(channels) if bias else None,
        "before": normal(2, width - 1, channels) if before else None,
        "seq_idx": rows_of_sequences(length) if packed else None,
    }


def ssd_kernel(inputs, reference=ssd, chunk=CHUNK):
    return kernels.ssd_kernel(
        inputs["x"], inputs["B"], inputs["D"], chunk=chunk, state=inputs["state"], seq_idx=inputs["seq_idx"], reference=reference
    )


def scan_kernel(inputs, return_state, state=None, seq_idx=None):
    return kernels.selective_scan_kernel(
        inputs["x"], inputs["A"], inputs["D"], state=state, seq_idx=seq_idx, return_state=return_state, reference=selective_scan
    )


def conv_kernel(inputs, sizes, ahead=0):
    rest = {name: inputs[name] for name in ("bias", "before", "seq_idx")}
    return kernels.conv_kernel(inputs["x"], inputs["weight"], sizes=sizes, ahead=ahead, reference=conv_silu, **rest)


def assert_same(kernel, reference, inputs, **settings):
    ours, expected = results(kernel, inputs, torch.float32, **settings), results(reference, inputs, torch.float64, **settings)
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


SSD_CASES = [
    {},
    {"groups": 1, "D": False, "state": False},
    {"packed": True},
    {"packed": True, "state": False},
    {"length": 1},
    {"groups": 4, "headdim": 5},
]


CONV_CASES = [
    {},
    {"bias": False, "width": 2},
    {"before": True},
    {"packed": True},
    {"before": True, "packed": True},
    {"length": 2},
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", SSD_CASES)
@pytest.mark.parametrize("function", [mamba_chunk_scan_combined, chunk_simple_gla])
def test_a_right_ssd_kernel_is_used(install, function, case):
    calls = install(function.__name__, function)
    inputs = ssd_inputs(**case)
    kernel = ssd_kernel(inputs)
    assert len(calls) == 1
    assert_same(kernel, ssd, inputs, chunk=CHUNK, return_state=True)
    assert_same(kernel, ssd, inputs, chunk=CHUNK, return_state=False)
    assert len(calls) == 3


@pytest.mark.filterwarnings("error")
def test_a_right_selective_scan_kernel_is_used(install):
    calls = install("selective_scan_fn", selective_scan_fn)
    inputs = scan_inputs()
    assert_same(scan_kernel(inputs, return_state=False), selective_scan, inputs, return_state=False)
    with torch.no_grad():
        kernel = scan_kernel(inputs, return_state=True)
        for ours, expected in zip(kernel(**inputs, return_state=True), selective_scan(**doubled(inputs)), strict=True):
            assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CONV_CASES)
def test_a_right_convolution_is_used(install, case):
    calls = install("causal_conv1d_fn", causal_conv1d_fn)
    inputs = conv_inputs(**case)
    kernel = conv_kernel(inputs, [8, 5, 3])
    assert [piece.shape[2] for piece in kernel(**inputs, sizes=[8, 5, 3])] == [8, 5, 3]
    assert_same(kernel, conv_silu, inputs, sizes=[8, 5, 3])
    assert len(calls) == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_computes_the_state_in_float32(install, dtype):
    for function in (mamba_chunk_scan_combined, selective_scan_fn, causal_conv1d_fn):
        install(function.__name__, function)
    inputs = ssd_inputs()
    halves = inputs | {name: inputs[name].to(dtype) for name in ("x", "B", "C")}
    y, state = ssd_kernel(halves)(**halves, chunk=CHUNK, return_state=True)
    expected, _ = ssd(**doubled(halves))
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)

    inputs = scan_inputs()
    halves = inputs | {name: inputs[name].to(dtype) for name in ("x", "B", "C")}
    y, _ = scan_kernel(halves, return_state=False)(**halves, return_state=False)
    assert y.dtype == dtype
    assert_close(y.double(), selective_scan(**doubled(halves))[0], rtol=1e-2, atol=1e-3)

    inputs = conv_inputs(before=True)
    halves = inputs | {"x": inputs["x"].to(dtype)}
    (y,) = conv_kernel(halves, [16])(**halves, sizes=[16])
    assert y.dtype == dtype
    assert_close(y.double(), conv_silu(**doubled(inputs), sizes=[16])[0], rtol=5e-2, atol=5e-2)


def test_fla_is_asked_where_mamba_ssm_is_not_right(install):
    install("mamba_chunk_scan_combined", lambda *args, **kwargs: 1 / 0)
    calls = install("chunk_simple_gla", chunk_simple_gla)
    inputs = ssd_inputs()
    with pytest.warns(UserWarning, match="mamba_chunk_scan_combined fails .*ZeroDivisionError.*chunk_simple_gla is used instead"):
        kernel = ssd_kernel(inputs)
    assert_same(kernel, ssd, inputs, chunk=CHUNK, return_state=True)
    assert len(calls) == 2


@pytest.mark.filterwarnings("error")
def test_mamba_ssm_is_asked_first(install):
    preferred, other = install("mamba_chunk_scan_combined", mamba_chunk_scan_combined), install("chunk_simple_gla", chunk_simple_gla)
    ssd_kernel(ssd_inputs())
    assert (len(preferred), len(other)) == (1, 0)


def decay_without_gradient(x, dt, A, *args, **kwargs):
    return mamba_chunk_scan_combined(x, dt, A.detach() + 0 * A, *args, **kwargs)


def forgets_the_state(*args, initial_states=None, **kwargs):
    return mamba_chunk_scan_combined(*args, initial_states=0 * initial_states, **kwargs)


def packs_wrongly(*args, seq_idx=None, **kwargs):
    return mamba_chunk_scan_combined(*args, seq_idx=None if seq_idx is None else torch.zeros_like(seq_idx), **kwargs)


def a_little_off(x, *args, **kwargs):
    y, state = mamba_chunk_scan_combined(x, *args, **kwargs)
    return y * 1.01, state


def not_a_number(x, *args, **kwargs):
    y, state = mamba_chunk_scan_combined(x, *args, **kwargs)
    return y * torch.where(torch.arange(y.shape[1]) == 3, torch.nan, 1.0)[:, None, None], state


def transposed_state(*args, **kwargs):
    y, state = mamba_chunk_scan_combined(*args, **kwargs)
    return y, state.mT


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (decay_without_gradient, r"differs by 1\.0e\+00 of the largest entry of the gradient of A"),
        (forgets_the_state, "differs by .* of the largest entry of"),
        (packs_wrongly, "differs by .* of the largest entry of"),
        (a_little_off, r"differs by .*e-02 of the largest entry of .* \(allowed: 5e-03\)"),
        (not_a_number, "differs by inf"),
        (transposed_state, "ValueError: results of another shape"),
    ],
)
def test_a_subtly_wrong_ssd_kernel_is_refused(install, wrong, complaint):
    calls = install("mamba_chunk_scan_combined", wrong)
    inputs = ssd_inputs(packed=True)
    with pytest.warns(UserWarning, match=complaint) as caught:
        assert ssd_kernel(inputs) is None
    (message,) = [str(warning.message) for warning in caught]
    assert "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined" in message
    assert "x (2, 19, 4, 3), dt (2, 19, 4), A (4,), B (2, 19, 2, 5)" in message
    assert message.endswith("the torch code is used instead")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ssd_kernel(ssd_inputs(length=50, packed=True)) is None  # decided, without asking or warning again
    assert len(calls) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda u, delta, A, B, C, **rest: selective_scan_fn(u, delta, A.mean(1, keepdim=True).expand_as(A), B, C, **rest),
        lambda u, delta, A, B, C, **rest: selective_scan_fn(u, delta.detach(), A, B, C, **rest),
        lambda *args, **kwargs: 1 / 0,
    ],
)
def test_a_wrong_selective_scan_kernel_is_refused(install, wrong):
    install("selective_scan_fn", wrong)
    with pytest.warns(UserWarning, match="selective_scan_fn .* the torch code is used instead"):
        assert scan_kernel(scan_inputs(), return_state=False) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, bias, **rest: causal_conv1d_fn(x, weight.flip(1), bias, **rest),
        lambda x, weight, bias, seq_idx, **rest: causal_conv1d_fn(x, weight, bias, **rest),
        lambda x, weight, bias, **rest: causal_conv1d_fn(x, weight, bias.detach(), **rest),
        lambda *args, **kwargs: 1 / 0,
    ],
)
def test_a_wrong_convolution_is_refused(install, wrong):
    install("causal_conv1d_fn", wrong)
    with pytest.warns(UserWarning, match="causal_conv1d_fn .* the torch code is used instead"):
        assert conv_kernel(conv_inputs(packed=True), [16]) is None


@pytest.mark.filterwarnings("error")
def test_calls_no_kernel_can_take_go_to_the_torch_code(install, monkeypatch):
    functions = (mamba_chunk_scan_combined, selective_scan_fn, causal_conv1d_fn)
    calls = [install(function.__name__, function) for function in functions]
    inputs = ssd_inputs()
    assert ssd_kernel(inputs | {"x": inputs["x"].double()}) is None
    inputs = scan_inputs()
    assert scan_kernel(inputs, return_state=True) is None  # its state would have no gradient
    with torch.no_grad():
        assert scan_kernel(inputs, return_state=True, state=normal(2, 6, 5)) is None
        assert scan_kernel(inputs, return_state=False, seq_idx=rows_of_sequences(29)) is None
    assert conv_kernel(conv_inputs(width=7), [16]) is None
    assert conv_kernel(conv_inputs(channels=12), [12]) is None
    assert conv_kernel(conv_inputs(), [16], ahead=1) is None
    monkeypatch.undo()  # from here on these are tensors of a CPU
    assert not kernels.on_accelerator(inputs["x"])
    assert ssd_kernel(ssd_inputs()) is scan_kernel(inputs, return_state=False) is conv_kernel(conv_inputs(), [16]) is None
    assert calls == [[], [], []]


@pytest.mark.filterwarnings("error")
def test_nothing_installed_means_the_torch_code_and_no_word():
    assert ssd_kernel(ssd_inputs()) is scan_kernel(scan_inputs(), return_state=False) is conv_kernel(conv_inputs(), [16]) is None


@pytest.mark.filterwarnings("error")
def test_the_asking_function_may_be_the_reference(install):
    """As `ssd` does: it asks for a kernel and names itself."""

    def asks(x, dt, A, B, C, D, **settings):
        kernel = kernels.ssd_kernel(x, B, D, chunk=settings["chunk"], state=settings["state"], seq_idx=settings["seq_idx"], reference=asks)
        return (kernel or ssd)(x, dt, A, B, C, D, **settings)

    calls = install("mamba_chunk_scan_combined", mamba_chunk_scan_combined)
    assert_same(asks, ssd, ssd_inputs(), chunk=CHUNK, return_state=True)
    assert len(calls) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_asking_without_gradients_checks_them_and_draws_nothing_from_the_seeded_numbers(install, mode):
    install("chunk_simple_gla", chunk_simple_gla)
    before = torch.get_rng_state()
    with mode():
        kernel = ssd_kernel(ssd_inputs())
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(kernel, ssd, ssd_inputs(), chunk=CHUNK, return_state=True)


def test_usable_names_versions_device_and_compiler(install):
    missing = kernels.usable()
    assert missing["mamba-ssm"] == missing["causal-conv1d"] == missing["flash-linear-attention"] == "not installed"
    assert set(missing) >= {"GPU", "C++ compiler"}
    install("chunk_simple_gla", chunk_simple_gla)
    assert kernels.usable()["flash-linear-attention"] != "not installed"
