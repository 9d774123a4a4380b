"""Turns what `generate` prepared into rows and a plan, or raises before the first forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..answer.rows import Row
from ..config import SafeSpecConfig
from ..drafting.candidates import SafeSpecCandidateGenerator
from ..drafting.draft_length import DraftCosts
from ..engine.cache import takes_trees
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead

DEFAULT_NUM_DRAFT_TOKENS = 8
LOOKUP_SIZE = 4  # longest n-gram looked up beside a draft model
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)


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


def check_processors(processors: LogitsProcessorList, num_rows: int) -> None:
    """Raises for logits processors that can't be applied row by row and position by position."""
    stateful = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
    whole_batch = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)
    for processor in processors:
        is_stateful = isinstance(processor, stateful)
        if is_stateful or (num_rows > 1 and isinstance(processor, whole_batch)):
            raise UnsupportedRequestError(
                f"{type(processor).__name__} can't be applied to positions out of order"
                f"{'' if is_stateful else ', row by row,'} as speculative decoding does. Remove its argument."
            )


def row_processors(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The caller's processors for one row on its own; those that tell rows apart keep the row's number."""
    own = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            own.append(_constrain_row(processor._prefix_allowed_tokens_fn, row))
        else:
            own.append(processor)
    return own


def _constrain_row(allowed: Callable[[int, Tensor], list[int]], row: int) -> PrefixConstrainedLogitsProcessor:
    return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)


def make_rows(
    prompt_ids: Tensor,
    is_real: Tensor,
    *,
    max_length: int,
    policy: SafeSpecConfig,
    newline_ids: frozenset[int],
    processors: LogitsProcessorList,
) -> list[Row]:
    """One empty answer per prompt.

    Raises:
        UnsupportedRequestError: If a prompt is padding only.
    """
    if not bool(is_real.any(dim=1).all()):
        raise UnsupportedRequestError("A prompt of the batch is padding only. Give every row at least one token.")
    return [
        Row(
            index,
            ids,
            real,
            max_new_tokens=max_length - prompt_ids.shape[1],
            policy=policy,
            newline_ids=newline_ids,
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
