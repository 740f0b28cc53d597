"""The scans and the convolution as C++ kernels for CPUs: faster than whole-tensor operations, with less memory.

`cpp/` is compiled once with the C++ compiler of the machine, for this machine, and kept in `$LLMREC_HOME/kernels`.
Where there is no compiler, or it fails, `library()` is None and the plain torch code computes the same; set
LLMREC_NATIVE=0 to have that on purpose.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW = 8  # rows, up to which `linear` is used
LANES = 16  # d_state must be a multiple
BLOCK = 64  # positions per stored state
MAX_WIDTH, MAX_PIECES = 8, 8  # of the convolution; all as in cpp/
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]


class _Scan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "length", "heads", "headdim", "groups", "d_state")] + [
        (name, ctypes.c_void_p) for name in ("x", "dt", "A", "B", "C", "D", "fresh")
    ]


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width", "ahead", "batch_stride", "row_stride", "pieces")),
        *((name, ctypes.c_void_p) for name in ("x", "taps", "bias", "fresh")),
        ("sizes", ctypes.c_int64 * MAX_PIECES),
    ]


class _Gradients(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("y", "dy", "marks", "dx", "ddt", "dA", "dB", "dC", "meets", "h", "g")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or os.environ.get("LLMREC_NATIVE") == "0":
        return None
    sources = sorted(Path(__file__).with_name("cpp").iterdir())
    identity = [*(source.read_text() for source in sources), *FLAGS, compiler, platform.machine(), _processor()]
    name = f"native-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("LLMREC_HOME") or "~/.cache/llmrec").expanduser() / "kernels"
    try:
        if not (folder / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: another process may compile too
                built = Path(scratch) / name
                units = [str(source) for source in sources if source.suffix == ".cpp"]
                subprocess.run([compiler, *FLAGS, "-o", str(built), *units, *_openmp()], check=True, capture_output=True, timeout=120)
                built.replace(folder / name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """What the compiler's -march=native looks at."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def _openmp() -> list[str]:
    """Torch's own OpenMP library, so that both share one pool of threads."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ["-Wl,--as-needed", str(found[0])] if found else []


def takes_scan(x: Tensor, d_state: int) -> bool:
    """Whether the kernels can do this scan: float32 on the CPU, a state of whole vectors."""
    return _takes(x) and d_state % LANES == 0


def takes_conv(x: Tensor, width: int, pieces: int) -> bool:
    """Whether the kernels can do this convolution."""
    return _takes(x) and width <= MAX_WIDTH and pieces <= MAX_PIECES


def _takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` can do this product, and is faster than torch: a few rows, no gradient, no autocast."""
    few = x.shape[-1] == weight.shape[1] and 0 < x.numel() <= FEW * weight.shape[1]
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return few and plain and weight.is_contiguous() and _takes(x) and _takes(weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for a few rows: decoding is bound by reading the weights, which torch's products do at half the speed."""
    rows = x.reshape(-1, weight.shape[1]).contiguous()
    y = x.new_empty(len(rows), len(weight))
    sizes = (ctypes.c_int64(size) for size in (len(rows), rows.shape[1], len(weight)))
    _kernels().llmrec_matvec(*sizes, _at(weight), _at(rows), _at(bias), _at(y), torch.get_num_threads())
    return y.view(*x.shape[:-1], -1)


def scan_step_(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """`ssd_step` without gradient that overwrites the (contiguous) state. Returns y."""
    x, dt, A, B, C, D = (t.contiguous() for t in (x, dt, A, B, C, D))
    y = torch.empty_like(x)
    scan = _Scan(len(x), 1, *x.shape[1:], *B.shape[1:], *(_at(t) for t in (x, dt, A, B, C, D, None)))
    _kernels().llmrec_scan_forward(ctypes.byref(scan), 1, _at(y), _at(state), None, x.shape[1] // B.shape[1], torch.get_num_threads())
    return y


class NativeScan(torch.autograd.Function):
    """Both scans: A (heads,) is Mamba-2's, A (heads, d_state) Mamba-1's with one channel per head.

    x (batch, length, heads, headdim), dt (batch, length, heads), B, C (batch, length, groups, d_state), D (heads,),
    state (batch, heads, headdim, d_state) or None. Returns y and the last state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D = (t.contiguous() for t in (x, dt, A, B, C, D))
        fresh = None if seq_idx is None else _fresh(seq_idx)
        batch, length, heads, headdim = x.shape
        y = torch.empty_like(x)
        end = x.new_zeros(batch, heads, headdim, B.shape[3]) if state is None else state.clone(memory_format=torch.contiguous_format)
        marks = x.new_empty(batch, -(-length // BLOCK), heads, headdim, B.shape[3]) if any(ctx.needs_input_grad) else None
        threads = torch.get_num_threads()
        scan = _scan(x, dt, A, B, C, D, fresh)
        _kernels().llmrec_scan_forward(ctypes.byref(scan), A.dim() == 1, _at(y), _at(end), _at(marks), _splits(scan, 1, threads), threads)
        ctx.save_for_backward(x, dt, A, B, C, D, state, fresh, marks, y, end)
        ctx.set_materialize_grads(False)
        return y, end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, state, fresh, marks, y, end = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy.contiguous()
        h, g = (torch.zeros_like(end) if t is None else t.clone(memory_format=torch.contiguous_format) for t in (state, dend))
        meets = x.new_zeros(marks.shape[:3])  # (batch, blocks, heads): <h, dh> at the end of each block
        meets[:, -1] = (end * g).sum((2, 3))
        dx, ddt, dA = torch.zeros_like(x), torch.zeros_like(dt), x.new_zeros(len(x), *A.shape)
        threads = torch.get_num_threads()
        scan = _scan(x, dt, A, B, C, D, fresh)
        splits = _splits(scan, B.shape[2], threads)
        dB, dC = B.new_zeros(splits, *B.shape), B.new_zeros(splits, *B.shape)
        to = _Gradients(*(_at(t) for t in (y, dy, marks, dx, ddt, dA, dB, dC, meets, h, g)))
        _kernels().llmrec_scan_backward(ctypes.byref(scan), A.dim() == 1, ctypes.byref(to), splits, threads)
        return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), (x * dy).sum((0, 1)).sum(-1), None if state is None else g, None


class NativeConv(torch.autograd.Function):
    """`conv_silu`: x (batch, length, channels), weight (channels, width), bias (channels,); the pieces of its output."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sizes: list[int], ahead: int, seq_idx: Tensor | None
    ) -> tuple[Tensor, ...]:
        x = x if x.stride(2) == 1 else x.contiguous()
        taps, bias = weight.t().contiguous(), bias.contiguous()
        fresh = None if seq_idx is None else _fresh(seq_idx)
        pieces = tuple(x.new_empty(*x.shape[:2], size) for size in sizes)
        conv = _conv(x, taps, bias, sizes, ahead, fresh)
        _kernels().llmrec_conv_forward(ctypes.byref(conv), _all(pieces), torch.get_num_threads())
        ctx.save_for_backward(x, taps, bias, fresh)
        ctx.sizes, ctx.ahead = sizes, ahead
        return pieces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dpieces: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, bias, fresh = ctx.saved_tensors
        dpieces = tuple(piece.contiguous() for piece in dpieces)
        dx = torch.zeros(x.shape, dtype=x.dtype)
        dtaps = x.new_empty(len(x), len(taps) + 1, x.shape[2])
        conv = _conv(x, taps, bias, ctx.sizes, ctx.ahead, fresh)
        _kernels().llmrec_conv_backward(ctypes.byref(conv), _all(dpieces), _at(dx), _at(dtaps), torch.get_num_threads())
        dtaps = dtaps.sum(0)
        return dx, dtaps[:-1].t(), dtaps[-1], None, None, None


def _conv(x: Tensor, taps: Tensor, bias: Tensor, sizes: list[int], ahead: int, fresh: Tensor | None) -> _Conv:
    pointers = (_at(t) for t in (x, taps, bias, fresh))
    return _Conv(*x.shape, len(taps), ahead, *x.stride()[:2], len(sizes), *pointers, (ctypes.c_int64 * MAX_PIECES)(*sizes))


def _all(tensors: tuple[Tensor, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, fresh: Tensor | None) -> _Scan:
    return _Scan(*x.shape, *B.shape[2:], *(_at(t) for t in (x, dt, A, B, C, D, fresh)))


def _splits(scan: _Scan, groups: int, threads: int) -> int:
    """Tasks per batch row and group, so that a small batch keeps every thread busy."""
    return max(
        1, min(scan.heads // scan.groups // 16 if scan.headdim == 1 else scan.heads // scan.groups, -(-threads // (scan.batch * groups)))
    )


def _kernels() -> ctypes.CDLL:
    """The library, for callers that have asked `takes_...`."""
    found = library()
    assert found is not None
    return found


def _at(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _fresh(seq_idx: Tensor) -> Tensor:
    """1 where a sequence begins inside the row, (batch, length) bytes."""
    fresh = torch.zeros_like(seq_idx, dtype=torch.uint8)
    fresh[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return fresh
