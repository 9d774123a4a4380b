"""How many tokens to draft, so that a token costs the least time. Pure: no model, no cache, no clock.

A draft is worth its cost as long as the chance that it will be accepted, times what a token costs on average, is more
than it costs to draft it and to verify it. Chances are learned while decoding, one for each kind of evidence that a
drafter has: how sure a draft model is of a token, or how much of the context a lookup has matched. Everything is
counted in plain steps: forwards of the target that read one token of each row. Nothing is timed here, so that a call
decides as it did before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

NUM_CONFIDENCES = 10
"""Kinds of evidence of a draft model: tenths of its probability. The kinds after them are lengths of matches."""
MAX_MATCH = 8
NUM_OTHER_CONFIDENCES = 10
"""And the last ones are of other guesses beside a draft model's first: twentieths of their probability."""
FIRST_OTHER = NUM_CONFIDENCES + MAX_MATCH
FIRST_PAUSE, LONGEST_PAUSE = 8, 128  # rounds without drafts, when drafts have not paid
FAR = 16  # drafts to look ahead: several may pay together where the first of them does not


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCosts:
    """What drafting costs, in plain steps: forwards of the target over one token of each row.

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

    def block(self, num_tokens: int) -> float:
        """A forward of the target over so many tokens of each row, >= 1."""
        return 1 + self.verify * (num_tokens - 1)

    def of_rows(self, num_rows: int) -> DraftCosts:
        """The costs where there are so many rows."""
        return self


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


class Pace:
    """What a token has cost lately, whoever drafted it: the drafters of a call share it.

    Args:
        costs ([`DraftCosts`]): For the rows that there are now.
    """

    def __init__(self, costs: DraftCosts):
        self.costs = costs
        self._tokens, self._cost, self._keep = 6.0, 4.8, 1 - 1 / 16

    @property
    def token_cost(self) -> float:
        """In plain steps, at most 1: what a plain step writes costs that."""
        return min(self._cost / self._tokens, 1.0)

    def record(self, num_tokens: float, cost: float) -> None:
        """Adds a round: tokens of a row on average, and what the round cost."""
        self._tokens = self._tokens * self._keep + num_tokens
        self._cost = self._cost * self._keep + cost


class DraftLength:
    """Decides, token by token, whether one more draft pays.

    When no first draft pays, speculation pauses, and is tried again after ever longer pauses.

    Args:
        costs ([`DraftCosts`] or [`Pace`]): Of the drafter at hand, or the pace that it shares with others.
        is_adaptive (`bool`, defaults to `True`): `False` finds every draft worth it.
        is_free (`bool`, defaults to `False`): Drafts take no forwards: they are those of a lookup.

    Example:

        >>> length = DraftLength(DraftCosts(draft=0.2, verify=0.02))
        >>> length.starts()
        True
        >>> for _ in range(20):
        ...     length.note([9, 9])
        ...     length.record([9, 9], path=[])
        >>> length.starts()
        False
    """

    def __init__(self, costs: DraftCosts | Pace, is_adaptive: bool = True, is_free: bool = False):
        self.pace = costs if isinstance(costs, Pace) else Pace(costs)
        self.is_adaptive = is_adaptive
        self.is_free = is_free
        self.num_paused = 0
        self._first = Chance(0.5)
        self._next = Chance(0.6)
        self._chances = [Chance((kind + 0.5) / NUM_CONFIDENCES) for kind in range(NUM_CONFIDENCES)]
        self._chances += [Chance(0.3 + 0.6 * size / MAX_MATCH) for size in range(1, MAX_MATCH + 1)]
        others = [Chance((kind + 0.5) / 2 / NUM_OTHER_CONFIDENCES) for kind in range(NUM_OTHER_CONFIDENCES)]
        self._chances += others
        # how often a draft model is how sure: of the first draft of a round, and of others
        self._shares = [[0.2] * NUM_CONFIDENCES, [0.2] * NUM_CONFIDENCES]
        self._pause = self._left = FIRST_PAUSE

    def starts(self) -> bool:
        """Whether this round drafts at all."""
        if not self.is_adaptive or self._looks_promising(0, 1.0):
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

    def num_worthwhile(self, *kinds_of_rows: Sequence[int]) -> int:
        """How many drafts of each row are worth verifying, given the evidence for each of them.

        All rows are read as wide as the widest. What is decided of a draft depends on the evidence for it and for
        those before, not for those after it: that tells which token it is, and what is kept must not depend on that.
        """
        most = max(map(len, kinds_of_rows), default=0)
        if not self.is_adaptive:
            return most
        reach = [1.0 for _ in kinds_of_rows]
        for num in range(most):
            pairs = zip(reach, kinds_of_rows, strict=True)
            reach = [before * self.chance(kinds[num]) if num < len(kinds) else 0.0 for before, kinds in pairs]
            mean = sum(reach) / len(reach)
            gain = self._worth(mean) - self._step(num)
            if gain <= 0 and gain + self._ahead(num + 1, mean) <= 0:
                return num
        return most

    def verifies(self, reach: float, num_before: int) -> bool:
        """Whether a draft that is accepted with this chance is worth verifying beside so many others."""
        return not self.is_adaptive or self._worth(reach) > self._step(num_before)

    def drafts_more(self, reach: float, num_before: int) -> bool:
        """Whether to make another draft after so many, >= 1, of which the last is accepted with this chance."""
        return not self.is_adaptive or self._looks_promising(num_before, reach)

    def plan(self, most: int) -> int:
        """How many drafts are worth making if no evidence can be looked at on the way, from 1 to `most` >= 1."""
        if not self.is_adaptive:
            return most
        num, reach = 1, self._first.value
        while num < most and self._ahead(num, reach) > 0:
            num, reach = num + 1, reach * self._next.value
        return num

    def num_worth_making(self, most: int) -> int:
        """How many drafts are worth making and verifying, if no evidence can be looked at: `plan`, or none."""
        if self.is_adaptive and self.gain(most=most) == 0:
            return 0
        return self.plan(most) if most > 0 else 0

    def num_worth_verifying(self, most: int) -> int:
        """How many of `most` drafts that are there already are worth verifying, if nothing is known of them."""
        if not self.is_adaptive:
            return most
        first, following = self._first.value, self._next.value
        return self.best_size([first * following**index for index in range(most)])

    def gain(self, kinds: Sequence[int] | None = None, most: int = 0) -> float:
        """What a round saves, in plain steps: with these drafts, or with at most `most` that are yet to be made."""
        if kinds is None:
            return max([0.0, *self._gains(0, 1.0, most)])
        return max(self._totals(list(accumulate(map(self.chance, kinds), mul))))

    def best_size(self, reach: Sequence[float]) -> int:
        """Of drafts with these chances, falling, how many are worth verifying in a forward of one row.

        For greedy decoding: it looks at all of them, see `num_worthwhile`.
        """
        totals = self._totals(reach)
        return totals.index(max(totals))

    def gain_of_one(self, reach: float, num_before: int) -> float:
        """What another draft, after one that is accepted with this chance, is likely to gain beside so many others."""
        return self._worth(reach * self._next.value) - self._step(num_before)

    def note(self, kinds: Sequence[int], is_first: bool = True) -> None:
        """Learns how sure a draft model was of drafts that follow one another, whether they are verified or not."""
        for index, kind in enumerate(kinds, start=not is_first):
            shares = self._shares[min(index, 1)]
            shares[:] = [share * 0.98 for share in shares]
            shares[kind] += 1.0

    def record(self, kinds: Sequence[int], path: Sequence[int], parents: Sequence[int] | None = None) -> None:
        """Learns from a round of one row; what another drafter drafted is left to that.

        Args:
            kinds (`Sequence[int]`): The evidence of each draft that was verified.
            path (`Sequence[int]`): Which of them were accepted.
            parents (`Sequence[int]`, *optional*): Of a tree of drafts. Default: a chain.
        """
        for draft, kind in enumerate(kinds):
            if self.is_free is not (NUM_CONFIDENCES <= kind < FIRST_OTHER):
                continue
            parent = draft - 1 if parents is None else parents[draft]
            # what continues a rejected draft continues another text: nothing is learned from it
            if parent >= 0 and parent not in path:
                continue
            self._chances[kind].record(draft in path)
            if kind < FIRST_OTHER:
                (self._next if parent >= 0 else self._first).record(draft in path)

    def _totals(self, reach: Sequence[float]) -> list[float]:
        """What no draft, one, two, ... of those with these chances gain."""
        return [0.0, *accumulate(self._worth(chance) - self._step(num) for num, chance in enumerate(reach))]

    def _looks_promising(self, num: int, reach: float) -> bool:
        """Whether drafts after `num` ones gain something on average, if they are dropped where they look bad."""
        if self.is_free:
            return self._ahead(num, reach) > 0
        shares, expected = self._shares[min(num, 1)], 0.0
        for kind, share in enumerate(shares):
            after = reach * self.chance(kind)
            gain = self._worth(after) - self._step(num)
            # some that don't pay by themselves do with those after them
            expected += share * max(gain, gain + self._ahead(num + 1, after), 0.0)
        return expected > self.pace.costs.draft * sum(shares)

    def _ahead(self, num: int, reach: float) -> float:
        """What drafts after `num` ones are likely to gain at best; negative if none does."""
        return max(self._gains(num, reach, FAR))

    def _gains(self, num: int, reach: float, most: int) -> list[float]:
        """What one, two, ... drafts after `num` ones are likely to gain, if nothing is known of them."""
        gains, gain = [], 0.0
        for index in range(num, num + most):
            reach *= (self._next if index else self._first).value
            gain += self._worth(reach) - self._step(index) - (0.0 if self.is_free else self.pace.costs.draft)
            gains.append(gain)
        return gains

    def _step(self, num_before: int) -> float:
        """What verifying a draft costs beside so many others."""
        return self.pace.costs.block(num_before + 2) - self.pace.costs.block(num_before + 1)

    def _worth(self, chance: float) -> float:
        """What a token saved with this chance would have cost."""
        return chance * self.pace.token_cost


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
