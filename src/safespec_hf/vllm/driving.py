"""Drives guarded answers through an engine that answers in its own time. Pure asyncio: knows no vLLM.

What is not final stays in here. Whatever ends a loop early, a disconnect or an error, ends the engine's work on the
answer, too, and frees what its workers keep.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Generic, NamedTuple, Protocol, TypeVar

from .request import GuardedRequest
from .rounds import Submission
from .spec import RiskRecord

T = TypeVar("T")
logger = logging.getLogger(__name__)


class New(NamedTuple):
    """What came of a submission since the last time.

    Attributes:
        tokens (`list[int]`): New ones.
        log_probs (`list[float]`, *optional*): Theirs, where they were asked for.
    """

    tokens: list[int]
    log_probs: list[float] | None = None


class Engine(Protocol):
    """What an engine has to do for answers."""

    def submit(self, submission: Submission) -> AsyncGenerator[New, None]:
        """Runs a submission. Closing this early aborts it."""

    async def take(self, keys: Sequence[str]) -> dict[str, RiskRecord]:
        """What the workers know of submissions; what they don't, or can't tell, is missing."""

    def release(self, key: str) -> None:
        """Has the workers drop all that they keep for an answer. Must not wait: the caller may be cancelled."""


class Batcher(Generic[T]):
    """Makes calls together that come while another one is under way.

    Args:
        call: Takes keys of any number of callers, and answers all of them at once.

    Example:

        >>> async def call(keys):
        ...     await asyncio.sleep(0)
        ...     return keys
        >>> async def main():
        ...     batcher = Batcher(call)
        ...     return await asyncio.gather(*(batcher.ask([key]) for key in "abc"))
        >>> asyncio.run(main())
        [['a', 'b', 'c'], ['a', 'b', 'c'], ['a', 'b', 'c']]
    """

    def __init__(self, call: Callable[[list[str]], Awaitable[T]]):
        self._call = call
        self._waiting: list[str] = []
        self._current: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def ask(self, keys: Sequence[str]) -> T:
        """What the call with these keys, and perhaps others, gives."""
        return await asyncio.shield(self.tell(keys))  # others wait for it, too, when this caller is cancelled

    def tell(self, keys: Sequence[str]) -> asyncio.Task[T]:
        """The same, without waiting for it."""
        self._waiting += keys
        if self._next is None:
            self._next = asyncio.create_task(self._run(self._current))
            self._next.add_done_callback(_look_at)
        return self._next

    async def _run(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait([before])
        self._current, self._next = self._next, None
        keys, self._waiting = self._waiting, []
        return await self._call(keys)


async def drive(answer: GuardedRequest, engine: Engine) -> AsyncGenerator[list[int], None]:
    """Runs one answer to its end.

    Args:
        answer ([`GuardedRequest`]): A new one. It is finished when this ends by itself.
        engine ([`Engine`]): Whoever runs what the answer submits.

    Yields:
        `list[int]`: Tokens that nothing can take back any more.

    Raises:
        Exception: Whatever the engine raises; nothing that is not final has been given by then.
    """
    try:
        submissions = answer.begin()
        while submissions:
            async with aclosing(_run_round(answer, engine, submissions)) as final:
                async for tokens in final:
                    yield tokens
            submissions = answer.advance(await engine.take([submission.key for submission in submissions]))
            if tokens := answer.take_final():
                yield tokens
    finally:
        engine.release(answer.key)


async def _run_round(
    answer: GuardedRequest, engine: Engine, submissions: Sequence[Submission]
) -> AsyncGenerator[list[int], None]:
    """Runs the submissions of a round until all have ended."""
    if len(submissions) > 1:  # candidates of a recovery: none of them is final
        await _run_all([_exhaust(_feed(answer, engine, submission)) for submission in submissions])
        return
    async with aclosing(_feed(answer, engine, submissions[0])) as rounds:
        async for _ in rounds:
            if tokens := answer.take_final():
                yield tokens


async def _feed(answer: GuardedRequest, engine: Engine, submission: Submission) -> AsyncGenerator[None, None]:
    """Feeds an answer with what comes of one submission."""
    async with aclosing(engine.submit(submission)) as outputs:
        async for new in outputs:
            if answer.feed(submission.key, new.tokens, new.log_probs):
                return
            yield


async def _exhaust(steps: AsyncGenerator[None, None]) -> None:
    async with aclosing(steps):
        async for _ in steps:
            pass


async def _run_all(parts: Sequence[Awaitable[None]]) -> None:
    """Runs all at once; if one of them fails, or this is cancelled, the others end as well."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_look_at)


def _look_at(task: asyncio.Future[T]) -> None:
    """So that asyncio does not complain of an error that nobody waits for any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.debug("A call of the engine failed: %s", error)
