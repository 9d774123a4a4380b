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
from ..engine.cache import CACHE_NAME
from ..engine.compiling import compiled_forwards
from ..engine.evaluating import evaluating
from ..engine.inference import inference_mode
from ..engine.packing import packed_weights
from ..engine.private_names import is_user_cache, pad_token_id
from ..engine.speeds import spent
from ..engine.traits import input_device
from ..heads.safety_head import SafetyHead, check_usable
from ..outputs import SafeSpecOutput
from .attachment import Attachment
from .loop import Decoder
from .plan import Plan, check_context
from .request import SOON, check_request, make_drafting, make_plan, make_rows, make_watch
from .segment_mode import SegmentDecoder

logger = logging.get_logger(__name__)


@dataclass(slots=True)
class GuardedCall:
    """The decoding strategy of one guarded `generate` call, run by transformers once it has prepared everything."""

    policy: SafeSpecConfig
    assistant: PreTrainedModel | None = None
    streamer: BaseStreamer | None = None
    num_assistant_tokens: int | None = None
    is_monitored: bool = True  # False only to measure what safety costs
    assistant_tokenizer: PreTrainedTokenizerBase | None = None
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
        self.has_run = True
        attachment: Attachment = model._safespec
        head, tokenizer = attachment.head, attachment.choose_tokenizer(model, tokenizer)
        head.to(input_device(model))  # type: ignore[arg-type]  # its stub takes no device
        check_usable(head, model)
        rows = self._check(
            model,
            input_ids,
            tokenizer,
            config=generation_config,
            processors=logits_processor,
            model_kwargs=model_kwargs,
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
        )
        check_context(rows, plan)
        if plan.observes:
            logger.warning_once(
                "Nothing is guarded: with `SafeSpecConfig(policy='observe')` an answer is returned and streamed "
                "whatever its risk, and what is flagged is only reported, in `events`."
            )
        before = spent()
        with self._fast_forwards(model, head):
            decoder = self._make_decoder(model, rows, plan, generation_config)
            decoder.statistics.measuring_seconds = spent() - before
            cache: Any = model_kwargs.get(CACHE_NAME)
            if is_user_cache(cache):
                decoder.target.take_cache(cache)
            decoder.run()
        input_ids = input_ids.to(input_device(model))
        is_whole = bool(generation_config.return_dict_in_generate)
        output = decoder.output(input_ids, pad_token_id(generation_config) or 0, with_cache=is_whole)
        return output if is_whole else output.sequences

    def _check(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        model_kwargs: dict[str, Any],
    ) -> list[Row]:
        """Raises unless the request can be kept; gives an empty answer for each prompt."""
        is_real = check_request(
            model,
            self.assistant,
            self.policy,
            input_ids,
            config=config,
            processors=processors,
            model_kwargs=model_kwargs,
            tokenizer=tokenizer,
            assistant_tokenizer=self.assistant_tokenizer,
            is_streamed=self.streamer is not None,
        )
        return make_rows(
            input_ids.to(input_device(model)),
            is_real,
            max_length=config.max_length,
            policy=self.policy,
            **find_boundaries(tokenizer)._asdict(),
            processors=processors,
        )

    def _make_decoder(self, model: PreTrainedModel, rows: list[Row], plan: Plan, config: GenerationConfig) -> Decoder:
        """Measures what forwards take, where that is not known."""
        num_context = max(len(row.prompt) + min(row.max_new_tokens, SOON) for row in rows)
        drafter = make_drafting(model, self.assistant, config, self.policy, len(rows), num_context)
        decoder = SegmentDecoder if self.policy.verification == "segment" else Decoder
        return decoder(model, rows, drafter, plan, self.streamer, make_watch(drafter))

    @contextmanager
    def _fast_forwards(self, model: PreTrainedModel, head: SafetyHead) -> Iterator[None]:
        models = [model] if self.assistant is None else [model, self.assistant]
        with (
            evaluating([*models, head]),
            packed_weights(models, self.policy.pack_weights, self.policy.costs == "measured"),
            compiled_forwards(models, self.policy.compile),
            inference_mode([*models, head]),
        ):
            yield
