"""What a guarded model carries besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.characters import Piece, find_pieces
from ..answer.pooling import find_newline_ids
from ..config import SafeSpecConfig
from ..errors import UnsupportedRequestError
from ..heads.safety_head import SafetyHead, check_target


class Boundaries(NamedTuple):
    """Which tokens of a vocabulary can end a line, and which are no whole characters."""

    newline_ids: frozenset[int]
    pieces: Mapping[int, Piece]


_BOUNDARIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Boundaries]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Attachment:
    """`model.safety`: what [`attach_safety_head`] gave a model. No module, so that it is not saved with its weights.

    Attributes:
        head ([`SafetyHead`]): The head.
        policy ([`SafeSpecConfig`]): What `safespec=True` means.
        always (`bool`): Every `generate` is guarded.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): For calls that bring none of their own.
        ignore_mismatches (`tuple[str, ...]`): Fields of the target binding that are excused.
    """

    head: SafetyHead
    policy: SafeSpecConfig
    always: bool
    tokenizer: PreTrainedTokenizerBase | None
    ignore_mismatches: tuple[str, ...]

    @property
    def risk_threshold(self) -> float:
        """The threshold of `safespec=True`: the policy's, else the head's own."""
        return self.policy.risk_threshold or self.head.config.risk_threshold

    def choose_tokenizer(
        self, model: PreTrainedModel, given: PreTrainedTokenizerBase | None
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of one call: the one it was given, if that is the head's, else the one of the attachment.

        Raises:
            HeadMismatchError: If the given one is not the head's.
            UnsupportedRequestError: If there is none at all.
        """
        if given is not None and given is not self.tokenizer:
            check_target(self.head, model, given, self.ignore_mismatches)
            return given
        if self.tokenizer is None:
            raise UnsupportedRequestError(
                f"No tokenizer was found at {model.config.name_or_path!r}, and guarded decoding needs one for "
                "segments and for the policy's texts. Pass `tokenizer=` to `attach_safety_head` or to `generate`."
            )
        return self.tokenizer


def find_boundaries(tokenizer: PreTrainedTokenizerBase) -> Boundaries:
    """The boundaries of a tokenizer's tokens, for which its whole vocabulary is decoded once."""
    num_tokens, found = _BOUNDARIES.get(tokenizer, (-1, None))
    if found is None or num_tokens != len(tokenizer):
        found = Boundaries(find_newline_ids(tokenizer), find_pieces(tokenizer))
        _BOUNDARIES[tokenizer] = len(tokenizer), found
    return found
