"""GPU kernels of other packages, each used only where it agrees with the torch code here.

    mamba-ssm                mamba_chunk_scan_combined     `ssd`              arXiv 2405.21060
    flash-linear-attention   chunk_simple_gla              `ssd`, where mamba-ssm is not to be had
    mamba-ssm                selective_scan_fn             `selective_scan`   arXiv 2312.00752
    causal-conv1d            causal_conv1d_fn              `conv_silu`, causal

Nothing of them is imported before a tensor on a GPU asks. The first call with a given shape then runs the kernel and
the torch code on the same small random inputs, forward and backward; a kernel that fails or differs is left alone with
one warning. The torch code does that in float64, which no kernel here takes: it may itself be the function that asks.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[..., Any]

TOLERANCE = {  # of the largest entry of a tensor
    torch.float32: 5e-3,  # Triton multiplies as TF32: emulated, that makes 1.3e-3, and 3.4e-3 where bits are cut off, not rounded
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}
PACKAGES = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}


def usable() -> dict[str, str]:
    """What there is for fast state-space layers: versions of the packages, the GPU, the C++ compiler for CPU kernels."""
    found = {}
    for package, distribution in PACKAGES.items():
        try:
            found[distribution] = metadata.version(distribution) if importlib.util.find_spec(package) else "not installed"
        except metadata.PackageNotFoundError:  # fla-core alone, or a folder on the path
            found[distribution] = "version unknown"
    found["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found["C++ compiler"] = shutil.which(os.environ.get("CXX", "g++")) or "none"
    return found


def on_accelerator(tensor: Tensor) -> bool:
    """Whether the kernels could run there: CUDA, or ROCm, which torch calls CUDA too."""
    return tensor.is_cuda


def ssd_kernel(
    x: Tensor, B: Tensor, D: Tensor | None, *, chunk: int, state: Tensor | None, seq_idx: Tensor | None, reference: Kernel
) -> Kernel | None:
    """A kernel that does this call of `ssd`, with its arguments and results; None where the torch code has to.

    Args:
        x: values, (batch, length, heads, headdim).
        B: (batch, length, groups, d_state).
        D: whether given counts, as for `state` and `seq_idx`.
        chunk: positions per block.
        state: the state before the first step.
        seq_idx: the sequences packed into a row.
        reference: `ssd`, what the kernel has to agree with.
    """
    if not on_accelerator(x) or x.dtype not in TOLERANCE:
        return None
    return _ssd_that_agrees(
        x.device, x.dtype, x.shape[2:], B.shape[2:], chunk, D is not None, state is not None, seq_idx is not None, reference
    )


def selective_scan_kernel(
    x: Tensor, A: Tensor, D: Tensor | None, *, state: Tensor | None, seq_idx: Tensor | None, return_state: bool, reference: Kernel
) -> Kernel | None:
    """A kernel that does this call of `selective_scan`, with its arguments but `state` and `seq_idx`; else None.

    The one there is starts from zero, knows no packing and has no gradient for the state it returns.

    Args:
        x: values, (batch, length, channels).
        A: (channels, d_state).
        D: whether given counts.
        state: the state before the first step.
        seq_idx: the sequences packed into a row.
        return_state: whether the last state is wanted.
        reference: `selective_scan`, what the kernel has to agree with.
    """
    if not on_accelerator(x) or x.dtype not in TOLERANCE:
        return None
    if state is not None or seq_idx is not None or (return_state and torch.is_grad_enabled()):
        return None
    return _scan_that_agrees(x.device, x.dtype, A.shape, D is not None, return_state, reference)


def conv_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: list[int],
    *,
    ahead: int,
    before: Tensor | None,
    seq_idx: Tensor | None,
    reference: Kernel,
) -> Kernel | None:
    """A kernel that does this call of `conv_silu`, with its arguments but `ahead`; else None.

    The one there is is causal, two to four positions wide, and wants channels in eights. Its pieces are views of one tensor.

    Args:
        x: (batch, length, channels).
        weight: (channels, 1, width).
        bias: whether given counts.
        sizes: channels of each piece returned.
        ahead: how many later positions a position sees.
        before: the inputs before the first.
        seq_idx: the sequences packed into a row.
        reference: `conv_silu`, what the kernel has to agree with.
    """
    if not on_accelerator(x) or x.dtype not in TOLERANCE:
        return None
    if ahead or not 2 <= weight.shape[-1] <= 4 or x.shape[-1] % 8:
        return None
    return _conv_that_agrees(
        x.device, x.dtype, weight.shape, tuple(sizes), bias is not None, before is not None, seq_idx is not None, reference
    )


@functools.cache
def _ssd_that_agrees(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    groups: tuple[int, int],
    chunk: int,
    has_D: bool,
    has_state: bool,
    packed: bool,
    reference: Kernel,
) -> Kernel | None:
    generator = torch.Generator().manual_seed(0)
    length = 2 * chunk + 3  # three blocks, the last one cut short
    inputs = {
        "x": _normal(generator, 2, length, *heads).to(dtype),
        "dt": _log_uniform(generator, 1e-3, 0.3, 2, length, heads[0]),
        "A": -_log_uniform(generator, 0.5, 16, heads[0]),  # some heads remember all blocks, others a few positions
        "B": _normal(generator, 2, length, *groups).to(dtype),
        "C": _normal(generator, 2, length, *groups).to(dtype),
        "D": _normal(generator, heads[0]) if has_D else None,
        "state": _normal(generator, 2, *heads, groups[1]) if has_state else None,
        "seq_idx": _packed_rows(length) if packed else None,
    }
    kernels = {
        "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined": _mamba_chunk_scan_combined,
        "fla.ops.simple_gla.chunk_simple_gla": _chunk_simple_gla,
    }
    return _first_that_agrees(kernels, reference, device, dtype, inputs, {"chunk": chunk, "return_state": True})


@functools.cache
def _scan_that_agrees(
    device: torch.device, dtype: torch.dtype, states: tuple[int, int], has_D: bool, return_state: bool, reference: Kernel
) -> Kernel | None:
    generator = torch.Generator().manual_seed(0)
    length = 131
    inputs = {
        "x": _normal(generator, 2, length, states[0]).to(dtype),
        "dt": _log_uniform(generator, 1e-3, 0.3, 2, length, states[0]),
        "A": -_log_uniform(generator, 0.5, 16, *states),
        "B": _normal(generator, 2, length, states[1]).to(dtype),
        "C": _normal(generator, 2, length, states[1]).to(dtype),
        "D": _normal(generator, states[0]) if has_D else None,
    }
    kernels = {"mamba_ssm.ops.selective_scan_interface.selective_scan_fn": _selective_scan_fn}
    return _first_that_agrees(kernels, reference, device, dtype, inputs, {"return_state": return_state}, gradients=not return_state)


@functools.cache
def _conv_that_agrees(
    device: torch.device,
    dtype: torch.dtype,
    taps: tuple[int, int, int],
    sizes: tuple[int, ...],
    has_bias: bool,
    has_before: bool,
    packed: bool,
    reference: Kernel,
) -> Kernel | None:
    generator = torch.Generator().manual_seed(0)
    channels, _, width = taps
    length = 131
    inputs = {
        "x": _normal(generator, 2, length, channels).to(dtype),
        "weight": _normal(generator, *taps) / width,
        "bias": _normal(generator, channels) if has_bias else None,
        "before": _normal(generator, 2, width - 1, channels).to(dtype) if has_before else None,
        "seq_idx": _packed_rows(length) if packed else None,
    }
    return _first_that_agrees(
        {"causal_conv1d.causal_conv1d_fn": _causal_conv1d_fn}, reference, device, dtype, inputs, {"sizes": list(sizes)}
    )


def _first_that_agrees(
    kernels: dict[str, Kernel],
    reference: Kernel,
    device: torch.device,
    dtype: torch.dtype,
    inputs: dict[str, Tensor | None],
    settings: dict[str, Any],
    gradients: bool = True,
) -> Kernel | None:
    """The first kernel whose package is installed and whose results are the reference's, warning of those before it."""
    installed = {name: kernel for name, kernel in kernels.items() if importlib.util.find_spec(name.split(".")[0])}
    if not installed:
        return None
    inputs = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    doubled = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}
    complaints = []
    chosen, chosen_name = None, "the torch code"
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), torch.autocast(device.type, enabled=False):
        expected = _results(reference, doubled, settings)
        for name, kernel in installed.items():
            try:
                difference, where = _largest_difference(_results(kernel, inputs, settings), expected)
            except Exception as error:  # a package made for another torch, compiler or GPU may raise anything
                complaints.append(f"{name} fails ({type(error).__name__}: {error})")
                continue
            if difference <= TOLERANCE[dtype]:
                chosen, chosen_name = kernel, name
                break
            complaints.append(f"{name} differs by {difference:.1e} of the largest entry of {where} (allowed: {TOLERANCE[dtype]:.0e})")
    if complaints:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in inputs.items() if t is not None)
        warnings.warn(f"{'; '.join(complaints)} in {dtype} on {device} with {shapes}: {chosen_name} is used instead", stacklevel=2)
    return chosen


