"""What a client of the server may ask for: a list of what is honoured; all else is refused by its name.

Refused are parameters that could weaken the guard, show what it took back, or ban the token by which a flag stops an
answer. A new version of vLLM may bring new ones: what is not on the list is refused as well. Pure: knows no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..config import SafeSpecConfig
from ..errors import SafeSpecError, UnsupportedRequestError

EXTENSION = "safespec"
"""The field by which a client asks for more caution, and in which an answer tells what was done."""

# fmt: off
HONOURED = frozenset({
    "model", "max_tokens", "n", "stream", "stream_options", "stream_interval", "temperature", "top_p", "top_k",
    "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens",
    "spaces_between_special_tokens", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias",
    "user", "request_id", "session_id", "priority", "cache_salt", "add_special_tokens", "truncate_prompt_tokens",
    "truncation_side", "return_token_ids", "return_tokens_as_token_ids", "prompt", "messages",
    "max_completion_tokens", "add_generation_prompt", "continue_final_message", "documents", "chat_template",
    "chat_template_kwargs", "reasoning_effort", "include_reasoning", "parallel_tool_calls", "store", "metadata",
    "service_tier", "safety_identifier", "prompt_cache_key",
})
# fmt: on
"""Parameters of completions and chats that are passed on, or that say nothing about an answer."""

WHY_NOT: dict[str, str] = {
    **dict.fromkeys(
        ("min_tokens", "allowed_token_ids", "bad_words", "thinking_token_budget"),
        "it could ban the token by which a flag stops an answer",
    ),
    **dict.fromkeys(
        ("structured_outputs", "response_format", "tools", "tool_choice", "functions", "function_call"),
        "a grammar bans the token by which a flag stops an answer, and a refusal would not follow it",
    ),
    **dict.fromkeys(
        ("vllm_xargs", "kv_transfer_params", "ec_transfer_params"), "it reaches into the engine, past the guard"
    ),
    **dict.fromkeys(("use_beam_search", "best_of"), "beams are not guarded"),
    **dict.fromkeys(
        ("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids"),
        "the likeliest tokens of a place could be those that were taken back there",
    ),
    "ignore_eos": "the text after an end would be read as another one's",
    **dict.fromkeys(("prompt_embeds", "mm_processor_kwargs", "media_io_kwargs"), "only prompts of text are guarded"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("none",),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "length_penalty": (1.0,),
    "best_of": (1,),
    "mm_payload": ("tensors",),
}
"""Values that ask for nothing, beside `None`, zero and what is empty."""


def check_parameters(given: Mapping[str, Any], risk_threshold: float) -> float:
    """Refuses what can't be honoured, by name.

    Args:
        given (`Mapping[str, Any]`): Fields that the client set, with their values.
        risk_threshold (`float`): The server's, in (0, 1].

    Returns:
        `float`: The threshold of this call: the server's, or a lower one that the client asked for.

    Raises:
        UnsupportedRequestError: Names the first field that is refused, says why, and what would be legal.

    Example:

        >>> check_parameters({"max_tokens": 8, "min_tokens": 0}, 0.5)
        0.5
        >>> check_parameters({"safespec": {"risk_threshold": 0.2}}, 0.5)
        0.2
        >>> check_parameters({"vllm_xargs": {"threshold": "1"}}, 0.5)
        Traceback (most recent call last):
        ...
        safespec_hf.errors.UnsupportedRequestError: `vllm_xargs` is refused: it reaches into the engine, past the ...
    """
    for name, value in given.items():
        if name not in HONOURED and name != EXTENSION and not _asks_for_nothing(name, value):
            why = WHY_NOT.get(name, "it is not known to keep an answer guarded")
            raise UnsupportedRequestError(f"`{name}` is refused: {why}. Send the request without it.")
    return _stricter(given.get(EXTENSION), risk_threshold)


def _asks_for_nothing(name: str, value: Any) -> bool:
    is_empty = value is None or value is False or value == 0 or (isinstance(value, (str, list, dict)) and not value)
    return is_empty or value in NEUTRAL.get(name, ())


def _stricter(asked: Any, risk_threshold: float) -> float:
    """The threshold that a client asked for, if that is no higher than the server's."""
    if asked is None:
        return risk_threshold
    if not isinstance(asked, Mapping) or set(asked) - {"risk_threshold"}:
        raise UnsupportedRequestError(
            f'`{EXTENSION}` must be an object such as {{"risk_threshold": {risk_threshold / 2:.3g}}}, with no other '
            f"field, but it is {_named(asked)}. The policy is the server's."
        )
    value = asked.get("risk_threshold", risk_threshold)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= risk_threshold:
        raise UnsupportedRequestError(
            f"`{EXTENSION}.risk_threshold` must be a number in (0, {risk_threshold:.6g}], but it is {value!r}: "
            "a client can ask for more caution than the server's, not for less."
        )
    return float(value)


def _named(asked: Any) -> str:
    names: Iterable[str] = map(str, asked) if isinstance(asked, Mapping) else ()
    return f"one with {', '.join(names)}" if names and asked else f"a {type(asked).__name__}"


def read_policy(policy: Mapping[str, Any]) -> SafeSpecConfig:
    """The policy of a server, which has to guard.

    Raises:
        SafeSpecError: If a field is unknown or out of range, or nothing would be guarded.
    """
    try:
        config = SafeSpecConfig.from_dict(policy)
    except (TypeError, ValueError) as error:
        raise SafeSpecError(f"The policy is not one: {error}") from error
    if config.policy == "observe":
        raise UnsupportedRequestError("A server guards: `policy='observe'` would let through what it flags.")
    return config
