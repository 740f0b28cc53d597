"""Recommend to users whose histories grow: every user's state is kept, and a new event costs one step.

What a state-space model knows of a history is a state of constant size, so a history is read once. The model was trained
on windows of `training.max_length` events, and `retrieve` evaluates it on as many; a state has no window and remembers
the whole history, so that for users with longer ones the answers differ a little from `retrieve`'s candidates.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmrec.data.sequences import Sequences
from llmrec.errors import UserError
from llmrec.retrievers import windows
from llmrec.retrievers.candidates import rows_per_batch, top_items
from llmrec.retrievers.sequence_model import SequenceModel

USERS = 64  # read at a time
POSITIONS = 128  # read at a time; a longer history goes on from the state


@dataclass
class UserStates:
    """What a model knows of its users. The tensors lie in main memory and may have spare rows at the end.

    Attributes:
        rows: user -> row of the tensors; 0, 1, ... in this order.
        layers: one state per layer of the model: a (nested) tuple of tensors, (rows, ...).
        hidden: the model's vector after each user's last event, (rows, width); its products with the item vectors score
            the next item.
        weights: fingerprint of the weights that made them.
    """

    rows: dict[int, int]
    layers: list[Any]
    hidden: Tensor
    weights: str

    @property
    def users(self) -> np.ndarray:
        """(users,) int64, in the order of their rows."""
        return np.fromiter(self.rows, dtype=np.int64, count=len(self.rows))


def read(model: SequenceModel, histories: Sequence[ArrayLike], users: ArrayLike | None = None) -> UserStates:
    """States after histories of any length: long ones are read in pieces, so that the memory does not grow with them.

    The model was trained on windows of `training.max_length` events; here it reads on beyond them.

    Args:
        model: a trained model whose mixer has a state.
        histories: each user's items in time order. A user without any is left out: his first event is for `update`.
        users: (histories,) user numbers; None is 0, 1, ...

    Raises:
        UserError: when the model has no state, an item is not in its catalogue, or a user has two histories.
    """
    names = np.arange(len(histories)) if users is None else _whole_numbers(users, "users")
    different, counts = np.unique(names, return_counts=True)
    if len(names) != len(histories):
        raise UserError(f"{len(histories)} histories for {len(names)} users: give one each")
    if len(different) < len(names):
        raise UserError(f"user {different[counts.argmax()]} has {counts.max()} histories: join them in time order")
    nobody = _map(lambda tensor: tensor.cpu(), model.initial_states(0))
    states = UserStates({}, nobody, torch.zeros(0, model.width, dtype=model.items.weight.dtype), _fingerprint(model))
    lengths, items = _joined(histories)
    update(model, states, np.repeat(names, lengths), items)
    return states


@torch.inference_mode()
def update(model: SequenceModel, states: UserStates, users: ArrayLike, items: ArrayLike) -> None:
    """Take new events into the states, in place. Other users' states are not touched.

    Args:
        model: the model that made the states.
        states: an unknown user is added to them.
        users: (events,) who acted.
        items: (events,) on what. Several events of one user are in time order.

    Raises:
        UserError: when an item is not in the model's catalogue; it names the row, and nothing has changed.
    """
    who, what = _whole_numbers(users, "users"), _whole_numbers(items, "items")
    if len(who) != len(what):
        raise UserError(f"{len(what)} items for {len(who)} users: an event has one of each")
    _check_items(model, who, what)
    model.eval()
    names, counts = np.unique(who, return_counts=True)
    histories = np.split(what[who.argsort(kind="stable")], counts.cumsum()[:-1])
    unknown = [user for user in names.tolist() if user not in states.rows]
    added = {user: row for row, user in enumerate(unknown, len(states.rows))}
    _make_room(model, states, len(states.rows) + len(added))
    rows = np.array([added[user] if user in added else states.rows[user] for user in names.tolist()], dtype=np.int64)
    by_length = counts.argsort(kind="stable")
    for start in range(0, len(names), USERS):
        some = by_length[start : start + USERS]
        _read_on(model, states, torch.from_numpy(rows[some]), windows.pad([histories[index] for index in some]))
    states.rows.update(added)


@torch.inference_mode()
def recommend(
    model: SequenceModel, states: UserStates, users: ArrayLike, count: int, exclude: Sequence[ArrayLike] | None = None
) -> np.ndarray:
    """Each user's best items, exact over the whole catalogue.

    Args:
        model: the model that made the states.
        states: of these users among others.
        users: (rows,) user numbers.
        count: items per user.
        exclude: per row the items not to recommend, such as the user's history; None excludes nothing.

    Returns:
        (rows, count) int32, best first; 0 where fewer items are left.

    Raises:
        UserError: when a user is unknown, or an excluded item is not in the model's catalogue.
    """
    asked = _whole_numbers(users, "users")
    for user in asked.tolist():
        if user not in states.rows:
            raise UserError(f"user {user} has no state: `update` it with his first events, or recommend what is popular")
    lengths, excluded = _joined([[]] * len(asked) if exclude is None else exclude)
    if len(lengths) != len(asked):
        raise UserError(f"{len(lengths)} lists of items to exclude for {len(asked)} users: give one each")
    _check_items(model, np.repeat(asked, lengths), excluded)
    # what top_items leaves out is a row's history
    offsets, nothing = np.cumsum([0, *lengths]), np.zeros(len(excluded))
    left_out = Sequences(offsets, excluded.astype(np.int32), nothing.astype(np.float32), nothing.astype(np.int8), _item_count(model))
    scorer = _Vectors(states.hidden[[states.rows[user] for user in asked.tolist()]], model.item_vectors())
    return top_items(scorer, left_out, np.arange(len(asked)), offsets[1:], count, rows_per_batch(left_out.item_count))


def save(states: UserStates, path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    count = len(states.rows)
    tensors = {f"state.{index}": tensor[:count] for index, tensor in enumerate(_tensors(states.layers))}
    tensors |= {"users": torch.from_numpy(states.users), "hidden": states.hidden[:count]}
    beside = path.with_name(f".{path.name}.tmp")
    save_file(tensors, beside, metadata={"weights": states.weights})
    os.replace(beside, path)


def load(path: Path, model: SequenceModel) -> UserStates:
    """Read what `save` wrote.

    Args:
        path: the file.
        model: the model that made the states.

    Raises:
        UserError: when the file is not there, damaged, or of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            weights = (file.metadata() or {}).get("weights", "unknown")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: `llmrec retrieve` with --retrieval.keep_states true writes it, or `online.save`") from error
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and make the states again") from error
    if weights != _fingerprint(model):
        raise UserError(
            f"{path} has the states of another model (weights {weights[:12]}, not {_fingerprint(model)[:12]}): "
            "load the model.safetensors beside it, or read the histories again with this model"
        )
    users = tensors["users"].tolist()
    stored = (tensors[f"state.{index}"] for index in range(len(tensors) - 2))
    layers = _map(lambda _: next(stored), model.initial_states(0))
    return UserStates(dict(zip(users, range(len(users)), strict=True)), layers, tensors["hidden"], weights)


