"""What can be guarded: models, drafts, and what they are given. Everything here raises before the first forward."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..answer.rows import Row
from ..engine.growing import num_columns
from ..engine.ropes import can_cross, changes_of, most_tokens
from ..engine.traits import CACHE_NAME, CACHE_NAMES, FilledCache, prepare_inputs
from ..errors import UnsupportedRequestError
from .adapters import check_adapters
from .proof import check_signature, check_sizes, prove

KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    CACHE_NAME,
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}
KNOWN_INPUTS = KNOWN_MODEL_KWARGS | {*CACHE_NAMES, "input_ids", "cache_position", "return_dict"}
WINDOW_MAKERS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")


def check_model(model: PreTrainedModel, has_states: bool = True) -> None:
    """Raises unless the model can be guarded at all, or can draft.

    Args:
        model ([`~transformers.PreTrainedModel`]): Target or draft.
        has_states (`bool`, defaults to `True`): Whether its hidden states are read as well, as a target's are.

    Raises:
        UnsupportedRequestError: For encoder-decoders, recurrent models, models without a cache or explicit positions,
            and whatever else does not give what a plain forward gives; see [`prove`].
    """
    check_kind(model)
    prove(model, has_states)


def check_kind(model: PreTrainedModel) -> None:
    """What [`check_model`] finds out without a forward.

    Raises:
        UnsupportedRequestError: For what can't be guarded, whatever its forwards give.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedRequestError(
            f"{type(model).__name__} is an encoder-decoder; guarded decoding needs a decoder-only model."
        )
    check_sizes(model)
    check_signature(model)
    check_windows(model)


def check_windows(model: PreTrainedModel) -> None:
    """Raises if a sliding window is made by dropping cached states only: here they are kept, and masks hide them.

    A few tokens can't show that, so it is the model's own code that says which masks it makes.

    Raises:
        UnsupportedRequestError: If its config has a window for which it makes no mask.
    """
    if not any(DynamicCache(config=model.config).is_sliding):
        return
    homes = [vars(sys.modules[type(module).__module__]) for module in model.modules()]
    if not any(maker in home for home in homes for maker in WINDOW_MAKERS):
        raise UnsupportedRequestError(
            f"{type(model).__name__} can't be guarded: its config has a sliding window, but its attention has no mask "
            "for it, and sees the whole text unless old states are dropped, which can't be rolled back."
        )


def check_prompt(model: PreTrainedModel, prompt_ids: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    """Raises unless a prompt can be read as guarded decoding reads it: tokens, a mask, and positions that follow.

    Raises:
        UnsupportedRequestError: Names what would be dropped.
    """
    check_model_kwargs(model_kwargs, prompt_ids)
    check_adapters(model)
    check_prepared_inputs(model, prompt_ids, model_kwargs)


def check_model_kwargs(model_kwargs: Mapping[str, Any], prompt_ids: Tensor) -> None:
    """Raises for forward arguments that guarded decoding would have to drop.

    Raises:
        UnsupportedRequestError: Names them.
    """
    unknown = sorted(
        name for name, value in model_kwargs.items() if name not in KNOWN_MODEL_KWARGS and not is_empty(value)
    )
    if unknown:
        raise UnsupportedRequestError(
            f"Guarded decoding takes token ids only, but got {unknown}. Remove them, or generate without `safespec`."
        )
    mask = model_kwargs.get("attention_mask")
    if mask is None:
        return
    if mask.shape != prompt_ids.shape:
        raise UnsupportedRequestError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(prompt_ids.shape)}, but has "
            f"{tuple(mask.shape)}. With `{CACHE_NAME}`, pass the whole sequence as `input_ids`."
        )


def is_empty(value: object) -> bool:
    """Whether an argument says nothing: transformers adds some of them, for images that a text does not have.

    Example:

        >>> is_empty({"image": None, "video": []}), is_empty([False])
        (True, False)
    """
    if isinstance(value, Tensor):
        return value.numel() == 0
    if isinstance(value, Mapping):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, (list, tuple)) and all(map(is_empty, value)))


def check_positions(position_ids: Tensor | None, is_real: Tensor) -> None:
    """Raises unless the prompt's positions are the ones that follow from its mask."""
    if position_ids is None:
        return
    expected = expected_positions(is_real)
    if position_ids.shape[-1] != is_real.shape[-1]:
        raise UnsupportedRequestError(
            f"`attention_mask` and `position_ids` must be as long as `input_ids`, {is_real.shape[-1]} tokens, but "
            f"cover {position_ids.shape[-1]}."
        )
    if not bool(((position_ids == expected) | ~is_real).all()):
        raise UnsupportedRequestError(
            "Custom `position_ids` are not supported: guarded decoding counts positions from each row's first token."
        )


def expected_positions(is_real: Tensor) -> Tensor:
    """Positions that are counted from each row's first token, as `generate` counts them."""
    return (is_real.long().cumsum(-1) - 1).clamp(min=0)


