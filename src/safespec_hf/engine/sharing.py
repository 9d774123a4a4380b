"""What is put onto a model while calls run, where several threads may run calls of the same model.

Two rules keep calls, and all other uses of the model, out of each other's way. What is put on stays until the last
call that needs it has ended. And it asks in which thread it runs: it does something only inside of such a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class ThreadSwitch(threading.local):
    """Whether the current thread is inside of a call that wants something; of nested calls the innermost says.

    Example:

        >>> switch = ThreadSwitch()
        >>> with switch.turned(True):
        ...     switch.is_on
        True
        >>> switch.is_on
        False
    """

    is_on = False

    @contextmanager
    def turned(self, is_on: bool) -> Iterator[None]:
        """Turns it for a time."""
        before, self.is_on = self.is_on, is_on
        try:
            yield
        finally:
            self.is_on = before


@dataclass(slots=True)
class _Held:
    num_calls: int
    take_off: Callable[[], object]


class Shared:
    """Things that are put on by the first call that needs them, and taken off after the last.

    Example:

        >>> shared, log = Shared(), []
        >>> def put_on():
        ...     log.append("on")
        ...     return lambda: log.append("off")
        >>> with shared.held({"it": put_on}), shared.held({"it": put_on}):
        ...     log.append("in use")
        >>> log
        ['on', 'in use', 'off']
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[Hashable, _Held] = {}

    @contextmanager
    def held(self, things: dict[Hashable, Callable[[], Callable[[], object]]]) -> Iterator[None]:
        """Holds things for the time of a call.

        Args:
            things (`dict[Hashable, Callable]`): What puts each of them on, and returns what takes it off.
        """
        mine: list[Hashable] = []
        try:
            for key, put_on in things.items():
                with self._lock:
                    held = self._held.get(key)
                    if held is None:
                        held = self._held[key] = _Held(0, put_on())
                    held.num_calls += 1
                    mine.append(key)
            yield
        finally:
            for key in mine:
                self._let_go(key)

    def _let_go(self, key: Hashable) -> None:
        with self._lock:
            held = self._held[key]
            held.num_calls -= 1
            if held.num_calls == 0:
                del self._held[key]
                held.take_off()
