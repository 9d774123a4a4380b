"""What a benchmark holds against its bars."""

from __future__ import annotations

import math
from typing import NamedTuple


class Figure(NamedTuple):
    """What was measured of one monitor, and what it has to be, if anything."""

    name: str
    measured: float | None
    is_at_least: bool = True
    limit: float | None = None

    @property
    def passes(self) -> bool:
        """Whether it holds: 12 of 80 are .15, whatever a mean of two shares of them rounds to."""
        if self.limit is None or self.measured is None:
            return self.limit is None
        is_beyond = self.measured >= self.limit if self.is_at_least else self.measured <= self.limit
        return is_beyond or math.isclose(self.measured, self.limit, rel_tol=1e-9, abs_tol=1e-9)
