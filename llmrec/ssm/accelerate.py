"""Our convolution and scans inside the Mamba and Mamba-2 models of transformers, on a CPU.

Without CUDA kernels transformers computes these layers in reference code: correct and slow. `accelerate` puts other code
behind the same modules, weights and caches. Nothing is wrapped or copied: a mixer gets a subclass of its own class, as
FSDP2 gives the layers it shards, so that LoRA, gradient checkpointing, saving and beam search go on as before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmrec.ssm import native
from llmrec.ssm.conv import conv_silu
from llmrec.ssm.scan import selective_scan, selective_scan_step
from llmrec.ssm.ssd import ssd

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer


class Accelerated(AbstractContextManager["Accelerated"]):
    """The modules that one call of `accelerate` changed. `remove`, or leaving the context, gives them back their own code."""

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = {module: type(module) for module in modules}
        for module, theirs in self._modules.items():
            module.__class__ = _Linear if theirs is nn.Linear else _classes()[theirs]

    def remove(self) -> None:
        """Back to the code of transformers."""
        for module, theirs in self._modules.items():
            module.__class__ = theirs

    def __exit__(self, *error: object) -> None:
        self.remove()


def accelerate(model: nn.Module) -> Accelerated:
    """Makes a Mamba or Mamba-2 model of transformers faster on a CPU. Outputs, gradients and caches stay what they were.

    Its mixers get our convolution and scans; its linear layers, the head too, a product that reads the weights faster
    where there are only a few rows and no gradient, which is what decoding waits for.

    A mixer whose weights lie on another device when it is called runs the code of transformers, which has kernels there.
    State dicts are the same, a pickle is one of the plain model, and a deep copy is as fast as its original. What is
    accelerated already stays so.

    Args:
        model: anything that contains `MambaMixer` or `Mamba2Mixer` modules, a PEFT model too.

    Returns:
        What undoes it: `accelerate(model).remove()`, or `with accelerate(model): ...`.

    Raises:
        ValueError: when there is no such module in the model.
    """
    classes = _classes()
    mixers = [module for module in model.modules() if isinstance(module, tuple(classes))]
    if not mixers:
        raise ValueError(
            f"{type(model).__name__} has neither MambaMixer nor Mamba2Mixer modules: accelerate takes transformers' mamba and mamba2 models"
        )
    # not a subclass, whose forward may compute something else, and only the activation that conv_silu has
    ours = [module for module in mixers if type(module) in classes and module.activation in ("silu", "swish")]
    return Accelerated([*ours, *(module for module in model.modules() if type(module) is nn.Linear)])


class _Faster(nn.Module):
    """Comes first in the bases of a class: another forward, but pickled as `theirs`."""

    theirs: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (self.theirs,), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Faster:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


class _Linear(_Faster, nn.Linear):
    theirs = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        if native.takes_linear(input, self.weight):
            return native.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)


class _Mixer(_Faster):
    """Before one of transformers' mixers."""

    mix: Callable[..., Tensor]
    conv1d: nn.Conv1d

    def forward(
        self, hidden_states: Tensor, cache_params: Cache | None = None, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        packed = kwargs.get("seq_idx") is not None or kwargs.get("cu_seqlens") is not None  # they refuse it without kernels
        if packed or self.conv1d.weight.device.type != "cpu":
            return super().forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        return self.mix(hidden_states, cache_params, attention_mask)


@functools.cache
def _classes() -> dict[type[nn.Module], type[_Mixer]]:
    """Ours for each class of mixers. Made when first asked for: transformers takes seconds to import."""
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    return {
        theirs: type(f"Accelerated{theirs.__name__}", (_Mixer, theirs), {"theirs": theirs, "mix": mix})
        for theirs, mix in ((MambaMixer, _mamba), (Mamba2Mixer, _mamba2))
    }


def _mamba2(mixer: Mamba2Mixer, u: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
    """`Mamba2Mixer.forward`: u (batch, length, hidden_size) to the same; mask (batch, length), zero at padding."""
    groups, heads = mixer.n_groups, mixer.num_heads
    sizes = [mixer.intermediate_size, groups * mixer.ssm_state_size, groups * mixer.ssm_state_size]
    state = _state(mixer, cache)
    z, xBC, dt = mixer.in_proj(_masked(u, mask)).split([sizes[0], sum(sizes), heads], dim=-1)
    x, B, C = (_masked(piece, mask) for piece in _convolution(mixer, xBC, sizes, cache))
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    dt = F.softplus(dt + mixer.dt_bias.to(dt.dtype))  # not zero at padding: a state decays there
    A = -mixer.A_log.float().exp()
    if state is not None and u.shape[1] == 1:  # one position after others: time_step_limit is not applied
        y = _ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], mixer.D, state)
    else:
        y, state = ssd(x, dt.clamp(*mixer.time_step_limit), A, B, C, mixer.D, state=state, return_state=cache is not None)
    if cache is not None and state is not None:
        cache.update_recurrent_state(state, mixer.layer_idx)
    return mixer.out_proj(mixer.norm(y.reshape(z.shape), z).to(u.dtype))


