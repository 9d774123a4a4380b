"""What a draft model with another tokenizer reads and writes, said in the target's tokens. No model, no cache.

A translation goes through text. It is only ever proposed to the target, so where two tokenizers don't agree a draft is
lost, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

LOOKBEHIND = 10
"""Tokens before the new ones that are read with them, so that they are split as they would be in a longer text."""
UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""
NUM_TRIES, PATIENCE = 4, 8
"""Places to part a text at, and how many times the lookbehind it may grow until it is parted anywhere."""


class Mark(NamedTuple):
    """So many tokens of the target mean so many of the draft."""

    num_target: int
    num_draft: int


class SharedTokens(NamedTuple):
    """Tokens that both vocabularies have, in the same order.

    Attributes:
        draft, target (`list[int]`): Their ids.
    """

    draft: list[int]
    target: list[int]


class TokenizerPair:
    """Two tokenizers, and what one has to know to speak for the other.

    Args:
        target, draft ([`~transformers.PreTrainedTokenizerBase`]): The tokenizers.
        target_lookbehind, draft_lookbehind (`int`): Tokens read again with the new ones, >= 1.
    """

    def __init__(
        self,
        target: PreTrainedTokenizerBase,
        draft: PreTrainedTokenizerBase,
        target_lookbehind: int = LOOKBEHIND,
        draft_lookbehind: int = LOOKBEHIND,
    ):
        self.target, self.draft = target, draft
        self.target_lookbehind, self.draft_lookbehind = target_lookbehind, draft_lookbehind
        self.draft_specials = frozenset(draft.all_special_ids)
        self.specials = _special_tokens(target, draft)
        self._of_specials = {theirs: ours for ours, theirs in self.specials.items()}
        begins: list[int] = draft("", add_special_tokens=True)["input_ids"]
        # some add an end as well
        self._beginning = [begins[0]] if begins and begins[0] == draft.bos_token_id else []

    def to_draft(self, ids: Sequence[int], is_first: bool = False) -> list[int]:
        """The draft's tokens for some of the target's, without special tokens that it does not know.

        Args:
            ids (`Sequence[int]`): Tokens of the target.
            is_first (`bool`, defaults to `False`): Whether the text begins with them.
        """
        found: list[int] = []
        start = 0
        for end in [*(index for index, token in enumerate(ids) if token in self.specials), len(ids)]:
            if end > start:
                found += _encode(self.draft, _decode(self.target, ids[start:end]).rstrip(UNFINISHED))
            found += [self.specials[ids[end]]] if end < len(ids) else []
            start = end + 1
        return self._beginning + found if is_first and found[:1] != self._beginning else found

    def to_target(self, context: Sequence[int], draft_context: Sequence[int], new: Sequence[int]) -> list[int]:
        """The target's tokens for what the draft goes on with.

        Args:
            context, draft_context (`Sequence[int]`): Everything so far, in the tokens of each.
            new (`Sequence[int]`): The draft's tokens after that. What comes after the first special one is left out.
        """
        new = list(new)
        num = next((index for index, token in enumerate(new) if token in self.draft_specials), len(new))
        tail = list(draft_context[-self.draft_lookbehind :])
        before, whole = _decode(self.draft, tail), _decode(self.draft, tail + new[:num]).rstrip(UNFINISHED)
        text = whole[len(before) :] if whole.startswith(before) else ""
        drafts = self._continue(context, text) if text else []
        end = self._of_specials.get(new[num]) if num < len(new) else None
        return drafts if end is None else [*drafts, end]

    def _continue(self, context: Sequence[int], text: str) -> list[int]:
        """The tokens of a text that goes on with a context: those that it has in there, where that can be told."""
        tail = list(context[-self.target_lookbehind :])
        before = _decode(self.target, tail)
        if before.endswith(UNFINISHED):
            return []
        ids = _encode(self.target, before + text)
        if ids[: len(tail)] == tail:
            return ids[len(tail) :]
        # the window may begin inside of a word, or hold special tokens
        for num in range(len(ids)):
            if _decode(self.target, ids[:num]) == before:
                return ids[num:]
        return _encode(self.target, text)

    @property
    def shared(self) -> SharedTokens:
        """Tokens that mean the same to both."""
        sizes, known = (len(self.target), len(self.draft)), _SHARED.setdefault(self.target, WeakKeyDictionary())
        if self.draft not in known or known[self.draft][0] != sizes:
            known[self.draft] = sizes, _shared_tokens(self.target, self.draft)
        return known[self.draft][1]


class Translation:
    """The context of one row in the draft's tokens, which grows and rolls back with the row.

    Only the end of it is translated in a round: what comes before a mark stays as it is.

    Args:
        pair ([`TokenizerPair`]): The tokenizers.
    """

    def __init__(self, pair: TokenizerPair):
        self.pair = pair
        self._ids: list[int] = []
        self._marks = [Mark(0, 0)]

    def of(self, context: Sequence[int]) -> list[int]:
        """The draft's tokens for all tokens of a row; at least one."""
        mark = self._marks[-1]
        del self._ids[mark.num_draft :]
        tail = self._part(context, len(context))
        ids = self._ids + tail
        self._advance(context, tail)
        return ids or [0]

    def _part(self, context: Sequence[int], end: int) -> list[int]:
        """The draft's tokens from the last mark on."""
        start = self._marks[-1].num_target
        return self.pair.to_draft(context[start:end], is_first=start == 0)

    def keep(self, length: int) -> None:
        """Forgets what reaches beyond the first `length` context tokens."""
        while self._marks[-1].num_target > length:
            self._marks.pop()

    def _advance(self, context: Sequence[int], tail: Sequence[int]) -> None:
        """Puts a mark before the end, once there is much after the last: where the text can be parted in both."""
        mark, lookbehind = self._marks[-1], self.pair.target_lookbehind
        num_new = len(context) - mark.num_target
        if num_new <= 2 * lookbehind:
            return
        end = len(context) - lookbehind
        parts = ((at, self._part(context, at)) for at in range(end, end - NUM_TRIES, -1))
        found = next(((at, part) for at, part in parts if part == list(tail[: len(part)])), None)
        if found is None and num_new > PATIENCE * lookbehind:
            found = end, self._part(context, end)
        if found is not None:
            self._ids += found[1]
            self._marks.append(Mark(found[0], len(self._ids)))


