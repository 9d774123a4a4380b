"""How an answer is sampled by the engine, and which of its parameters a guarded answer can have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UnsupportedRequestError

TAKEN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)
"""Parameters that are handed on as they are."""

REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("n", (None, 1), "one answer per prompt; give the prompt several times"),
    ("min_tokens", (None, 0), "0: it bans the token that stops what was flagged"),
    ("structured_outputs", (None,), "no grammar: it bans the token that stops what was flagged"),
    ("allowed_token_ids", (None,), "all tokens: a list of them bans the one that stops what was flagged"),
    ("bad_words", (None, [], ()), "none"),
    ("logprobs", (None,), "none: they would show what was flagged"),
    ("prompt_logprobs", (None,), "none"),
    ("logprob_token_ids", (None, []), "none"),
    ("thinking_token_budget", (None,), "none: it puts tokens of its own"),
    ("repetition_detection", (None,), "none"),
    ("watermarking", (None, False), "none"),
)
"""Parameters under which nothing can be promised: their names, the values that mean nothing, and what to use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one answer is sampled.

    Args:
        max_tokens (`int`, *optional*): Of the answer. Default: what fits into the context.
        seed (`int`, *optional*): Of sampled answers.
        stop (`tuple[str, ...]`): Texts that end the answer.
        stop_token_ids (`tuple[int, ...]`): Tokens that do, besides the model's own.
        include_stop_str_in_output (`bool`, defaults to `False`): Keep the text that ended it.
        skip_special_tokens (`bool`, defaults to `True`): In the text.
        arguments (`dict`): All others, as the engine names them: see `TAKEN`.

    Example:

        >>> Sampling.from_params({"temperature": 0.0, "max_tokens": 8}).is_greedy
        True
    """

    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return float(self.arguments.get("temperature", 1.0)) < 1e-5

    @classmethod
    def from_params(cls, params: object, reserved_id: int | None = None) -> Sampling:
        """Reads the engine's own parameters.

        Args:
            params (`vllm.SamplingParams` or `dict`): Theirs; names that are not there have their defaults.
            reserved_id (`int`, *optional*): The token that stops what was flagged: no bias may touch it.

        Raises:
            UnsupportedRequestError: Names a parameter that a guarded answer can't have.
        """

        def value(name: str, default: Any = None) -> Any:
            found = params.get(name) if isinstance(params, Mapping) else getattr(params, name, None)
            return default if found is None else found

        for name, neutral, instead in REFUSED:
            if value(name) not in neutral:
                raise UnsupportedRequestError(
                    f"Guarded decoding in vLLM does not support {name}={value(name)!r}. Use {instead}."
                )
        if reserved_id is not None and str(reserved_id) in map(str, value("logit_bias", {})):
            raise UnsupportedRequestError(f"`logit_bias` may not touch token {reserved_id}, which the guard needs.")
        stop = value("stop", ())
        return cls(
            max_tokens=value("max_tokens"),
            seed=value("seed"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(value("stop_token_ids", ())),
            include_stop_str_in_output=bool(value("include_stop_str_in_output", False)),
            skip_special_tokens=bool(value("skip_special_tokens", True)),
            arguments={name: value(name) for name in TAKEN if value(name) is not None},
        )
