"""Turns what `generate` prepared into rows and a plan, or raises before the first forward."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode
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
from ..engine.compiling import check_compiler
from ..engine.private_names import for_row, pad_token_id
from ..engine.prompt import Prompt
from ..engine.ropes import rereads
from ..engine.traits import goes_back_by_copies, input_device, max_positions
from ..errors import UnsupportedRequestError
from ..heads.safety_head import SafetyHead
from .assistant import Draft, check_assistant
from .attachment import find_threshold
from .monitor import RiskMonitor
from .plan import Plan
from .prompts import check_padding, check_prompts
from .quality import find_digit_ids
from .step_outputs import wanted_outputs
from .support import max_context

DEFAULT_NUM_DRAFT_TOKENS = 8
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
STATIC = {name for name in ALL_STATIC_CACHE_IMPLEMENTATIONS if "offloaded" not in name}
STATEFUL = (
    ClassifierFreeGuidanceLogitsProcessor,
    DiaClassifierFreeGuidanceLogitsProcessor,
    DiaEOSDelayPatternLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WhisperNoSpeechDetection,
)


def check_request(
    model: PreTrainedModel,
    draft: Draft,
    policy: SafeSpecConfig,
    prompt_ids: Tensor,
    *,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    is_streamed: bool,
    has_draft_head: bool = False,
) -> tuple[Tensor, Prompt | None]:
    """Raises unless everything that was asked for can be kept, safety included.

    Args:
        draft ([`Draft`]): What drafts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        has_draft_head (`bool`, defaults to `False`): Whether what drafts has a safety head of its own.

    Returns:
        `tuple`: A `torch.BoolTensor` of the prompts' shape, on the target's device: `False` for padding. And what the
        prompts are besides tokens, if anything.

    Raises:
        UnsupportedRequestError: Says what can't be kept, and what to do instead.
    """
    num_rows = prompt_ids.shape[0]
    is_real, prompt = check_prompts(model, prompt_ids, model_kwargs)
    check_padding(model, is_real, config.max_length - prompt_ids.shape[1])
    check_processors(processors)
    if policy.compile and config.disable_compile:
        raise UnsupportedRequestError("`disable_compile=True` contradicts the policy's `compile=True`. Choose one.")
    if policy.compile:
        check_compiler(input_device(model))
        for each in (model, None if draft.make_drafter else draft.model):
            if each is not None and goes_back_by_copies(each):
                raise UnsupportedRequestError(
                    f"`compile=True` can't be kept: {type(each).__name__} is read in parts, or row by row, "
                    "which compiled code does not allow. Leave `compile` out."
                )
    if policy.candidate_source == "draft" and not draft.writes:
        raise UnsupportedRequestError(
            "`candidate_source='draft'` needs an `assistant_model` that can write the target's tokens by itself, but "
            f"it is {draft.title}."
        )
    if policy.verification == "segment":
        check_segment_mode(draft, config, tokenizer, model.config.get_text_config().vocab_size)
    if policy.num_draft_segments > 1 and not has_draft_head:
        raise UnsupportedRequestError(
            f"`num_draft_segments={policy.num_draft_segments}` needs a safety head of the draft, to choose among what "
            "that draws, but the draft of this call has none. Attach both with `attach_safety_head(..., draft=, "
            "draft_head=)` and pass no other `assistant_model`, or leave the field at 1."
        )
    check_assistant(model, draft, tokenizer)
    if num_rows > 1 and is_streamed:
        raise UnsupportedRequestError(f"A streamer takes one row, but the batch has {num_rows}.")
    if num_rows > 1 and pad_token_id(config) is None:
        raise UnsupportedRequestError("Rows of a batch end at different lengths: set `pad_token_id`.")
    return is_real, prompt


def check_segment_mode(
    draft: Draft, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Raises unless there is a draft that can write whole segments, and digits to grade them with.

    Raises:
        UnsupportedRequestError: Says what is missing.
    """
    is_lookup = config.prompt_lookup_num_tokens is not None
    if is_lookup or not draft.writes:
        found = "prompt lookup" if is_lookup else draft.title
        raise UnsupportedRequestError(
            "`verification='segment'` needs an `assistant_model` that is a language model, which can write a whole "
            f"segment by itself, but the draft is {found}. Pass such a model, or use `verification='token'`."
        )
    missing = [digit for digit, ids in enumerate(find_digit_ids(tokenizer, vocab_size)) if not ids]
    if missing:
        raise UnsupportedRequestError(
            f"`verification='segment'` reads a grade from 0 to 9, but the tokenizer has no token for {missing}. Use "
            "`verification='token'`."
        )