_SHARED: WeakKeyDictionary[
    PreTrainedTokenizerBase, WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[int, int], SharedTokens]]
]
_SHARED = WeakKeyDictionary()


def _shared_tokens(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> SharedTokens:
    """Tokens of the same text, whichever way they write a space; and special ones."""
    known, spaces = target.get_vocab(), (_space(target), _space(draft))
    specials, found = frozenset(draft.all_special_ids), _special_tokens(target, draft)
    for token, id_ in draft.get_vocab().items():
        text = token if not all(spaces) or not token.startswith(spaces[1]) else spaces[0] + token[1:]
        if id_ not in specials and text in known:
            found.setdefault(known[text], id_)
    return SharedTokens(list(found.values()), list(found))


def _special_tokens(target: Any, draft: Any) -> dict[int, int]:
    """The draft's special tokens for the target's: of the same role, or written alike."""
    known, theirs = draft.get_vocab(), frozenset(draft.all_special_ids)
    ours = target.all_special_ids
    pairs = [(id_, known.get(target.convert_ids_to_tokens(id_))) for id_ in ours]
    pairs += [(target.bos_token_id, draft.bos_token_id), (target.eos_token_id, draft.eos_token_id)]
    return {id_: own for id_, own in pairs if own in theirs and id_ is not None and own is not None}


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _space(tokenizer: Any) -> str:
    """How a vocabulary writes a space at the beginning of a token."""
    ids = _encode(tokenizer, " a")
    token: str = tokenizer.convert_ids_to_tokens(ids)[0] if ids else ""
    return token[0] if token and token[0] in " \u0120\u2581" else ""