def check_prepared_inputs(model: Any, prompt_ids: Tensor, model_kwargs: Mapping[str, Any]) -> None:
    """Raises if a model would read something else than tokens, mask and positions, for the prompt or the token after.

    Raises:
        UnsupportedRequestError: Names what would be read.
    """
    refuse_changed(model, changed_inputs(model, prompt_ids, model_kwargs))


def changed_inputs(model: Any, prompt_ids: Tensor, model_kwargs: Mapping[str, Any]) -> set[str]:
    """What a model would read besides tokens, mask and positions, or in their place, for prompt or the token after.

    What it would read is what its `prepare_inputs_for_generation` says, which a soft prompt replaces, for one.
    """
    cache, num_tokens = model_kwargs.get(CACHE_NAME), prompt_ids.shape[1]
    num_cached = num_columns(cache) if isinstance(cache, DynamicCache) else 0
    prompt = dict(model_kwargs)
    inputs = prepare_inputs(
        model,
        prompt_ids,
        next_sequence_length=num_tokens - num_cached if num_cached else None,
        is_first_iteration=True,
        **prompt,
    )
    # a forward without a cache makes one
    caches = [None, cache] if num_cached == 0 else [cache]
    changed = _changed(inputs, prompt_ids[:, num_cached:], prompt, caches)
    filled = FilledCache(num_tokens)
    after = prompt | {CACHE_NAME: filled}
    for name, step in (("attention_mask", 0), ("position_ids", 1)):
        if (values := prompt.get(name)) is not None:
            after[name] = torch.cat([values, values[..., -1:] + step], dim=-1)
    longer = torch.cat([prompt_ids, prompt_ids[:, -1:]], dim=1)
    inputs = prepare_inputs(model, longer, next_sequence_length=1, **after)
    return changed | _changed(inputs, prompt_ids[:, -1:], after, [filled])


def _changed(inputs: Mapping[str, Any], ids: Tensor, model_kwargs: Mapping[str, Any], caches: list[Any]) -> set[str]:
    changed = {
        name
        for name, value in inputs.items()
        if name not in KNOWN_INPUTS and value is not False and not is_empty(value)
    }
    given = {"input_ids": ids, "attention_mask": model_kwargs.get("attention_mask")}
    if (positions := model_kwargs.get("position_ids")) is not None:
        given["position_ids"] = positions[..., -ids.shape[1] :]
    for name, expected in given.items():
        found = inputs.get(name)
        is_same = found is expected or (found is not None and expected is not None and _is_equal(found, expected))
        if not is_same and (found is not None or name == "input_ids"):
            changed.add(name)
    found_caches = [inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None]
    if not all(any(found is cache for cache in caches) for found in found_caches or [None]):
        changed.add(CACHE_NAME)
    return changed


def refuse_changed(model: PreTrainedModel, changed: Collection[str]) -> None:
    """Raises if anything was changed.

    Raises:
        UnsupportedRequestError: Names it.
    """
    if changed:
        raise UnsupportedRequestError(
            f"{type(model).__name__} does not read the tokens as they are: its `prepare_inputs_for_generation` "
            f"changes {sorted(changed)}, as soft prompts (prompt tuning, p-tuning, prefix tuning) do, and guarded "
            "decoding would drop that. Use an adapter of weights, such as LoRA, or generate without `safespec`."
        )


def _is_equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == expected.shape and bool((found == expected).all())


def max_context(
    model: PreTrainedModel, rows: Sequence[Row], num_unseen: int = 0, only_one_side_for: str | None = None
) -> int:
    """Tokens that a context may hold: all the positions there are.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        rows (`Sequence[Row]`): The batch, empty answers.
        num_unseen (`int`, defaults to 0): Places of the context that are not known as tokens; they are not counted.
        only_one_side_for (`str`, *optional*):
            What in the call rules out that its answers pass a length at which rotary frequencies change.

    Raises:
        UnsupportedRequestError: If answers could pass such a length, and may not. Names it.
    """
    most, changes = most_tokens(model), changes_of(model)
    if changes is None or (only_one_side_for is None and can_cross(model)):
        return most - num_unseen
    lengths = [len(row.prompt) + num_unseen for row in rows]
    longest = max(length + row.max_new_tokens for length, row in zip(lengths, rows, strict=True))
    for change in changes.lengths:
        is_stretched = change == changes.stretched
        if not is_stretched and min(lengths) > change:
            continue
        if longest > change:
            raise UnsupportedRequestError(
                f"The rotary positions of {type(model).__name__} change after {change} tokens, this call could reach "
                f"{longest}, and that can't be followed {only_one_side_for or 'in this model'}. Keep prompt and "
                f"`max_new_tokens` within {change} tokens{'' if is_stretched else ', or all prompts above'}, or "
                "generate without `safespec`."
            )
        most = min(most, change)
    return most - num_unseen
