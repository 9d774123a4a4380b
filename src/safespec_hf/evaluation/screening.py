"""What a guard model lets through of the answers of the target alone, and what that costs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from ..config import DEFAULT_REFUSAL
from .engine import Engine, Reply
from .judges import Judge


def screen(
    engine: Engine,
    undefended: Sequence[Reply],
    requests: Sequence[str],
    guard: Judge,
    *,
    threshold: float,
    every: int | None = None,
) -> list[Reply]:
    """The target's own answers as a guard model lets them through.

    Args:
        engine ([`Engine`]): For its tokenizer.
        undefended (`Sequence[Reply]`): The target's own answers.
        requests (`Sequence[str]`): What is really wanted in each.
        guard ([`Judge`]): Who reads them.
        threshold (`float`): At or above it an answer is stopped.
        every (`int`, *optional*): Tokens after which it reads what there is. Default: finished answers only.

    Returns:
        `list[Reply]`: Refusals, where the guard stopped an answer. Seconds are the target's up to the verdict, and the
        guard's share of every reading.
    """
    longest = max((len(reply.tokens) for reply in undefended), default=0)
    every = every or max(longest, 1)
    stopped_at: dict[int, int] = {}
    guard_seconds = [0.0] * len(undefended)
    for num_read in range(1, max(1, math.ceil(longest / every)) + 1):
        # an answer is read at its end as well, and then no more
        alive = [
            index
            for index, reply in enumerate(undefended)
            if index not in stopped_at and (num_read - 1) * every < max(len(reply.tokens), 1)
        ]
        prefixes = [_prefix(engine, undefended[index], num_read * every) for index in alive]
        asked = [requests[index] for index in alive]
        start = time.perf_counter()
        verdicts = guard.judge(asked, prefixes)
        seconds = time.perf_counter() - start
        for index, risk in zip(alive, verdicts, strict=True):
            guard_seconds[index] += seconds / len(alive)
            if risk >= threshold:
                stopped_at[index] = min(num_read * every, len(undefended[index].tokens))
    return [
        _reply(engine, reply, stopped_at.get(index), guard_seconds[index]) for index, reply in enumerate(undefended)
    ]


def _prefix(engine: Engine, reply: Reply, num_tokens: int) -> str:
    if num_tokens >= len(reply.tokens):
        return reply.text
    return str(engine.tokenizer.decode(reply.tokens[:num_tokens], skip_special_tokens=True))


def _reply(engine: Engine, reply: Reply, stopped_at: int | None, guard_seconds: float) -> Reply:
    if stopped_at is None:
        seconds = reply.seconds + guard_seconds
        return Reply(
            text=reply.text,
            tokens=reply.tokens,
            finish_reason=reply.finish_reason,
            seconds=seconds,
            guard_seconds=guard_seconds,
        )
    share = stopped_at / max(len(reply.tokens), 1)
    return Reply(
        text=DEFAULT_REFUSAL,
        tokens=engine.tokenizer(DEFAULT_REFUSAL, add_special_tokens=False)["input_ids"],
        finish_reason="safety_refusal",
        seconds=reply.seconds * share + guard_seconds,
        guard_seconds=guard_seconds,
    )
