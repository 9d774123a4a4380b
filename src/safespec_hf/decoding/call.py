"""One guarded call: the decoding strategy that `generate` runs once it has prepared everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..answer.rows import Row
from ..answer.segments import find_boundaries
from ..config import SafeSpecConfig
from ..engine.compiling import compiled_forwards
from ..engine.evaluating import evaluating
from ..engine.fusing import fast_layers
from ..engine.inference import inference_mode
from ..engine.private_names import pad_token_id
from ..engine.prompt import Prompt
from ..engine.speeds import spent
from ..engine.traits import input_device, with_cache_name
from ..heads.safety_head import SafetyHead, check_usable
from ..outputs import SafeSpecOutput
from .adapters import warn_of_changes
from .assistant import Draft
from .attachment import Attachment
from .callers import CallersCache
from .drafts import SOON, choose_draft, make_drafting, make_watch
from .loop import Decoder
from .plan import Plan, check_context
from .processes import agree
from .proof import check_weights, prove
from .request import check_generation_config, check_request, make_plan, make_rows
from .segment_mode import SegmentDecoder
from .step_outputs import wanted_outputs, with_steps

logger = logging.get_logger(__name__)

UNGUARDED = (
    "Nothing is guarded: with `SafeSpecConfig(policy='observe')` an answer is returned and streamed whatever its "
    "risk, and what is flagged is only reported, in `events`."
)


@dataclass(slots=True)
class GuardedCall:
    """The decoding strategy of one guarded `generate` call, run by transformers once it has prepared everything."""

    policy: SafeSpecConfig
    assistant: PreTrainedModel | None = None
    streamer: BaseStreamer | None = None
    num_assistant_tokens: int | None = None
    is_monitored: bool = True  # False only to measure what safety costs
    assistant_tokenizer: PreTrainedTokenizerBase | None = None
    is_watched: bool = True  # False where words may not depend on the clock: drafts move their roundings
    is_heuristic: bool = False  # whether the number of drafts follows what is accepted
    draft: Draft = field(default=Draft(None), init=False)
    has_run: bool = field(default=False, init=False)  # a `generate` that drops `custom_generate` would never tell

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> SafeSpecOutput | Tensor:
        self.has_run, model_kwargs = True, with_cache_name(model_kwargs)
        check_weights(model)
        attachment: Attachment = model._safespec
        callers = CallersCache(model, generation_config, input_ids, model_kwargs)
        head, tokenizer = attachment.head, attachment.choose_tokenizer(model, tokenizer)
        head.to(input_device(model))  # type: ignore[arg-type]  # its stub takes no device
        check_usable(head, model)
        check_generation_config(generation_config)
        self.draft = choose_draft(model, self.assistant, generation_config, tokenizer, self.assistant_tokenizer)
        rows, prompt = self._check(
            model,
            input_ids,
            tokenizer,
            config=generation_config,
            processors=logits_processor,
            criteria=stopping_criteria,
            model_kwargs=callers.model_kwargs,
        )
        plan = make_plan(
            model,
            self.policy,
            head,
            tokenizer,
            config=generation_config,
            criteria=stopping_criteria,
            rows=rows,
            num_assistant_tokens=self.num_assistant_tokens,
            is_monitored=self.is_monitored,
            prompt=prompt,
            draft_head=self._draft_head(attachment),
        )
        check_context(rows, plan)
        if plan.observes:
            logger.warning_once(UNGUARDED)
        before = spent()
        with self._fast_forwards(model, head):
            decoder = self._make_decoder(model, rows, plan, generation_config, prompt)
            prompt = None  # its images are not needed once they were read
            decoder.statistics.measuring_seconds = spent() - before
            callers.give_to(decoder)
            decoder.run()
        ids = input_ids.to(input_device(model))
        output = decoder.output(ids, pad_token_id(generation_config) or 0, callers.take_back(decoder, ids))
        if wanted_outputs(generation_config):
            with self._fast_forwards(model, head):
                output = with_steps(output, model, generation_config, logits_processor, model_kwargs, callers.before)
        return output if generation_config.return_dict_in_generate else output.sequences

    def _draft_head(self, attachment: Attachment) -> SafetyHead | None:
        """The head of the draft of this call: the attached one, where it is the attached draft that drafts."""
        head, draft = attachment.draft_head, self.draft.model
        if head is None or draft is None or draft is not attachment.draft or not self.draft.writes:
            return None
        check_usable(head, draft)
        head.to(input_device(draft))  # type: ignore[arg-type]  # its stub takes no device
        return head.eval()

    def _check(
        self,
        model: Any,
        input_ids: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        model_kwargs: dict[str, Any],
    ) -> tuple[list[Row], Prompt | None]:
        """Raises unless the request can be kept; gives an empty answer for each prompt, and what else it is."""
        is_real, prompt = check_request(
            model,
            self.draft,
            self.policy,
            input_ids,
            config=config,
            processors=processors,
            model_kwargs=model_kwargs,
            tokenizer=tokenizer,
            is_streamed=self.streamer is not None,
            has_draft_head=self._draft_head(model._safespec) is not None,
        )
        prove(model)  # again where it is another one than when its head was attached: loaded since, or recast
        warn_of_changes(model._safespec.weights, model)
        agree(model, criteria, [input_ids, model_kwargs, config, self.policy, self.num_assistant_tokens])
        rows = make_rows(
            input_ids.to(input_device(model)),
            is_real,
            max_length=config.max_length,
            policy=self.policy,
            **find_boundaries(tokenizer)._asdict(),
            processors=processors,
        )
        for row in rows:
            row.placeholders = frozenset() if prompt is None else prompt.placeholders
        return rows, prompt

    def _make_decoder(
        self, model: PreTrainedModel, rows: list[Row], plan: Plan, config: GenerationConfig, prompt: Prompt | None
    ) -> Decoder:
        """Measures what forwards take, where that is not known."""
        num_context = max(len(row.prompt) + min(row.max_new_tokens, SOON) for row in rows)
        drafter = make_drafting(model, self.draft, config, self.policy, len(rows), num_context)
        drafter.is_heuristic = self.is_heuristic
        decoder = SegmentDecoder if self.policy.verification == "segment" else Decoder
        watch = make_watch(drafter) if self.is_watched else None
        return decoder(model, rows, drafter, plan, self.streamer, watch, prompt)

    @contextmanager
    def _fast_forwards(self, model: PreTrainedModel, head: SafetyHead) -> Iterator[None]:
        draft = self.draft.model
        models = [model] if draft is None else [model, draft]
        is_own = self.draft.is_part or self.draft.make_drafter is not None
        packed, is_measured = [model] if is_own else models, self.policy.costs == "measured"
        with (
            evaluating([*models, head]),
            fast_layers(packed, self.policy.pack_weights, is_measured, not self.policy.compile),
            compiled_forwards([model] if self.draft.make_drafter else models, self.policy.compile),
            inference_mode([*models, head]),
        ):
            yield