@dataclass
class _Vectors:
    """Scores from the users' vectors (see `candidates.Scorer`); here a user's number is his row."""

    vectors: Tensor
    table: Tensor

    def scores(self, users: np.ndarray, histories: list[np.ndarray]) -> Tensor:
        return self.vectors[torch.from_numpy(users)].to(self.table.device) @ self.table[1:].T


def _read_on(model: SequenceModel, states: UserStates, rows: Tensor, items: Tensor) -> None:
    """Take the new items (users, longest), padded with 0 on the right, into the states in `rows`."""
    device = model.items.weight.device
    items = items.to(device)
    layers = _map(lambda tensor: tensor[rows].to(device), states.layers)
    if items.shape[1] == 1:
        hidden, layers = model.step(layers, items[:, 0])
    else:
        hidden = states.hidden[rows].to(device)
        for start in range(0, items.shape[1], POSITIONS):
            piece = items[:, start : start + POSITIONS]
            vectors, layers = model.read(piece, layers)
            lengths = (piece > 0).sum(1)
            here = lengths > 0  # the others' histories ended in an earlier piece
            hidden[here] = vectors[here, lengths[here] - 1]
    for kept, new in zip([states.hidden, *_tensors(states.layers)], [hidden, *_tensors(layers)], strict=True):
        kept[rows] = new.to(kept)


def _make_room(model: SequenceModel, states: UserStates, count: int) -> None:
    """Grow to rows for `count` users, by half at least: a stream of new users must not copy all states with each."""
    there = len(states.hidden)
    if count <= there:
        return
    more = max(count, there * 3 // 2) - there

    def longer(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new.to(old).expand(more, *new.shape[1:])])

    states.layers = _map(longer, states.layers, model.initial_states(1))
    states.hidden = torch.cat([states.hidden, states.hidden.new_zeros(more, states.hidden.shape[1])])


def _tensors(state: Any) -> list[Tensor]:
    """The tensors of a nested tuple, from left to right."""
    return [state] if isinstance(state, Tensor) else [tensor for part in state for tensor in _tensors(part)]


def _map(function: Callable[..., Tensor], *states: Any) -> Any:
    """The nested tuple of `function` of the tensors at the same place in each of `states`."""
    if isinstance(states[0], Tensor):
        return function(*states)
    parts = [_map(function, *tensors) for tensors in zip(*states, strict=True)]
    kind = type(states[0])
    return kind(parts) if kind in (list, tuple) else kind(*parts)  # a NamedTuple takes its fields


def _whole_numbers(values: ArrayLike, what: str) -> np.ndarray:
    array = np.atleast_1d(values)
    if array.size and array.dtype.kind not in "iu":
        raise UserError(f"{what} are whole numbers (the ids of {what}.parquet), not {array.dtype}")
    return array.astype(np.int64)


def _joined(lists: Sequence[ArrayLike]) -> tuple[list[int], np.ndarray]:
    """The length of each list of items, and all of them in a row."""
    items = [_whole_numbers(some, "items") for some in lists]
    return [len(some) for some in items], np.concatenate([np.empty(0, dtype=np.int64), *items])


def _check_items(model: SequenceModel, users: np.ndarray, items: np.ndarray) -> None:
    last = _item_count(model)
    for row in np.flatnonzero((items < 1) | (items > last))[:1]:
        raise UserError(
            f"row {row} (user {users[row]}): item {items[row]} is not in the model's catalogue of 1 to {last}: "
            "leave the event out, or run prepare and retrieve again with the new items"
        )


def _item_count(model: SequenceModel) -> int:
    return model.items.num_embeddings - 1


def _fingerprint(model: SequenceModel) -> str:
    """sha256 of the weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
