"""What passes between the controller of an answer and the engine's worker: orders one way, risks the other. Pure.

The engine hands a request's arguments on as text, so an order is one string of JSON, under one name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ARGUMENT = "safespec"
"""The name of the order among a request's `extra_args`, or a client's `vllm_xargs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateOrder:
    """How the worker ends a candidate, and steers where it begins.

    Attributes:
        first (`int`): Position of its first token.
        max_tokens (`int`): Longest candidate.
        min_tokens (`int`): Neither a newline nor an end token ends a shorter one.
        end_ids (`list[int]`): Tokens that end an answer.
        steer_ids (`list[int]`): First tokens of candidates that were found unsafe there.
        penalty (`float`): Taken off their logits, for the first token only; `inf` bans them.
    """

    first: int
    max_tokens: int
    min_tokens: int
    end_ids: list[int] = field(default_factory=list)
    steer_ids: list[int] = field(default_factory=list)
    penalty: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOrder:
    """What the worker has to do for one request. Positions count from the prompt's first token.

    Attributes:
        key (`str`): Of this request alone, unique as long as the engine lives.
        group (`str`): Of all requests for one answer: what they left in the worker is released together.
        secret (`str`): The engine's own: who does not know it gets nothing but the reserved token.
        start (`int`): Position of the answer's first token.
        inserted (`list[list[int]]`): Ranges `[from, to)` of inserted text, which is not scored.
        threshold (`float`, *optional*): A token is flagged unless its risk is below. `None`: risks are only observed.
        segment_limits (`list[int]`): Least tokens at which a newline ends a segment, and most tokens.
        candidate ([`CandidateOrder`], *optional*): For a candidate of a recovery.
        prompt_threshold (`float`, *optional*):
            The prompt's last token is scored as a prompt, and unless that risk is below, nothing follows it. `None`:
            it is not scored.
        breaks_loops (`bool`, defaults to `False`): Tokens that would go on with a loop are banned.
        banned (`list[list[int]]`): Positions, each with a token that may not stand there.

    Example:

        >>> order = GuardOrder(key="a-0", group="a", secret="s", start=7, threshold=0.5)
        >>> GuardOrder.from_text(order.to_text()) == order
        True
    """

    key: str
    group: str
    secret: str
    start: int
    inserted: list[list[int]] = field(default_factory=list)
    threshold: float | None
    segment_limits: list[int] = field(default_factory=lambda: [4, 32])
    candidate: CandidateOrder | None = None
    prompt_threshold: float | None = None
    breaks_loops: bool = False
    banned: list[list[int]] = field(default_factory=list)

    def to_text(self) -> str:
        """The order as the engine can carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: object) -> GuardOrder:
        """The order that [`~GuardOrder.to_text`] wrote.

        Raises:
            ValueError: If it is none.
        """
        if not isinstance(text, str):
            raise ValueError(f"An order is a text, but it is {text!r}.")
        try:
            values = json.loads(text)
            candidate = values.get("candidate")
            order = cls(**values | {"candidate": None if candidate is None else CandidateOrder(**candidate)})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"This is no order: {error}") from error
        for threshold in (order.threshold, order.prompt_threshold):
            if threshold is not None and not (isinstance(threshold, (int, float)) and 0 < threshold <= 1):
                raise ValueError(f"An order's threshold must be in (0, 1], but it is {threshold!r}.")
        return order

    def is_scored(self, position: int) -> bool:
        """Whether the token there carries a risk."""
        return position >= self.start and not any(first <= position < end for first, end in self.inserted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskRecord:
    """What the worker knows of one request.

    Attributes:
        start (`int`): Position of the first entry.
        tokens (`list[int]`): That were read there, drafts that were rejected among them; -1 where none was.
        risks (`list[float]`): After them; `nan` where there is none.
        failure (`str`, *optional*): Why the request could not be guarded, and so was stopped.
        prompt_risk (`float`, *optional*): That of the prompt, where the order asked for it; `nan` if it is unknown.
    """

    start: int
    tokens: list[int]
    risks: list[float]
    failure: str | None = None
    prompt_risk: float | None = None

    def was_read(self, position: int, token: int) -> bool:
        """Whether that very token was read there."""
        index = position - self.start
        return 0 <= index < len(self.tokens) and self.tokens[index] == token

    def risk(self, position: int, token: int) -> float:
        """The risk after a token; `nan` unless that very token was read there."""
        return self.risks[position - self.start] if self.was_read(position, token) else math.nan

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> RiskRecord:
        """Of what a worker answered."""
        return cls(**values)

    def to_plain(self) -> dict[str, Any]:
        """As it can be sent between processes."""
        return asdict(self)


LOST_STATE = "no state: the tokens before were read elsewhere, or what was known of them is gone"
"""A failure that reading the answer again mends."""
