"""Turns what `generate` prepared into rows and a plan, or raises before the first forward."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
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
from ..drafting.draft_length import DraftCosts
from ..drafting.router import DraftRouter
from ..engine.cache import takes_trees
from ..engine.compiling import check_compiler
from ..engine.growing import is_recurrent
from ..engine.private_names import allowed_tokens, pad_token_id
from ..engine.speeds import is_timed
from ..engine.traits import input_device, max_positions
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead
from ..heads.safety_head import SafetyHead
from .assistant import check_assistant
from .attachment import find_threshold
from .measuring import MeasuredCosts, measure_costs
from .monitor import RiskMonitor
from .plan import Plan
from .quality import find_digit_ids
from .support import check_positions, check_prompt, max_context
from .watch import Watch

DEFAULT_NUM_DRAFT_TOKENS = 8
LOOKUP_SIZE = 4  # longest n-gram looked up beside a draft model
SOON = 256  # new tokens that a call is measured for: most answers end long before they may get no longer
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
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
    assistant: PreTrainedModel | None,
    policy: SafeSpecConfig,
    prompt_ids: Tensor,
    *,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
    is_streamed: bool,
) -> Tensor:
    """Raises unless everything that was asked for can be kept, safety included.

    Args:
        tokenizer, assistant_tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The target's, and the draft's if that was given.

    Returns:
        `torch.BoolTensor` of the prompts' shape, on the target's device: `False` for padding.

    Raises:
        UnsupportedRequestError: Says what can't be kept, and what to do instead.
    """
    num_rows = prompt_ids.shape[0]
    check_generation_config(config)
    check_prompt(model, prompt_ids, model_kwargs)
    check_processors(processors)
    if policy.compile and config.disable_compile:
        raise UnsupportedRequestError("`disable_compile=True` contradicts the policy's `compile=True`. Choose one.")
    if policy.compile:
        check_compiler(input_device(model))
        for each in (model, assistant):
            if each is not None and is_recurrent(each):
                raise UnsupportedRequestError(
                    f"`compile=True` can't be kept: the recurrent layers of {type(each).__name__} are read in parts, "
                    "which compiled code does not allow. Leave `compile` out."
                )
    if policy.candidate_source == "draft" and (assistant is None or isinstance(assistant, DraftHead)):
        raise UnsupportedRequestError(
            "`candidate_source='draft'` needs an `assistant_model` that can write by itself, but it is "
            f"{'none' if assistant is None else 'a draft head'}."
        )
    if policy.verification == "segment":
        check_segment_mode(assistant, config, tokenizer, model.config.get_text_config().vocab_size)
    check_assistant(model, assistant, tokenizer, assistant_tokenizer)
    if num_rows > 1 and is_streamed:
        raise UnsupportedRequestError(f"A streamer takes one row, but the batch has {num_rows}.")
    if num_rows > 1 and pad_token_id(config) is None:
        raise UnsupportedRequestError("Rows of a batch end at different lengths: set `pad_token_id`.")
    mask: Tensor | None = model_kwargs.get("attention_mask")
    is_real = torch.ones_like(prompt_ids, dtype=torch.bool) if mask is None else mask.bool()
    is_real = is_real.to(input_device(model))
    check_positions(model_kwargs.get("position_ids"), is_real)
    return is_real


def check_segment_mode(
    assistant: PreTrainedModel | None, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Raises unless there is a draft that can write whole segments, and digits to grade them with.

    Raises:
        UnsupportedRequestError: Says what is missing.
    """
    is_lookup = config.prompt_lookup_num_tokens is not None
    if is_lookup or assistant is None or isinstance(assistant, DraftHead):
        found = "prompt lookup" if is_lookup else "none" if assistant is None else "a draft head"
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
    mode, outputs = config.get_generation_mode(), "`model(...)` on the returned sequences"
    refused: list[tuple[bool, str, Any, str]] = [
        (mode not in MODES, "generation mode", mode.value, "greedy decoding or sampling (`num_beams=1`)"),
        (config.use_cache is False, "use_cache", False, "`use_cache=True`"),
    ]
    for name, neutral, instead in (
        ("cache_implementation", (None, "dynamic"), "the default, a dynamic cache"),
        ("output_attentions", (None, False), outputs),
        ("output_hidden_states", (None, False), outputs),
        ("output_scores", (None, False), outputs),
        ("output_logits", (None, False), outputs),
        ("prefill_chunk_size", (None,), "one prefill"),
        ("assistant_ensemble_weight", (None,), "lossless verification, the default"),
        ("assistant_early_exit", (None,), "`assistant_model`"),
        ("use_mtp", (None, False), "`assistant_model`"),
        ("speculation_type", (None,), "`assistant_model`"),
        ("is_assistant", (None, False), "the guarded model as the target"),
    ):
        value = getattr(config, name, None)  # not every release of transformers has all of them
        refused.append((value not in neutral, name, value, instead))
    for name in ("prompt_lookup_num_tokens", "max_matching_ngram_size"):
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


