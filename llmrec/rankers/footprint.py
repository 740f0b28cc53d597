"""Memory of a language model's training step, found by rehearsing the step without data.

The model is built of fake tensors, which have shapes and no content. Its forward and backward pass run through torch's own
rules, and each block of memory counts from the operation that makes it until nobody refers to it any more. So dropout's masks,
float32 copies for the adapter and recomputed layers are in the sum for every family that transformers has, and config.json
is all it takes. What a kernel uses inside itself is not seen; Mamba runs as written in torch, without its fused kernels.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmrec.config import Base, Lora
from llmrec.rankers.backbone import TunedModel, float_head, resolve_dtype, trainable
from llmrec.rankers.completions import NLL_CHUNK, Strategy, choose, completion_logps, lay_out
from llmrec.rankers.letters import last_logits, pad

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, a byte of scale per 64 weights, a float32 per 256 scales (QLoRA, arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model and one step, by what holds them.

    Attributes:
        weights: the frozen base with its buffers.
        adapter: LoRA's weights; 0 where the base is tuned whole.
        optimiser: gradients of what is tuned, and AdamW's two moments.
        activations: what the forward pass keeps for the backward pass, or needs at a time where there is none.
        logits: what comes on top at the worst moment: logits, their gradients, what passes between two layers.
        products: weights that each token is multiplied with; not bytes.
    """

    weights: float
    adapter: float
    optimiser: float
    activations: float
    logits: float
    products: int

    def held(self) -> dict[str, float]:
        """What holds how much at the worst moment."""
        held = {name: size for name, size in asdict(self).items() if name != "products"}
        return {name: size for name, size in held.items() if size}


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that were made under it and are still referred to.

    Attributes:
        bytes: now.
        peak: the most at any moment.

    Args:
        existing: tensors that are there already and do not count, nor do views of them.
    """

    def __init__(self, existing: Iterable[Tensor]):
        super().__init__()
        self.bytes = self.peak = 0
        self._existing = [tensor.untyped_storage() for tensor in existing]  # held, so that their ids stay theirs
        self._known = {id(storage) for storage in self._existing}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self._gone, id(storage), storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def sharing(config: PreTrainedConfig, base: Base, checkpointing: bool) -> Strategy:
    """How completions of several tokens share their prompt in training: of `choose`."""
    return choose(hollow(config, base), checkpointing)[0]


def training_footprint(
    config: PreTrainedConfig,
    base: Base,
    lora: Lora,
    *,
    rows: int,
    tokens: int,
    completions: Sequence[int] = (1,),
    strategy: Strategy = "concatenated",
    checkpointing: bool = False,
    sequence_nll: bool = False,
) -> Footprint:
    """What one forward and backward pass of SFT or ORPO needs.

    Args:
        config: of the base model.
        base: its dtype, quantisation and attention.
        lora: the adapter, or rank 0 for all weights.
        rows: prompts of a forward pass.
        tokens: of the longest prompt, to which the others are padded.
        completions: tokens of each completion of a prompt.
        strategy: of `sharing`; it makes no difference to a single completion.
        checkpointing: layers are computed again in the backward pass.
        sequence_nll: the NLL covers the prompt, in chunks of positions.
    """
    with torch.device("meta"):
        model = hollow(config, base if lora.r else replace(base, dtype="float32"))
        weights, linear = _weights(model, base), _linear_weights(model)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # transformers renames its own settings
            tuned = trainable(model, lora, seed=0).train()
    tuned_bytes = sum(weight.nbytes for weight in tuned.parameters() if weight.requires_grad)
    adapter = tuned_bytes if lora.r else 0
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    prompts, answers = [[0] * tokens] * rows, [[[0] * length for length in completions]] * rows
    batch: dict[str, Any] = lay_out(strategy, prompts, answers, pad_id=0)
    if strategy == "continued":
        batch["mask"] = None  # prompts of one length need none, which fake tensors cannot tell by its content
    kept, peak = _rehearse(tuned, batch, sequence_nll)
    if base.compile and not torch.cuda.is_available():  # compiled attention keeps its probabilities, which the kernel makes again
        wide, long = batch["input_ids"].shape
        probabilities = wide * config.num_attention_heads * long**2 * resolve_dtype(base.dtype).itemsize
        layers = 1 if checkpointing else config.num_hidden_layers
        kept, peak = kept + layers * probabilities, peak + layers * probabilities
    products = sum(weight.numel() for weight in linear)
    return Footprint(weights, adapter, 3 * tuned_bytes, kept, peak - kept + _unpacked(linear, base), products)


def scoring_footprint(config: PreTrainedConfig, base: Base, *, rows: int, tokens: int) -> Footprint:
    """What a forward pass needs that scores `rows` prompts of up to `tokens` tokens."""
    model, (ids, lengths) = hollow(config, base), pad([[0] * tokens] * rows, 0)
    return without_gradients(model, base, lambda: last_logits(model, ids, lengths))


def without_gradients(model: PreTrainedModel, base: Base, work: Callable[[], object]) -> Footprint:
    """What some work with a model needs.

    Args:
        model: of `hollow`.
        base: its dtype and quantisation.
        work: is done once, with fake tensors.
    """
    weights, linear = _weights(model, base), _linear_weights(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model.eval().to_empty(device="cpu")
        with Alive(_all(model)) as alive:
            work()
    return Footprint(weights, 0, 0, alive.peak, _unpacked(linear, base), sum(weight.numel() for weight in linear))


def weights_bytes(config: PreTrainedConfig, base: Base) -> float:
    """Bytes of the frozen weights alone."""
    return _weights(hollow(config, base), base)


def hollow(config: PreTrainedConfig, base: Base) -> PreTrainedModel:
    """The model as `load_base` makes it, without content and not quantised."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=resolve_dtype(base.dtype), attn_implementation=base.attention)
        model.requires_grad_(False)
        if model.dtype != torch.float32:
            float_head(model)
    return model


def _rehearse(model: TunedModel, batch: dict[str, Any], sequence_nll: bool) -> tuple[int, int]:
    """Bytes kept for the backward pass, and bytes at the worst moment of the step."""
    config: Any = model.config
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")  # attention chooses its kernel by device; nothing is allocated
        with Alive(_all(model)) as alive:
            logps, hidden = completion_logps(model, config, batch, hidden_states=sequence_nll)
            loss, kept = logps.sum(), alive.bytes
            if hidden is not None:
                chunk = hidden.flatten(0, 1)[:NLL_CHUNK]
                nll = F.cross_entropy(model.get_output_embeddings()(chunk).float(), chunk.new_zeros(len(chunk)).long(), reduction="sum")
                loss = loss + nll  # one chunk's logits and their gradient: the others follow one by one
            loss.backward()
    return kept, alive.peak


def _all(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _linear_weights(model: PreTrainedModel) -> list[Tensor]:
    """The weights that nf4 quantises: of all products but the head's."""
    head = model.get_output_embeddings()
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


def _weights(model: PreTrainedModel, base: Base) -> float:
    """Bytes of the frozen weights and buffers; tied ones count once."""
    total = float(sum(tensor.nbytes for tensor in _all(model)))
    if base.quantise == "nf4":
        total -= sum(weight.nbytes - NF4_BYTES * weight.numel() for weight in _linear_weights(model))
    return total


def _unpacked(linear: list[Tensor], base: Base) -> int:
    """Bytes of the largest weight, which leaves its 4 bits while it is multiplied with."""
    return max(weight.nbytes for weight in linear) if base.quantise == "nf4" else 0
