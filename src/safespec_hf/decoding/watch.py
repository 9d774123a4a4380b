"""Notices by the clock when speculation loses, whatever was measured before, and stops it for a while."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

from transformers.utils import logging

ROUNDS, FEW_ROUNDS = 10, 4  # of speculation that are looked at together: at first, and after a pause
LOSS = 1.2  # times as long as plain steps would have taken: less is noise
NUM_PROBES = 3  # plain steps that a suspicion costs
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # rounds without drafts
logger = logging.get_logger(__name__)


class Watch:
    """Compares what rounds took with what plain steps would have taken for as many tokens.

    What plain steps take was measured, but the machine may be slower or faster by now. So a suspicion is followed by a
    few plain steps, and only if rounds with drafts lose against these, too, is there a pause.

    Args:
        predict (`Callable[[int], float]`): Seconds of a plain step of so many rows, as they were measured.

    Attributes:
        num_pauses (`int`): How often speculation was stopped.

    Example:

        >>> watch = Watch(lambda num_rows: 0.01)
        >>> for _ in range(10):
        ...     watch.record(0.05, num_tokens=2, num_rows=1, has_drafts=True)
        >>> watch.lets_draft()
        False
    """

    def __init__(self, predict: Callable[[int], float]):
        self.num_pauses = 0
        self._predict = predict
        self._slowness = 1.0
        self._rounds: deque[tuple[float, float]] = deque(maxlen=ROUNDS)
        self._probes: list[float] | None = None
        self._pause, self._left, self._needed = FIRST_PAUSE, 0, ROUNDS

    def lets_draft(self) -> bool:
        """Whether the next round may draft."""
        return self._left == 0

    def record(self, seconds: float, num_tokens: float, num_rows: int, has_drafts: bool) -> None:
        """Takes note of a round.

        Args:
            seconds (`float`): That it took, drafting included.
            num_tokens (`float`): That it gave a row on average.
            num_rows (`int`): Rows that it had.
            has_drafts (`bool`): Whether it verified any.
        """
        plain = self._predict(num_rows)
        self._left -= self._left > 0
        if not has_drafts:
            self._slowness += (seconds / plain - self._slowness) / 8
            if self._probes is not None:
                self._probe(seconds / plain)
            return
        self._rounds.append((seconds, plain * num_tokens))
        if len(self._rounds) >= self._needed:
            if self._loses():
                self._probes, self._left = [], NUM_PROBES
            else:
                self._pause, self._needed = FIRST_PAUSE, ROUNDS

    def _loses(self) -> bool:
        took, plain_would = (sum(part) for part in zip(*self._rounds, strict=True))
        return took > LOSS * self._slowness * plain_would

    def _probe(self, slowness: float) -> None:
        assert self._probes is not None
        self._probes.append(slowness)
        if len(self._probes) < NUM_PROBES:
            return
        self._slowness, self._probes = statistics.median(self._probes), None
        if self._loses():
            self._stop()
        self._rounds.clear()

    def _stop(self) -> None:
        self._left, self._pause, self._needed = self._pause, min(2 * self._pause, LONGEST_PAUSE), FEW_ROUNDS
        self.num_pauses += 1
        logger.warning_once(
            "Speculation was stopped for some rounds, because it took longer than plain decoding does here: the "
            "machine may be busy, or the draft too large or too often wrong. `SafeSpecConfig(pack_weights=True)`, a "
            "smaller draft or one that was made for this target (`safespec distill-draft`) would help; "
            "`output.statistics.num_watch_pauses` says how often it happened."
        )
