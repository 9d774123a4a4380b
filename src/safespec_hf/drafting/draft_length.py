"""How many tokens to draft, so that a token costs the least time. Pure: no model, no cache, no clock.

A draft is worth its cost as long as the chance that it will be accepted, times what a token costs on average, is more
than it costs to draft it and to verify it. Chances are learned while decoding, one for each kind of evidence that a
drafter has: how sure a draft model is of a token, or how much of the context a lookup has matched. Everything is
counted in forwards of the target over one token, and nothing is timed here, so that a call decides as it did before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_CONFIDENCES = 10
"""Kinds of evidence of a draft model: tenths of its probability. The kinds after them are lengths of matches."""
MAX_MATCH = 8
NUM_OTHER_CONFIDENCES = 10
"""And the last ones are of other guesses beside a draft model's first: twentieths of their probability."""
FIRST_OTHER = NUM_CONFIDENCES + MAX_MATCH
FIRST_PAUSE, LONGEST_PAUSE = 8, 128  # rounds without drafts, when drafts have not paid


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCosts:
    """What drafting costs, in forwards of the target over one token.

    Args:
        draft (`float`): A forward of the drafter, >= 0; 0 for a lookup.
        verify (`float`): Every token more in a forward of the target, > 0.

    Raises:
        ValueError: If a cost is outside of its range.
    """

    draft: float = 0.0
    verify: float = 0.03

    def __post_init__(self) -> None:
        if not (0 <= self.draft < math.inf and 0 < self.verify < math.inf):
            raise ValueError(f"Costs must be finite, with `draft` >= 0 and `verify` > 0, but they are {self}.")


class Chance:
    """A share of successes that forgets slowly, and begins as a guess."""

    def __init__(self, guess: float, weight: float = 4.0, memory: float = 64.0):
        self._successes, self._trials = guess * weight, weight
        self._keep = 1 - 1 / memory

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self._successes / self._trials

    def record(self, is_success: bool) -> None:
        """Adds a trial."""
        self._successes = self._successes * self._keep + is_success
        self._trials = self._trials * self._keep + 1