def check_generation_config(config: GenerationConfig) -> None:
    """Raises for generation settings under which safety, or their own meaning, can't be kept.

    Which of the other fields are honoured, and which mean nothing here, is in `docs/compatibility.md`.

    Raises:
        UnsupportedRequestError: Names the setting, its value and what to use instead.
    """
    mode = config.get_generation_mode()
    refused: list[tuple[bool, str, Any, str]] = [
        (mode not in MODES, "generation mode", mode.value, "greedy decoding or sampling (`num_beams=1`)"),
    ]
    for name, neutral, instead in (
        ("cache_implementation", (None, "dynamic", *STATIC), "the default, a dynamic cache, or a static one"),
        ("prefill_chunk_size", (None,), "one prefill"),
        ("assistant_ensemble_weight", (None,), "lossless verification, the default"),
        ("speculation_type", (None, "dflash"), "`assistant_model`, or 'dflash'"),
        ("is_assistant", (None, False), "the guarded model as the target"),
    ):
        value = getattr(config, name, None)  # not every release of transformers has all of them
        refused.append((value not in neutral, name, value, instead))
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind"):
        value = getattr(config, name)
        refused.append((value is not None and value < 1, name, value, "an integer >= 1"))
    for is_refused, name, value, instead in refused:
        if is_refused:
            raise UnsupportedRequestError(f"Guarded decoding does not support {name}={value!r}. Use {instead}.")


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


def row_processors(processors: LogitsProcessorList, row: int, num_rows: int) -> LogitsProcessorList:
    """The caller's processors for one row on its own, on any number of its continuations.

    Those that hold something of every row of the batch, or of every prompt, get a copy that holds this row's part; all
    others are functions of their arguments and are shared.

    Raises:
        UnsupportedRequestError: If one holds something of another number of rows.
    """
    return LogitsProcessorList(_of_row(processor, row, num_rows) for processor in processors)


def _of_row(processor: LogitsProcessor, row: int, num_rows: int) -> LogitsProcessor:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        return for_row(processor, row)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        lengths = processor.prompt_ignore_length.tolist()
        if len(lengths) != num_rows:
            raise UnsupportedRequestError(
                f"`prompt_ignore_length` of {type(processor).__name__} has {len(lengths)} entries, but the batch has "
                f"{num_rows} rows. Give one to each; with `num_return_sequences`, to each sequence."
            )
        # one number holds for any number of continuations, a tensor for as many as it has entries
        return _with(processor, prompt_ignore_length=int(lengths[row]))
    if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        held = processor.encoder_input_ids
        at = _prompt_of(processor, row, num_rows, len(held))
        return _EachRow(_with(processor, encoder_input_ids=held[at : at + 1]))
    if isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        at = _prompt_of(processor, row, num_rows, len(processor.generated_ngrams))
        return _with(processor, batch_size=1, generated_ngrams=[processor.generated_ngrams[at]])
    return processor


def _prompt_of(processor: LogitsProcessor, row: int, num_rows: int, num_held: int) -> int:
    """Which of the prompts that a processor holds is a row's: with `num_return_sequences` there are more rows."""
    if num_held == 0 or num_rows % num_held:
        raise UnsupportedRequestError(
            f"{type(processor).__name__} holds {num_held} prompts, which can't be those of a batch of {num_rows} "
            "rows. Make it of the prompts of this call."
        )
    return row // (num_rows // num_held)


class _EachRow(LogitsProcessor):
    """A processor for one row, for any number of its continuations: older ones would take the first of them only."""

    def __init__(self, of_row: LogitsProcessor):
        self.of_row = of_row

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        pairs: Any = zip(input_ids.split(1), scores.split(1), strict=True)
        return cast("torch.FloatTensor", torch.cat([self.of_row(*pair) for pair in pairs]))


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
            real[: len(ids)],  # of embeddings no ids are known
            max_new_tokens=most - prompt_ids.shape[1],
            policy=policy,
            newline_ids=newline_ids,
            pieces=pieces,
            processors=row_processors(processors, index, len(prompt_ids)),
        )
        for index, (ids, real) in enumerate(zip(prompt_ids, is_real, strict=True))
    ]


