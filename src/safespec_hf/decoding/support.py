"""What can be guarded: models, drafts, and what they are given. Everything here raises before the first forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..engine.traits import CACHE_NAME, check_cache_layers
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead

KNOWN_MODEL_KWARGS = {
    "attention_mask",
    "position_ids",
    CACHE_NAME,
    "use_cache",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
}


def check_model(model: PreTrainedModel) -> None:
    """Raises unless the model can be guarded at all.

    Raises:
        UnsupportedRequestError: For encoder-decoders, recurrent models and models without explicit positions.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedRequestError(
            f"{type(model).__name__} is an encoder-decoder; guarded decoding needs a decoder-only model."
        )
    check_cache_layers(model)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedRequestError(
            f"{type(model).__name__}.forward takes no `position_ids`, which guarded decoding needs to roll rows back."
        )


def check_assistant(model: PreTrainedModel, assistant: PreTrainedModel, vocabulary: int) -> None:
    """Raises unless the draft model speaks the target's vocabulary. A draft head is bound to the target.

    Vocabulary sizes may differ by padding, that is above the number of tokens the tokenizer knows.

    Raises:
        UnsupportedRequestError: Names both sizes.
        HeadMismatchError: If a draft head was distilled from another target.
    """
    if isinstance(assistant, DraftHead):
        assistant.bind(model)
        return
    check_model(assistant)
    target_size = model.config.get_text_config().vocab_size
    draft_size = assistant.config.get_text_config().vocab_size
    if target_size != draft_size and min(target_size, draft_size) < vocabulary:
        raise UnsupportedRequestError(
            f"The draft model's vocabulary has {draft_size} entries and the target's {target_size}, with {vocabulary} "
            "tokens in the tokenizer. Use a draft model with the same tokenizer."
        )


def check_model_kwargs(model_kwargs: Mapping[str, Any], prompt_ids: Tensor) -> None:
    """Raises for forward arguments that guarded decoding would have to drop, and for right padding.

    Raises:
        UnsupportedRequestError: Names them.
    """
    unknown = sorted(
        name for name, value in model_kwargs.items() if value is not None and name not in KNOWN_MODEL_KWARGS
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
    if bool((mask[:, -1] == 0).any()):
        raise UnsupportedRequestError(
            "Right padding was found: the last column of `attention_mask` has a 0. Decoder-only models need left "
            "padding; set `tokenizer.padding_side = 'left'`."
        )


def check_positions(position_ids: Tensor | None, is_real: Tensor) -> None:
    """Raises unless the prompt's positions are the ones that follow from its mask."""
    if position_ids is None:
        return
    expected = (is_real.long().cumsum(-1) - 1).clamp(min=0)
    if position_ids.shape[-1] != is_real.shape[-1]:
        raise UnsupportedRequestError(
            f"`attention_mask` and `position_ids` must be as long as `input_ids`, {is_real.shape[-1]} tokens, but "
            f"cover {position_ids.shape[-1]}."
        )
    if not bool(((position_ids == expected) | ~is_real).all()):
        raise UnsupportedRequestError(
            "Custom `position_ids` are not supported: guarded decoding counts positions from each row's first token."
        )