def _results(function: Kernel, inputs: dict[str, Tensor | None], settings: dict[str, Any]) -> dict[str, Tensor]:
    """What a kernel returns and, where gradients are enabled, those of half the sum of its squares.

    Of that sum because its gradients add up: those of a sum with random signs could cancel to next to nothing, beside which
    rounding would look large.
    """
    leaves = {name: None if t is None else t.clone() for name, t in inputs.items()}
    learned = {name: t.requires_grad_() for name, t in leaves.items() if t is not None and t.is_floating_point()}
    found = {f"result {i}": t for i, t in enumerate(function(**leaves, **settings)) if t is not None}
    if torch.is_grad_enabled():
        loss = torch.stack([t.double().square().sum() / 2 for t in found.values()]).sum()
        slopes = torch.autograd.grad(loss, list(learned.values()))
        found |= {f"the gradient of {name}": slope for name, slope in zip(learned, slopes, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def _largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, in units of the largest entry of the tensor it is in, and that tensor's name."""
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in expected.items()}:
        raise ValueError("results of another shape")
    differences = {name: float((found[name].double() - t).abs().max() / t.abs().max()) for name, t in expected.items()}
    differences = {name: math.inf if math.isnan(difference) else difference for name, difference in differences.items()}
    worst = max(differences, key=lambda name: differences[name])
    return differences[worst], worst


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _log_uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low * (high / low) ** torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _packed_rows(length: int) -> Tensor:
    """Two rows of sequences that begin and end anywhere, and are not numbered from zero."""
    positions = torch.arange(length)
    return torch.stack([7 + positions * 5 // length, 3 + (positions >= length // 2).long()])


def _starts(seq_idx: Tensor) -> Tensor:
    """Where a sequence or a row begins, (batch, length)."""
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def _numbered(seq_idx: Tensor) -> Tensor:
    """The sequences of each row counted from 0, as int32.

    Mamba-2's kernel gives the state to sequence 0 and to no other; the convolution outputs zero for negative numbers.
    """
    return _starts(seq_idx).cumsum(1, dtype=torch.int32) - 1


def _mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    chunk: int,
    state: Tensor | None,
    seq_idx: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    found = mamba_chunk_scan_combined(
        x,
        dt.float(),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size=chunk,
        D=None if D is None else D.float(),
        initial_states=None if state is None else state.float(),
        seq_idx=None if seq_idx is None else _numbered(seq_idx),
        return_final_states=return_state,
    )
    return found if return_state else (found, None)


def _chunk_simple_gla(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    chunk: int,
    state: Tensor | None,
    seq_idx: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one decay per head: queries C, keys B, values dt x, log decay dt A.

    Every head has keys of its own there, so B and C are repeated. Blocks have the package's size, not `chunk`.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    k, q = (t.to(x.dtype).repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
    v, g = (dt[..., None] * x).to(x.dtype), dt.float() * A.float()
    state = None if state is None else state.float().mT  # there (batch, heads, d_state, headdim)
    bounds = rows = None
    if seq_idx is not None:  # all rows one after the other in a single one, with a state for each sequence
        starts = _starts(seq_idx)
        q, k, v, g = (t.flatten(0, 1)[None] for t in (q, k, v, g))
        bounds = F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=seq_idx.numel())
        rows = starts.sum(1).cumsum(0) - 1  # the last sequence of each row
        if state is not None:
            first = F.pad(rows[:-1] + 1, (1, 0))
            state = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, first, state)
    y, end = chunk_simple_gla(q=q, k=k, v=v, g=g, scale=1.0, initial_state=state, output_final_state=return_state, cu_seqlens=bounds)
    y = y.reshape(x.shape)
    if D is not None:
        y = y + D.float()[:, None] * x
    if return_state:
        end = (end if rows is None else end[rows]).mT.contiguous()
    return y.to(x.dtype), end if return_state else None


def _selective_scan_fn(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, *, return_state: bool
) -> tuple[Tensor, Tensor | None]:
    """In float32 also for half precision, as the torch code: the kernel wants one type, and steps need their digits."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    found = selective_scan_fn(
        *(t.float().transpose(1, 2) for t in (x, dt)),
        A.float(),
        *(t.float().transpose(1, 2) for t in (B, C)),
        D=None if D is None else D.float(),
        return_last_state=return_state,
    )
    y, end = found if return_state else (found, None)
    return y.transpose(1, 2).to(x.dtype), None if end is None else end.contiguous()


def _causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], *, before: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, ...]:
    from causal_conv1d import causal_conv1d_fn

    reach = 0
    if before is not None:  # joined, because older versions take earlier inputs or several sequences, not both
        reach = before.shape[1]
        x = torch.cat([before.to(x.dtype), x], 1)
        if seq_idx is not None:
            seq_idx = torch.cat([seq_idx[:, :1].expand(-1, reach), seq_idx], 1)
    if x.stride(2) != 1 or any(place % 8 for place in (*x.stride()[:2], x.storage_offset())):
        x = x.clone(memory_format=torch.contiguous_format)  # the kernel reads eight channels at once, from aligned addresses
    mixed = causal_conv1d_fn(
        x.transpose(1, 2),
        weight[:, 0].to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        seq_idx=None if seq_idx is None else _numbered(seq_idx),
        activation="silu",
    )
    return mixed.transpose(1, 2)[:, reach:].split(sizes, dim=2)
