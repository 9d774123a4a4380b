"""What a benchmark holds against its bars."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """What was measured of one monitor, and what it has to be, if anything."""

    name: str
    measured: float | None
    is_at_least: bool = True
    limit: float | None = None

    @property
    def passes(self) -> bool:
        """Whether it holds."""
        if self.limit is None or self.measured is None:
            return self.limit is None
        return self.measured >= self.limit if self.is_at_least else self.measured <= self.limit
