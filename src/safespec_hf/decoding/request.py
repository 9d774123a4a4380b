"""Turns what `generate` prepared into rows and a plan, or raises before the first forward."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    DiaClassifierFreeGuidanceLogitsProcessor,
    DiaEOSDelayPatternLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WhisperNoSpeechDetection,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..answer.characters import Piece
from ..answer.rows import Row
from ..config import SafeSpecConfig
from ..drafting.candidates import SafeSpecCandidateGenerator
from ..drafting.draft_length import DraftCosts
from ..engine.cache import CACHE_NAME, check_cache_layers, takes_trees
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead

DEFAULT_NUM_DRAFT_TOKENS = 8
LOOKUP_SIZE = 4  # longest n-gram looked up beside a draft model
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
STATEFUL = (
    ClassifierFreeGuidanceLogitsProcessor,
    DiaClassifierFreeGuidanceLogitsProcessor,
    DiaEOSDelayPatternLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WhisperNoSpeechDetection,
)
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


def check_generation_config(config: GenerationConfig) -> None:
    """Raises for generation settings under which safety, or their own meaning, can't be kept.

    Raises:
        UnsupportedRequestError: Names the setting, its value and what to use instead.
    """
    mode, cache, early_exit = config.get_generation_mode(), config.cache_implementation, config.assistant_early_exit
    ensemble = config.assistant_ensemble_weight
    refused = [
        (mode not in MODES, "generation mode", mode.value, "greedy decoding or sampling (`num_beams=1`)"),
        (cache not in (None, "dynamic"), "cache_implementation", cache, "the default, a dynamic cache"),
        (config.use_cache is False, "use_cache", False, "`use_cache=True`"),
        (bool(config.output_attentions), "output_attentions", True, "`model(...)` on the returned sequences"),
        (bool(config.output_hidden_states), "output_hidden_states", True, "`model(...)` on the returned sequences"),
        (bool(config.output_scores), "output_scores", True, "`model(...)` on the returned sequences"),
        (bool(config.output_logits), "output_logits", True, "`model(...)` on the returned sequences"),
        (config.prefill_chunk_size is not None, "prefill_chunk_size", config.prefill_chunk_size, "one prefill"),
        (ensemble is not None, "assistant_ensemble_weight", ensemble, "lossless verification, the default"),
        (early_exit is not None, "assistant_early_exit", early_exit, "`assistant_model`"),
    ]
    for is_refused, name, value, instead in refused:
        if is_refused:
            raise UnsupportedRequestError(f"Guarded decoding does not support {name}={value!r}. Use {instead}.")


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


def check_processors(processors: LogitsProcessorList) -> None:
    """Raises for logits processors that can't be applied row by row and position by position.

    Raises:
        UnsupportedRequestError: Names the processor.
    """
    for processor in processors:
        if isinstance(processor, STATEFUL):
            raise UnsupportedRequestError(
                f"{type(processor).__name__} can't be applied to positions out of order, as speculative decoding "
                "does: it keeps state between its calls. Remove its argument."
            )


def row_processors(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The caller's processors for one row on its own, on any number of its continuations.

    Those that hold something of every row of the batch get a copy that holds this row's part; all others are functions
    of their arguments and are shared.
    """
    return LogitsProcessorList(_of_row(processor, row) for processor in processors)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        # one number holds for any number of continuations, a tensor for as many as it has entries
        return _with(processor, prompt_ignore_length=int(processor.prompt_ignore_length[row]))
    if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        return _with(processor, encoder_input_ids=processor.encoder_input_ids[row : row + 1])
    if isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        return _with(processor, batch_size=1, generated_ngrams=[processor.generated_ngrams[row]])
    return processor


def _with(processor: LogitsProcessor, **fields: Any) -> LogitsProcessor:
    own = copy(processor)
    vars(own).update(fields)
    return own


def make_rows(
    prompt_ids: Tensor,
    is_real: Tensor,
    *,
    max_length: float,
    policy: SafeSpecConfig,
    newline_ids: frozenset[int],
    processors: LogitsProcessorList,
    pieces: Mapping[int, Piece] | None = None,
) -> list[Row]:
    """One empty answer per prompt.

    `max_length` may be any number that plain `generate` takes, however large: rows grow as they need to.

    Raises:
        UnsupportedRequestError: If a prompt is padding only.
    """
    if not bool(is_real.any(dim=1).all()):
        raise UnsupportedRequestError("A prompt of the batch is padding only. Give every row at least one token.")
    # plain decoding ends once there are as many tokens or more
    most = sys.maxsize if math.isinf(max_length) else math.ceil(max_length)
    return [
        Row(
            index,
            ids,
            real,
            max_new_tokens=most - prompt_ids.shape[1],
            policy=policy,
            newline_ids=newline_ids,
            pieces=pieces,
            processors=row_processors(processors, index),
        )
        for index, (ids, real) in enumerate(zip(prompt_ids, is_real, strict=True))
    ]


def make_candidates(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    config: GenerationConfig,
    policy: SafeSpecConfig,
    num_rows: int,
) -> SafeSpecCandidateGenerator:
    """Prompt lookup if it is asked for, else the draft model if there is one, beside which a lookup costs nothing."""
    if config.prompt_lookup_num_tokens is not None:
        assistant, ngram_size = None, config.max_matching_ngram_size or 2
    else:
        ngram_size = LOOKUP_SIZE if assistant is not None and policy.lookup_drafts else 0
    return SafeSpecCandidateGenerator(
        assistant,
        num_rows=num_rows,
        vocab_size=model.config.get_text_config().vocab_size,
        max_matching_ngram_size=ngram_size,
        do_sample=bool(config.do_sample),
        costs=draft_costs(model, assistant) if policy.adaptive_drafts else None,
        takes_trees=takes_trees(model),
    )


def draft_costs(model: PreTrainedModel, assistant: PreTrainedModel | None) -> DraftCosts:
    """Costs by the weights that a forward reads, which is what a forward over few tokens spends its time on."""
    return DraftCosts(draft=0.0 if assistant is None else num_read(assistant) / num_read(model))


def num_read(model: PreTrainedModel) -> int:
    """Weights that a forward reads: all but the rows of the embeddings."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    num = sum(weight.numel() for weight in model.parameters() if id(weight) not in embedded - multiplied)
    if isinstance(model, DraftHead):
        num += model.config.draft_vocab_size * model.config.hidden_size
    return max(num, 1)


def other_criteria(criteria: StoppingCriteriaList, max_length: int) -> StoppingCriteriaList:
    """The criteria besides the end-of-sequence tokens and `max_length`, which the loop checks itself."""
    return StoppingCriteriaList(
        criterion
        for criterion in criteria
        if not isinstance(criterion, EosTokenCriteria)
        and not (isinstance(criterion, MaxLengthCriteria) and criterion.max_length >= max_length)
    )


def eos_ids(criteria: StoppingCriteriaList) -> list[int]:
    """All tokens that end an answer, the generation config's own ones first."""
    ids: list[int] = []
    for criterion in criteria:
        if isinstance(criterion, EosTokenCriteria):
            ids += torch.as_tensor(criterion.eos_token_id).flatten().tolist()
    return list(dict.fromkeys(ids))
