"""How an answer is sampled by the engine, and which of its parameters a guarded answer can have. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import BoolTensor, LongTensor
from transformers import PreTrainedTokenizerBase

from ..decoding.stopping import RowCriterion
from ..errors import UnsupportedRequestError

LEAST_PENALTY, MOST_PENALTY, MOST_BIAS = 0.01, 100.0, 100.0
"""Numbers far beyond are zero or infinite to samplers: then a token that was banned has no score, and may be drawn."""

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
    ("ignore_eos", (None, False), "False: the text after an end would be read as another answer's"),
    ("extra_args", (None, {}), "none: they reach into the engine, past the guard"),
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

READ = ("max_tokens", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens")
HARMLESS = (
    "detokenize",
    "output_kind",
    "stream_interval",
    "spaces_between_special_tokens",
    "skip_clone",
    "skip_reading_prefix_cache",
    "output_text_buffer_length",
)
"""How outputs are handed over, or what other parameters come to."""


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
        if unknown := _unknown(params):
            raise UnsupportedRequestError(
                f"Guarded decoding in vLLM does not know the sampling parameter {unknown[0]!r}. Leave it out."
            )
        _check_scores(value("repetition_penalty", 1.0), value("logit_bias", {}), reserved_id)
        stop = value("stop", ())
        return cls(
            max_tokens=value("max_tokens"),
            seed=None if value("seed") == -1 else value("seed"),  # as the engine reads it
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(value("stop_token_ids", ())),
            include_stop_str_in_output=bool(value("include_stop_str_in_output", False)),
            skip_special_tokens=bool(value("skip_special_tokens", True)),
            arguments={name: value(name) for name in TAKEN if value(name) is not None},
        )


class StopTexts(RowCriterion):
    """Ends an answer with the token that completes a text, as the engine's own words for it do.

    `StopStringCriteria` of transformers looks at the whole vocabulary for each new text: half a second in which a
    server answers nobody.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        sampling ([`Sampling`]): Has the texts, none of which may be empty.
        num_prompt (`int`): Tokens of the prompt, in which nothing is looked for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, num_prompt: int):
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._num_prompt = num_prompt
        # a token may have no character of its own, as a part of one
        self._num_looked_at = 4 * max(map(len, sampling.stop)) + 4

    def __call__(self, input_ids: LongTensor, scores: Any, **kwargs: Any) -> BoolTensor:
        ends = [self._ends(row[self._num_prompt :][-self._num_looked_at :].tolist()) for row in input_ids]
        return cast("BoolTensor", torch.tensor(ends))

    def _ends(self, tokens: list[int]) -> bool:
        # a character that is not whole yet counts as the last token's
        before, text = len(self._text(tokens[:-1]).rstrip("\ufffd")), self._text(tokens)
        return any(text.find(stop, max(before - len(stop) + 1, 0)) >= 0 for stop in self._sampling.stop)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._sampling.skip_special_tokens))


def shifted_seed(seed: int, num: int) -> int:
    """Another seed, one that the engine takes: of -1 it would make none.

    Example:

        >>> shifted_seed(-2, 0), shifted_seed(-2, 1), shifted_seed(2**63 - 1, 2)
        (-2, 9223372036854775807, 1)
    """
    return (seed + num) % 2**63 if num else seed


def _unknown(params: object) -> list[str]:
    """Names that a caller gave, and that nobody here has looked at: a new version may bring such."""
    known = {*TAKEN, *READ, *HARMLESS, *(name for name, _, _ in REFUSED)}
    if isinstance(params, Mapping):
        return [str(name) for name in params if name not in known]
    names = [name for name in getattr(params, "__struct_fields__", ()) if not name.startswith("_")]
    default = type(params)() if names else None
    return [name for name in names if name not in known and getattr(params, name) != getattr(default, name)]


def _check_scores(penalty: float, bias: Mapping[int, float], reserved_id: int | None) -> None:
    if not LEAST_PENALTY <= penalty <= MOST_PENALTY:
        raise UnsupportedRequestError(
            f"`repetition_penalty` must be in [{LEAST_PENALTY:g}, {MOST_PENALTY:g}] here, but it is {penalty!r}."
        )
    for token, value in bias.items():
        if not isinstance(token, int) or not -MOST_BIAS <= value <= MOST_BIAS:
            raise UnsupportedRequestError(
                f"`logit_bias` must give token ids numbers in [{-MOST_BIAS:g}, {MOST_BIAS:g}], but {token!r} has "
                f"{value!r}."
            )
    if reserved_id in bias:
        raise UnsupportedRequestError(f"`logit_bias` may not touch token {reserved_id}, which the guard needs.")