def _mamba(mixer: MambaMixer, u: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
    """`MambaMixer.forward`, the same for Mamba-1."""
    state = _state(mixer, cache)
    x, z = mixer.in_proj(_masked(u, mask)).chunk(2, dim=-1)
    (x,) = _convolution(mixer, x, [mixer.intermediate_size], cache)
    x = _masked(x, mask)
    dt, B, C = mixer.x_proj(x.to(z.dtype)).split([mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1)
    dt = F.softplus(F.linear(dt, mixer.dt_proj.weight, mixer.dt_proj.bias))
    A = -mixer.A_log.float().exp()
    if state is not None and u.shape[1] == 1:
        dt, B, C = (t[:, 0].to(state.dtype) for t in (dt, B, C))
        y, state = selective_scan_step(x[:, 0], dt, A, B, C, mixer.D, state)
    else:  # without the state: transformers, too, starts from zero where several positions continue a cache
        y, state = selective_scan(x, dt, A, B, C, mixer.D, return_state=cache is not None)
    if cache is not None and state is not None:
        cache.update_recurrent_state(state, mixer.layer_idx)
    return mixer.out_proj((y.reshape(z.shape) * F.silu(z)).to(u.dtype))


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    return t if mask is None else (t * mask[..., None]).to(t.dtype)


def _state(mixer: Mamba2Mixer | MambaMixer, cache: Cache | None) -> Tensor | None:
    """What the cache has of the scan, safe from what is written there before the backward pass; None at the beginning."""
    state = None if cache is None else cache.get_recurrent_state(mixer.layer_idx)
    return state.clone() if state is not None and torch.is_grad_enabled() else state


def _convolution(mixer: Mamba2Mixer | MambaMixer, x: Tensor, sizes: list[int], cache: Cache | None) -> Sequence[Tensor]:
    """Convolution and SiLU of x (batch, length, channels) in at least float32, cut as by `split`.

    The cache keeps the last inputs as (batch, channels, width), all of them where it is told to record.
    """
    weight, bias, width = mixer.conv1d.weight, mixer.conv1d.bias, mixer.conv_kernel_size
    dtype = torch.promote_types(x.dtype, torch.float32)
    before = None
    if cache is not None:
        past, recording = cache.get_conv_state(mixer.layer_idx), cache.is_recording_past(mixer.layer_idx)
        if past is not None and x.shape[1] == 1 and not recording:
            window = cache.update_conv_state(x.mT, mixer.layer_idx, conv_kernel_size=width)[..., 1:]
            mixed = (window.to(dtype) * weight[:, 0].to(dtype)).sum(-1)
            return F.silu(mixed if bias is None else mixed + bias)[:, None].split(sizes, dim=-1)
        if past is not None:
            before = F.pad(past, (width, 0))[..., past.shape[-1] + 1 :].mT  # a short recording, too, becomes width - 1
        cache.update_conv_state((x if recording else x[:, -width:]).mT, mixer.layer_idx, conv_kernel_size=width)
    return conv_silu(x.to(dtype), weight, bias, sizes, before=before)


def _ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    """`llmrec.ssm.ssd.ssd_step` that overwrites the state, without a temporary as large."""
    single = all(t.dtype == torch.float32 for t in (dt, D, state))
    if single and state.is_contiguous() and native.takes_scan(x, state.shape[-1]) and not torch.is_grad_enabled():
        return native.scan_step_(x, dt, A, B, C, D, state)
    state.mul_((dt * A).exp()[..., None, None])
    groups = state.unflatten(1, (B.shape[1], -1))  # (batch, groups, heads per group, headdim, d_state)
    groups.addcmul_((dt[..., None] * x).unflatten(1, groups.shape[1:3])[..., None], B[:, :, None, None])
    y = groups.flatten(2, 3) @ C[..., None]
    return torch.addcmul(y.view(x.shape), x, D[:, None])
