"""Random inputs, and what the layers compute in plain differentiable operations, one position at a time."""

import torch
import torch.nn.functional as F
from torch.testing import assert_close


def source(seed=0):
    """A maker of random float64 tensors: `source(7)` gives a function of the shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def random_input(*shape, seed=1):
    return source(seed)(*shape)


def log_uniform(normal, low, high):
    """Steps between two, uniform in their logarithm, from normal numbers."""
    return low * (high / low) ** torch.distributions.Normal(0, 1).cdf(normal)


def rows_of_sequences(length):
    """seq_idx of two rows, the first of sequences of 5 positions, the second of 11."""
    return torch.stack([torch.arange(length) // 5, torch.arange(length) // 11 + 4])


def ssd_inputs(length, batch=2, heads=4, headdim=3, groups=2, d_state=5, *, D=True, state=True, packed=False):
    normal = source(length)
    inputs = {
        "x": normal(batch, length, heads, headdim),
        "dt": normal(batch, length, heads).exp() / 2,
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, d_state),
        "C": normal(batch, length, groups, d_state),
        "D": normal(heads),
        "state": normal(batch, heads, headdim, d_state),
        "seq_idx": rows_of_sequences(length) if packed else None,
    }
    return inputs | ({} if D else {"D": None}) | ({} if state else {"state": None})


def scan_inputs(length, batch=2, channels=6, d_state=5, *, D=True, state=True, packed=False):
    normal = source(length)
    inputs = {
        "x": normal(batch, length, channels),
        "dt": normal(batch, length, channels).exp() / 2,
        "A": -normal(channels, d_state).exp(),
        "B": normal(batch, length, d_state),
        "C": normal(batch, length, d_state),
        "D": normal(channels),
        "state": normal(batch, channels, d_state),
        "seq_idx": rows_of_sequences(length) if packed else None,
    }
    return inputs | ({} if D else {"D": None}) | ({} if state else {"state": None})


def conv_inputs(length, batch=2, channels=6, width=4, *, bias=True, before=False, packed=False):
    normal = source(length)
    return {
        "x": normal(batch, length, channels),
        "weight": normal(channels, 1, width),
        "bias": normal(channels) if bias else None,
        "before": normal(batch, width - 1, channels) if before else None,
        "seq_idx": rows_of_sequences(length) if packed else None,
    }


def positions(inputs, part, **changes):
    """The same scan over a part of its positions."""
    cut = {name: inputs[name][:, part] for name in ("x", "dt", "B", "C")}
    cut["seq_idx"] = None if inputs["seq_idx"] is None else inputs["seq_idx"][:, part]
    return inputs | cut | changes


def ssd_by_steps(x, dt, A, B, C, D=None, state=None, seq_idx=None):
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t; A is (heads,) or (heads, d_state)."""
    batch, length, heads, headdim = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    h = x.new_zeros(batch, heads, headdim, B.shape[-1]) if state is None else state
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        decay = (dt[:, t, :, None] * A.reshape(heads, -1)).exp()[:, :, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    return (y if D is None else y + D[:, None] * x), h


def scan_by_steps(x, dt, A, B, C, D=None, state=None, seq_idx=None):
    """Mamba-1's: a channel is a head of width one, and all share B and C."""
    y, h = ssd_by_steps(x[..., None], dt, A, B[:, :, None], C[:, :, None], D, None if state is None else state[:, :, None], seq_idx)
    return y[..., 0], h[:, :, 0]


def conv_by_steps(x, weight, bias, sizes, ahead=0, before=None, seq_idx=None):
    """silu(bias + sum of weight[k] x[t + ahead - (width - 1) + k]) over what lies in the sequence of t."""
    batch, length, channels = x.shape
    width = weight.shape[-1]
    before = x.new_zeros(batch, width - 1, channels) if before is None else before
    padded = torch.cat([before, x, x.new_zeros(batch, ahead, channels)], 1)
    outputs = []
    for t in range(length):
        window = padded[:, t + ahead : t + ahead + width]
        if seq_idx is not None:
            where = torch.arange(t + ahead - width + 1, t + ahead + 1).clamp(0, length - 1)  # what came before is the first one's
            window = window * (seq_idx[:, where] == seq_idx[:, t : t + 1])[..., None]
        outputs.append((window * weight[:, 0].T).sum(1))
    y = torch.stack(outputs, 1)
    return F.silu(y if bias is None else y + bias).split(sizes, 2)


def weights_of(t):
    """A weight for every entry of a result, the gradient it gets in `results`."""
    return (torch.arange(t.numel()) + 1.0).cos().view(t.shape)


def results(function, inputs, dtype, **settings):
    """Results and the gradients of all inputs, of a loss in which every entry has a weight of its own."""
    leaves = {name: t.detach().to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}
    found = [t for t in function(**leaves, **settings) if t is not None]
    loss = sum((t * weights_of(t)).sum() for t in found if t.requires_grad)
    return [*found, *torch.autograd.grad(loss, [t for t in leaves.values() if t is not None and t.requires_grad], materialize_grads=True)]


def layer_results(layer, u):
    """A layer's output and all its gradients, by name."""
    u = u.clone().requires_grad_()
    y = layer(u)
    parameters = dict(layer.named_parameters())
    gradients = torch.autograd.grad((y * weights_of(y)).sum(), [u, *parameters.values()])
    return {"output": y, **dict(zip(["input", *parameters], gradients, strict=True))}


def assert_near(ours, expected, to, zero=1e-36):
    """The difference is at most a part `to` of the largest entry, or `zero`: what float32 need not tell from nothing."""
    assert_close(ours.to(expected.dtype), expected, rtol=0, atol=max(to * expected.abs().max().item(), float(zero)))


def assert_right_in_float32(function, reference, inputs, to=2e-6, zero=1e-36, **settings):
    """Results and gradients in float32 against those of the reference in float64.

    The gradients of Mamba-2's dt and A are sums of y dy - v dv, which cancel where states are soon forgotten: these are
    right to the rounding of the terms.
    """
    inputs = {name: t.float() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}  # its rounding is no error
    ours, expected = results(function, inputs, torch.float32, **settings), results(reference, inputs, torch.float64, **settings)
    names = [name for name, t in inputs.items() if t is not None and t.is_floating_point()]
    rounding = {}
    if "A" in inputs and inputs["A"].dim() == 1:
        y, dt, A = expected[0].detach(), inputs["dt"], inputs["A"]
        terms = (y * weights_of(y)).abs().sum(-1)  # (batch, length, heads)
        rounding = {"dt": to * A.abs().max() * terms.max(), "A": to * (terms * dt).sum()}
    results_of = [f"result {i}" for i in range(len(ours) - len(names))]
    for name, one, other in zip([*results_of, *names], ours, expected, strict=True):
        assert one.isfinite().all(), name
        assert_near(one, other, to, max(zero, rounding.get(name, 0)))
