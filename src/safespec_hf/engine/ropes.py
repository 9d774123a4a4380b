"""Rotary positions whose frequencies depend on the length of the text: two sets of longrope, many of dynamic NTK.

The model's own code chooses them for a whole forward, by the last position in it. Plain decoding of one text reads its
prompt at once and then token after token; here a forward reads several tokens of several rows. So each token is read
as in a text of the length that there is when plain decoding reads it: its *extent*.

There are two kinds of models. Most go on: what has been read stays as it is, and only new tokens get new frequencies.
Some (Phi-3, PhiMoE) drop their cache at that length and read the whole text again, by the word of their own
`prepare_inputs_for_generation`. There a row's states hold on one side of the length only.

Shapes: B rows, T positions of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..errors import UnsupportedRequestError
from .compiling import compiled_forwards
from .sharing import Shared
from .traits import CACHE_NAME, FAILURES, FilledCache, cache_argument, prepare_inputs, reads_alone, takes_positions

KINDS = ("dynamic", "longrope")


class Changes(NamedTuple):
    """After which lengths of a text a model's frequencies are others.

    Attributes:
        two_sets (`tuple[int, ...]`): Of longrope, ascending: up to it there is one set of them, after it another one.
        stretched (`int`, *optional*): Of dynamic NTK: after it they are others for every length.
        factor (`float`, defaults to 1.0): How many times as long as that a text may get.

    Example:

        >>> import numpy as np
        >>> Changes((16,), None).classes(np.array([3, 16, 17, 90])).tolist()
        [0, 0, 1, 1]
        >>> Changes((), 16).classes(np.array([3, 16, 17, 90])).tolist()
        [0, 0, 17, 90]
    """

    two_sets: tuple[int, ...]
    stretched: int | None
    factor: float = 1.0

    @property
    def lengths(self) -> list[int]:
        """All of them."""
        return [*self.two_sets, *([] if self.stretched is None else [self.stretched])]

    def classes(self, lengths: np.ndarray) -> np.ndarray:
        """Equal numbers for lengths that have the same frequencies."""
        found: np.ndarray = np.searchsorted(np.array(self.two_sets, dtype=np.int64), lengths)
        return found if self.stretched is None else np.where(lengths > self.stretched, lengths, found)

    def are_alike(self, *lengths: int) -> bool:
        """Whether lengths have the same frequencies."""
        return len({*self.classes(np.array(lengths)).tolist()}) == 1

    def before(self, length: int) -> int | None:
        """Tokens that a text of this length can get before its frequencies change; `None` where they never do."""
        return next((end - length for end in self.two_sets if length <= end), None)


def changes_of(model: nn.Module) -> Changes | None:
    """When the frequencies of a model change, by its config; `None` if never."""
    config = getattr(model, "config", None)
    text: Any = None if config is None else config.get_text_config(decoder=True)
    ropes = getattr(text, "rope_parameters", None) or {}
    most, two_sets, factors = getattr(text, "max_position_embeddings", None) or 2**31, set[int](), list[float]()
    for rope in [ropes] if "rope_type" in ropes else ropes.values():  # one for all layers, or one for each kind
        kind = rope.get("rope_type") if isinstance(rope, Mapping) else None
        if kind == "longrope":
            two_sets.add(rope.get("original_max_position_embeddings") or most)
        elif kind == "dynamic":
            factors.append(max(rope.get("factor") or 1.0, 1.0))
    if not two_sets and not factors:
        return None
    return Changes(tuple(sorted(two_sets)), most if factors else None, min(factors, default=1.0))


def most_tokens(model: PreTrainedModel) -> int:
    """Tokens that a text may get, by the config of a model: as many as it was trained for, or is stretched to."""
    text: Any = model.config.get_text_config(decoder=True)
    most, changes = getattr(text, "max_position_embeddings", None) or 2**31, changes_of(model)
    return int(most if changes is None else most * changes.factor)


class _Way(NamedTuple):
    """What a model does where its frequencies change.

    Attributes:
        changes ([`Changes`]): Of its config.
        modules (`tuple[torch.nn.Module, ...]`): Those that turn positions into rotations.
        rereads (`bool`): Whether it reads the whole text again.
    """

    changes: Changes
    modules: tuple[nn.Module, ...]
    rereads: bool


_KNOWN: WeakKeyDictionary[nn.Module, tuple[Changes, _Way | None]] = WeakKeyDictionary()


def _way_of(model: PreTrainedModel) -> _Way | None:
    """What a model does there; `None` if its frequencies never change, or if it is not known how."""
    changes = changes_of(model)
    if changes is None:
        return None
    known = _KNOWN.get(model)
    if known is None or known[0] != changes:
        known = _KNOWN[model] = changes, _study(model, changes)
    return known[1]


def can_cross(model: PreTrainedModel) -> bool:
    """Whether it is known how a model goes on after the length at which its frequencies change, rows read together."""
    return _way_of(model) is not None and not reads_alone(model)


def rereads(model: PreTrainedModel) -> bool:
    """Whether it then reads the whole text again."""
    way = _way_of(model)
    return way is not None and way.rereads


def _study(model: Any, changes: Changes) -> _Way | None:
    modules = tuple(module for module in model.modules() if module is not model and _changes(module))
    answers = {_goes_on(model, length) for length in changes.lengths}
    if not modules or not takes_positions(model) or answers not in ({True}, {False}):
        return None
    has_one = changes.stretched is None and len(changes.two_sets) == 1
    return _Way(changes, modules, rereads=answers == {False}) if answers == {True} or has_one else None


def _changes(module: nn.Module) -> bool:
    kind = getattr(module, "rope_type", None)
    return any(each in KINDS for each in (kind.values() if isinstance(kind, Mapping) else [kind]))


def _goes_on(model: Any, length: int) -> bool | None:
    """Whether a model reads the token after so many with its cache, or all of them again; `None` if neither."""
    cache = FilledCache(length)
    cache.layers.append(DynamicLayer())  # one without layers counts as no cache
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    try:
        inputs = prepare_inputs(model, ids, next_sequence_length=1, **{CACHE_NAME: cache})
    except FAILURES:
        return None
    found, num = inputs.get(cache_argument(model), inputs.get(CACHE_NAME)), inputs["input_ids"].shape[1]
    if found is cache and num == 1:
        return True
    return False if found is None and num == length + 1 else None


class RowRopes:
    """Rows of a batch, and the texts as whose part their tokens are read.

    Args:
        way (`_Way`): The model's.
        extents (`Sequence[int]`):
            Of each row, the length of the text that is read at once; 0 before anything is known of it.
    """

    def __init__(self, way: _Way, extents: Sequence[int]):
        self._way = way
        self._extents = list(extents)

    @classmethod
    def of(cls, model: PreTrainedModel, num_rows: int) -> RowRopes | None:
        """Empty rows of a model, if its frequencies change."""
        way = _way_of(model)
        return None if way is None else cls(way, [0] * num_rows)

    def begin(self, lengths: Sequence[int], sizes: Sequence[int], num_drafts: Sequence[int] | None) -> None:
        """Rows are about to be read, from a length on: those that have read nothing get their prompt."""
        for row, (length, size) in enumerate(zip(lengths, sizes, strict=True)):
            end, known = length + size - (num_drafts[row] if num_drafts else 0), self._extents[row]
            # another prompt may have come in the place of a row's first, if nothing is left of that
            if known == 0 or (length == 0 and not self._way.rereads):
                self._extents[row] = min(known, end) or end

    def hold(self, lengths: Sequence[int]) -> None:
        """Rows were read elsewhere, up to these lengths."""
        if self._way.rereads:
            self._extents = [known or length for known, length in zip(self._extents, lengths, strict=True)]

    def suits(self, row: int, length: int, end: int) -> bool:
        """Whether what a row has read, so many tokens, is what its text needs once it is longer."""
        return not self._way.rereads or length == 0 or self._way.changes.are_alike(self._extents[row], end)

    def reach(self, row: int, end: int) -> None:
        """A row is going to be read up to there."""
        if self._way.rereads:
            self._extents[row] = end

    def before_change(self, length: int) -> int | None:
        """Tokens that can be read after so many, without others having to be read again."""
        return self._way.changes.before(length) if self._way.rereads else None

    def select(self, rows: Sequence[int]) -> RowRopes:
        """Those rows, in this order; a row may come several times."""
        return RowRopes(self._way, [self._extents[row] for row in rows])

    def replace(self, row: int, other: RowRopes, other_row: int) -> None:
        """A row becomes one of another batch."""
        self._extents[row] = other._extents[other_row]

    @contextmanager
    def reading(self, positions_BT: np.ndarray, *, in_one_row: bool = False) -> Iterator[None]:
        """Runs a forward inside that gives every token its own frequencies, in this thread.

        Args:
            positions_BT (`np.ndarray` of shape `(B, T)`): Of the block.
            in_one_row (`bool`, defaults to `False`): Whether the forward has all of them in one row.
        """
        rotation = self._rotation(positions_BT, in_one_row)
        if rotation is None:  # as the model chooses by itself
            yield
            return
        hooks: dict[Hashable, Any] = {id(module): partial(_put_on, module) for module in self._way.modules}
        # a compiled forward would not look for hooks again
        with _HOOKS.held(hooks), compiled_forwards((), is_wanted=False):
            _CURRENT.rotation = rotation
            try:
                yield
            finally:
                _CURRENT.rotation = None

    def _rotation(self, positions_BT: np.ndarray, in_one_row: bool) -> _Rotation | None:
        changes = self._way.changes
        extents_BT = np.maximum(np.array(self._extents)[:, None], positions_BT + 1)
        classes_BT, longest = changes.classes(extents_BT), int(positions_BT.max()) + 1
        # after longer texts, dynamic frequencies are those of the longest one
        is_stale = changes.stretched is not None and longest >= changes.stretched
        if not is_stale and (classes_BT == changes.classes(np.array(longest))).all():
            return None
        kinds, groups_BT = np.unique(classes_BT, return_inverse=True)
        groups_BT = groups_BT.reshape(classes_BT.shape)
        ends = [int(extents_BT[groups_BT == group].max()) for group in range(len(kinds))]
        groups = torch.from_numpy(groups_BT.reshape(1, -1) if in_one_row else groups_BT)
        return _Rotation(groups, ends, changes.stretched is not None)


class _Rotation(NamedTuple):
    """How the tokens of a forward are rotated.

    Attributes:
        groups_BT (`torch.LongTensor` of shape `(B, T)`): Which group a token is in.
        ends (`list[int]`): Of each group, the length of a text in which they have their frequencies.
        is_kept (`bool`): Whether a module keeps what it has stretched, until a short text comes.
    """

    groups_BT: Tensor
    ends: list[int]
    is_kept: bool

    def turn(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """What a module gives for its positions, if each group is in a text of its own."""
        by_name = "position_ids" in kwargs
        positions: Tensor = kwargs["position_ids"] if by_name else args[1]
        if positions.shape[-2:] != self.groups_BT.shape:
            raise UnsupportedRequestError(
                f"{type(module).__name__} is given positions of shape {tuple(positions.shape)} for a block of shape "
                f"{tuple(self.groups_BT.shape)}: it can't be told which of its tokens come after the length at which "
                "rotary positions change. Keep prompt and `max_new_tokens` below that, or generate without `safespec`."
            )

        def turned(at: Tensor) -> Any:
            given = kwargs | {"position_ids": at} if by_name else kwargs
            return module.forward(*(args if by_name else [args[0], at, *args[2:]]), **given)

        groups_BT, outputs = self.groups_BT.to(positions.device), None
        for group, end in enumerate(self.ends):
            self._forget(turned, positions)
            # one more position, which is dropped again, says how long the text is
            last = positions.new_full((*positions.shape[:-1], 1), end - 1)
            parts = turned(torch.cat([positions.clamp(max=end - 1), last], dim=-1))
            parts = [part.narrow(-2, 0, groups_BT.shape[-1]) for part in _as_list(parts)]
            if outputs is None:
                outputs = parts
            is_in = (groups_BT == group)[..., None]
            outputs = [torch.where(is_in, part, whole) for part, whole in zip(parts, outputs, strict=True)]
        self._forget(turned, positions)
        assert outputs is not None
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _forget(self, turned: Callable[[Tensor], Any], positions: Tensor) -> None:
        if self.is_kept:
            turned(torch.zeros_like(positions[..., :1]))


def _as_list(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


class _Current(threading.local):
    rotation: _Rotation | None = None


_CURRENT = _Current()
_HOOKS = Shared()


def _put_on(module: nn.Module) -> Callable[[], object]:
    return module.register_forward_hook(_rotate, with_kwargs=True).remove


def _rotate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    rotation = _CURRENT.rotation
    return output if rotation is None else rotation.turn(module, args, kwargs)