def row_processors(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The caller's processors for one row on its own, on any number of its continuations.

    Those that hold something of every row of the batch get a copy that holds this row's part; all others are functions
    of their arguments and are shared.
    """
    return LogitsProcessorList(_of_row(processor, row) for processor in processors)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = allowed_tokens(processor)
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


def make_drafting(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    config: GenerationConfig,
    policy: SafeSpecConfig,
    num_rows: int,
    num_context: int = SOON,
) -> DraftRouter:
    """Prompt lookup if it is asked for, else the draft model if there is one, beside which a lookup costs nothing.

    `num_context`: tokens that a row will have about.
    """
    is_by_token = policy.verification == "token"
    if config.prompt_lookup_num_tokens is not None:
        assistant, ngram_size = None, config.max_matching_ngram_size or 2
    else:
        ngram_size = LOOKUP_SIZE if assistant is not None and policy.lookup_drafts and is_by_token else 0
    is_adaptive = policy.adaptive_drafts and is_by_token and (assistant is not None or ngram_size > 0)
    return DraftRouter(
        assistant,
        num_rows=num_rows,
        vocab_size=model.config.get_text_config().vocab_size,
        max_matching_ngram_size=ngram_size,
        do_sample=bool(config.do_sample),
        costs=draft_costs(model, assistant, policy, num_rows, num_context) if is_adaptive else None,
        takes_trees=takes_trees(model),
    )


def make_watch(drafter: DraftRouter) -> Watch | None:
    """Where costs were measured, what plain steps take is known."""
    costs = drafter.costs
    return Watch(costs.target.at) if isinstance(costs, MeasuredCosts) else None


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
) -> Plan:
    """Everything about a call that stays the same while it runs."""
    policy = policy.resolved()
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
        refusal_ids=refusal + ends[:1],
        separator_ids=tokenizer.encode("\n\n", add_special_tokens=False),
        max_context=max_context(model, rows),
        max_positions=max_positions(model) or 2**31,
        seeds=recovery_seeds(policy.seed, do_sample, len(rows)),
        answer_seeds=torch.randint(2**62, (len(rows),)).tolist() if do_sample else [],
        pad_token_id=pad_token_id(config) or 0,
        quality_ids=tokenizer.encode(policy.quality_prompt, add_special_tokens=False) if is_by_segment else [],
        digit_ids=find_digit_ids(tokenizer, vocab_size) if is_by_segment else [],
    )


def recovery_seeds(seed: int | None, do_sample: bool, num_rows: int) -> list[int]:
    """One per row: the same for all, so that a row recovers as it would alone, but for samples without a seed."""
    if seed is not None or not do_sample:
        return [seed or 0] * num_rows
    return torch.randint(2**31, (num_rows,)).tolist()


def draft_costs(
    model: PreTrainedModel, assistant: PreTrainedModel | None, policy: SafeSpecConfig, num_rows: int, num_context: int
) -> DraftCosts:
    """Costs by the seconds that forwards take, or by the weights that they read.

    A forward over few tokens spends most of its time on reading weights, but not on every machine.
    """
    if policy.costs == "measured" and is_timed(model, num_read(model)):
        return measure_costs(
            model,
            assistant,
            num_rows=num_rows,
            num_context=num_context,
            layers=[] if not isinstance(assistant, DraftHead) else list(assistant.config.hidden_layers or []),
            how={"pack_weights": policy.pack_weights, "compile": policy.compile},
        )
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