class DraftLength:
    """Decides, token by token, whether one more draft pays.

    When no first draft pays, speculation pauses, and is tried again after ever longer pauses.

    Args:
        costs ([`DraftCosts`]): Of the drafter at hand.
        is_adaptive (`bool`, defaults to `True`): `False` finds every draft worth it.

    Example:

        >>> length = DraftLength(DraftCosts(draft=0.2, verify=0.02))
        >>> length.starts()
        True
        >>> for _ in range(20):
        ...     length.record([9, 9], path=[])
        >>> length.starts()
        False
    """

    def __init__(self, costs: DraftCosts, is_adaptive: bool = True):
        self.costs = costs
        self.is_adaptive = is_adaptive
        self.num_paused = 0
        self._first = Chance(0.5)
        self._next = Chance(0.6)
        self._chances = [Chance((kind + 0.5) / NUM_CONFIDENCES) for kind in range(NUM_CONFIDENCES)]
        self._chances += [Chance(0.3 + 0.6 * size / MAX_MATCH) for size in range(1, MAX_MATCH + 1)]
        others = [Chance((kind + 0.5) / 2 / NUM_OTHER_CONFIDENCES) for kind in range(NUM_OTHER_CONFIDENCES)]
        self._chances += others
        self._tokens_per_round = 1.5
        self._pause = self._left = FIRST_PAUSE

    def starts(self) -> bool:
        """Whether this round drafts at all."""
        if not self.is_adaptive or self._worth(self._first.value) > self.costs.draft + self.costs.verify:
            self._pause = self._left = FIRST_PAUSE
            return True
        if self._left > 0:
            self._left -= 1
            self.num_paused += 1
            return False
        # a try now and then: the text may have become easier
        self._pause = self._left = min(2 * self._pause, LONGEST_PAUSE)
        return True

    def chance(self, kind: int) -> float:
        """How likely a draft with this evidence is accepted, given that those before it are."""
        return self._chances[kind].value

    def num_worthwhile(self, kinds: Sequence[int]) -> int:
        """How many drafts are worth verifying, given the evidence for each of them."""
        if not self.is_adaptive:
            return len(kinds)
        reach, num = 1.0, 0
        for kind in kinds:
            reach *= self.chance(kind)
            if not self.verifies(reach):
                break
            num += 1
        return num

    def verifies(self, reach: float) -> bool:
        """Whether a draft that is there, and is accepted with this chance, is worth verifying."""
        return not self.is_adaptive or self._worth(reach) > self.costs.verify

    def drafts_more(self, reach: float) -> bool:
        """Whether another draft is worth making after one that is accepted with this chance."""
        return not self.is_adaptive or self._worth(reach * self._next.value) > self.costs.draft + self.costs.verify

    def plan(self, most: int) -> int:
        """How many drafts are worth making if no evidence can be looked at on the way, from 1 to `most` >= 1."""
        if not self.is_adaptive:
            return most
        num, reach = 1, self._first.value
        while num < most and self.drafts_more(reach):
            num, reach = num + 1, reach * self._next.value
        return num

    def gain(self, kinds: Sequence[int] | None = None, most: int = 0) -> float:
        """What a round saves, in forwards of the target: with these drafts, or with `most` that are yet to be made."""
        if kinds is None:
            chances = [self._first.value, *[self._next.value] * (most - 1)][:most]
        else:
            chances = [self.chance(kind) for kind in kinds]
        reach, gain, cost = 1.0, 0.0, self.costs.verify + (self.costs.draft if kinds is None else 0.0)
        for chance in chances:
            reach *= chance
            gain += max(self._worth(reach) - cost, 0.0)
        return gain

    def record(self, kinds: Sequence[int], path: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Learns from a round of one row.

        Args:
            kinds (`Sequence[int]`): The evidence of each draft that was verified.
            path (`Sequence[int]`): Which of them were accepted.
            parents (`Sequence[int]`, *optional*): Of a tree of drafts. Default: a chain.
        """
        for draft, kind in enumerate(kinds):
            parent = draft - 1 if parents is None else parents[draft]
            # what continues a rejected draft continues another text: nothing is learned from it
            if parent >= 0 and parent not in path:
                continue
            self._chances[kind].record(draft in path)
            if kind < FIRST_OTHER:
                (self._next if parent >= 0 else self._first).record(draft in path)
        self._tokens_per_round += (1 + len(path) - self._tokens_per_round) / 16

    def _worth(self, chance: float) -> float:
        """What a token saved with this chance would have cost."""
        num_drafts = max(self._tokens_per_round - 1, 0.0)
        cost = 1 + num_drafts * (self.costs.draft + self.costs.verify)
        return chance * cost / self._tokens_per_round


def confidence_kind(probability: float) -> int:
    """The evidence of a draft model that gives its token this probability; the least, if that is no number.

    Example:

        >>> confidence_kind(0.37), confidence_kind(1.0), confidence_kind(float("nan"))
        (3, 9, 0)
    """
    return _part(probability, NUM_CONFIDENCES)


def match_kind(num_tokens: int) -> int:
    """The evidence of a lookup that matched so many tokens, >= 1."""
    return NUM_CONFIDENCES - 1 + min(num_tokens, MAX_MATCH)


def other_kind(probability: float) -> int:
    """The evidence of another guess, beside the first one, that has this probability.

    Example:

        >>> other_kind(0.0), other_kind(0.12), other_kind(0.5)
        (18, 20, 27)
    """
    return FIRST_OTHER + _part(2 * probability, NUM_OTHER_CONFIDENCES)


def _part(share: float, num: int) -> int:
    """Which of `num` equal parts of [0, 1] a share lies in."""
    return min(int(share * num), num - 1) if share > 0 else 0