def make_plan(
    model: PreTrainedModel,
    policy: SafeSpecConfig,
    head: SafetyHead,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: GenerationConfig,
    criteria: StoppingCriteriaList,
    rows: Sequence[Row],
    num_assistant_tokens: int | None,
    is_monitored: bool,
    prompt: Prompt | None = None,
    draft_head: SafetyHead | None = None,
) -> Plan:
    """Everything about a call that stays the same while it runs."""
    policy, num_unseen = policy.resolved(), 0 if prompt is None else prompt.num_unseen
    ends, do_sample = eos_ids(criteria), bool(config.do_sample)
    given = (policy.num_draft_tokens, config.prompt_lookup_num_tokens, num_assistant_tokens)
    refusal = tokenizer.encode(policy.refusal, add_special_tokens=False)
    is_by_segment, vocab_size = policy.verification == "segment", model.config.get_text_config().vocab_size
    return Plan(
        policy=policy,
        monitor=RiskMonitor(head) if is_monitored else None,
        risk_threshold=find_threshold(policy, head),
        num_draft_tokens=next((num for num in given if num is not None), DEFAULT_NUM_DRAFT_TOKENS),
        do_sample=do_sample,
        eos_ids=frozenset(ends),
        criteria=other_criteria(criteria, config.max_length),
        reflection_ids=tokenizer.encode(policy.reflection, add_special_tokens=False) if policy.reflection else [],
        refusal_ids=refusal + [token for token in ends if token < vocab_size][:1],
        separator_ids=tokenizer.encode("\n\n", add_special_tokens=False),
        max_context=max_context(model, rows, num_unseen, _stays_for(model, config, prompt)),
        max_positions=(max_positions(model) or 2**31) - num_unseen,
        seeds=recovery_seeds(policy.seed, do_sample, len(rows)),
        answer_seeds=torch.randint(2**62, (len(rows),)).tolist() if do_sample else [],
        pad_token_id=pad_token_id(config) or 0,
        quality_ids=tokenizer.encode(policy.quality_prompt, add_special_tokens=False) if is_by_segment else [],
        digit_ids=find_digit_ids(tokenizer, vocab_size) if is_by_segment else [],
        draft_monitor=None if draft_head is None else RiskMonitor(draft_head),
    )


def _stays_for(model: PreTrainedModel, config: GenerationConfig, prompt: Prompt | None) -> str | None:
    """What in a call needs the model's rotary positions to stay as they are, if anything does."""
    if prompt is not None:
        return "after a prompt that is more than tokens"
    if names := wanted_outputs(config):
        return f"with output_{names[0]}=True"
    # every token is read again each time, with the frequencies of the text so far
    return "with use_cache=False" if config.use_cache is False and not rereads(model) else None


def recovery_seeds(seed: int | None, do_sample: bool, num_rows: int) -> list[int]:
    """One per row: the same for all, so that a row recovers as it would alone, but for samples without a seed."""
    if seed is not None or not do_sample:
        return [seed or 0] * num_rows
    return torch.randint(2**31, (num_rows,)).tolist()


def other_criteria(criteria: StoppingCriteriaList, max_length: int) -> StoppingCriteriaList:
    """The criteria besides the end-of-sequence tokens and `max_length`, which the loop checks itself."""
    return StoppingCriteriaList(
        criterion
        for criterion in criteria
        if not isinstance(criterion, EosTokenCriteria)
        and not (isinstance(criterion, MaxLengthCriteria) and criterion.max_length >= max_length)
    )


def eos_ids(criteria: StoppingCriteriaList) -> list[int]:
    """All tokens that end an answer, the generation config's own ones first; -1, say, is the number of none."""
    ids: list[int] = []
    for criterion in criteria:
        if isinstance(criterion, EosTokenCriteria):
            ids += torch.as_tensor(criterion.eos_token_id).flatten().tolist()
    return list(dict.fromkeys(token for token in ids if token >= 0))
