"""How a method gets text out of the target: plain or guarded, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..config import SafeSpecConfig
from ..decoding.attachment import find_threshold
from ..decoding.call import GuardedCall
from ..errors import SafeSpecError
from ..heads.safety_head import SafetyHead
from ..modeling import GuardedModel, attach_safety_head
from ..outputs import Provenance, SafeSpecEvent, SafeSpecOutput
from ..training.chat_template import next_turn
from ..training.collect import pad_left, stop_ids
from ..training.data import Example
from ..training.hidden import render_prompt
from .prompts import Message


@dataclass(slots=True, kw_only=True)
class Reply:
    """What one method says in one turn.

    Attributes:
        text (`str`), tokens (`list[int]`): The answer, without its end token in the text.
        finish_reason (`str`): As in [`SafeSpecOutput`].
        seconds (`float`): Its share of the time that its batch took.
        risk_max (`float`, *optional*): The highest risk of a returned token.
        risk_threshold (`float`, *optional*): At or above it a token was unsafe.
        events (`list[dict]`): What was flagged, and what was done.
        statistics (`dict`, *optional*): Of the call; with the first reply of a batch only, so that sums are right.
        log_prob (`float`, *optional*): Mean log-probability per token under the plain target, in nats.
        recovered_log_prob (`float`, *optional*), num_recovered (`int`):
            The same of the recovered tokens, and how many: those of candidates that were taken; where a false alarm
            cost one token, what stands in its place, and what follows it, as many as a candidate may have.
        guard_seconds (`float`): Spent by a guard model, as part of `seconds`.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seconds: float
    risk_max: float | None = None
    risk_threshold: float | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, Any] | None = None
    log_prob: float | None = None
    recovered_log_prob: float | None = None
    num_recovered: int = 0
    guard_seconds: float = 0.0


@dataclass(kw_only=True)
class Engine:
    """A target with what speeds it up and what guards it.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target. Guarded methods need a head on it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        draft (*optional*): Draft model or head of guarded methods.
        lookup_tokens (`int`, *optional*): Drafts by prompt lookup instead, so many tokens.
        max_new_tokens (`int`, defaults to 128): Of an answer.
        max_prompt_tokens (`int`, defaults to 2048): Of a prompt; longer ones lose their beginning.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    draft: Any = None
    lookup_tokens: int | None = None
    max_new_tokens: int = 128
    max_prompt_tokens: int = 2048

    def plain(self, chats: Sequence[Sequence[Message]], processors: LogitsProcessorList | None = None) -> list[Reply]:
        """Greedy answers of the target alone, by transformers' own `generate`; and how probable they are to it.

        Args:
            chats (`Sequence[Sequence[dict[str, str]]]`): A conversation each.
            processors ([`~transformers.LogitsProcessorList`], *optional*): Of its logits, after those of its own.
        """
        prompts = self.encode(chats)
        sequences, seconds = self._generate(prompts, logits_processor=processors)
        ends = stop_ids(self.model)
        replies = []
        for row in sequences[:, max(map(len, prompts)) :].tolist():
            length = next((index + 1 for index, token in enumerate(row) if token in ends), None)
            reason = "length" if length is None else "eos"
            replies.append(self._reply(row[:length], reason, seconds / len(prompts)))
        for prompt, reply in zip(prompts, replies, strict=True):
            log_probs = self._log_probs(prompt, reply.tokens)
            reply.log_prob = float(log_probs.mean()) if reply.tokens else None
        return replies

    def guarded(
        self, chats: Sequence[Sequence[Message]], policy: SafeSpecConfig, *, is_monitored: bool = True
    ) -> list[Reply]:
        """Greedy answers of the guarded loop.

        Args:
            chats (`Sequence[Sequence[dict[str, str]]]`): A conversation each.
            policy ([`SafeSpecConfig`]): What to do on risk.
            is_monitored (`bool`, defaults to `True`): `False` turns the head off: speculative decoding alone.

        Raises:
            SafeSpecError: If the target has no head.
        """
        threshold = find_threshold(policy, check_guarded(self.model).safety.head)
        prompts = self.encode(chats)
        call = GuardedCall(policy, self.draft, None, self.lookup_tokens, is_monitored, is_watched=False)
        lookup = {} if self.lookup_tokens is None else {"prompt_lookup_num_tokens": self.lookup_tokens}
        output, seconds = self._generate(prompts, custom_generate=call, return_dict_in_generate=True, **lookup)
        seconds -= output.statistics.measuring_seconds  # once on a machine
        most, each = policy.max_segment_tokens, seconds / len(prompts)
        replies = [self._read(output, index, prompt, each, most) for index, prompt in enumerate(prompts)]
        for reply in replies:
            reply.risk_threshold = threshold if is_monitored else None
        replies[0].statistics = asdict(output.statistics)
        return replies

    def _read(self, output: SafeSpecOutput, index: int, prompt: list[int], seconds: float, most: int) -> Reply:
        """One row of what a guarded call returned, whose candidates have `most` tokens."""
        provenance, all_risks, events, reasons = _parts(output)
        origins, answer = provenance[index], output.sequences[index, -provenance.shape[1] :]
        is_token = origins >= 0
        reply = self._reply(answer[is_token].tolist(), reasons[index], seconds)
        risks = all_risks[index][is_token]
        risks = risks[~risks.isnan()]
        reply.risk_max = float(risks.max()) if len(risks) else None
        reply.events = [asdict(event) for event in events[index]]
        is_recovered = origins[is_token] == Provenance.RECOVERED
        for event in events[index]:
            if event.outcome == "dismissed" and event.chosen is None and not event.is_prompt:
                # what stands there instead of a candidate: another token, and what followed it
                is_recovered[event.rolled_back_to : event.rolled_back_to + most] = True
        reply.num_recovered = int(is_recovered.sum())
        if reply.num_recovered:
            log_probs = self._log_probs(prompt, reply.tokens)
            reply.recovered_log_prob = float(log_probs[is_recovered.to(log_probs.device)].mean())
        return reply

    def encode(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Token ids of conversations in the chat template, up to where the answer begins.

        Raises:
            SafeSpecError: If the template refuses one.
        """
        texts = [
            render_prompt(self.tokenizer, Example(id=chat[-1]["content"][:40], messages=tuple(map(dict, chat))))
            for chat in chats
        ]
        encoded: Any = self.tokenizer(texts, add_special_tokens=False)
        return [ids[-self.max_prompt_tokens :] for ids in encoded["input_ids"]]

    @contextmanager
    def with_head(self, head: SafetyHead) -> Iterator[None]:
        """Another head on the target, for a while."""
        own = check_guarded(self.model).safety
        names = ("tokenizer", "policy", "ignore_mismatches", "draft", "draft_head")
        known: Any = {name: getattr(own, name) for name in names}
        attach_safety_head(self.model, head, **known)
        try:
            yield
        finally:
            attach_safety_head(self.model, own.head, **known)

    def _generate(self, prompts: Sequence[list[int]], **arguments: Any) -> tuple[Any, float]:
        inputs, device = pad_left(self.model, self.tokenizer, prompts), self.model.device
        generate: Any = self.model.generate
        _synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode():
            output = generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.max_new_tokens,
                **arguments,
            )
        _synchronize(device)
        return output, time.perf_counter() - start

    def _reply(self, tokens: list[int], reason: str, seconds: float) -> Reply:
        ends = stop_ids(self.model)
        spoken = [token for token in tokens if token not in ends]
        text, stop = str(self.tokenizer.decode(spoken, skip_special_tokens=True)), next_turn(self.tokenizer)
        # a base model goes on with the next question itself
        return Reply(
            text=text.partition(stop)[0] if stop else text, tokens=tokens, finish_reason=reason, seconds=seconds
        )

    @torch.inference_mode()
    def _log_probs(self, prompt: list[int], tokens: list[int]) -> Tensor:
        """Of every token under the plain target, given the prompt and what the caller sees before it."""
        if not tokens:
            return torch.zeros(0)
        ids = torch.tensor([prompt + tokens], device=self.model.device)
        logits = self.model(input_ids=ids, logits_to_keep=len(tokens) + 1, use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def check_guarded(model: PreTrainedModel) -> GuardedModel:
    """The model, which has a head.

    Raises:
        SafeSpecError: If it has none.
    """
    if not isinstance(model, GuardedModel):
        raise SafeSpecError(
            "Guarded methods need a safety head for the target: give one with `--head`, or leave these methods out."
        )
    return model


def _parts(output: SafeSpecOutput) -> tuple[Tensor, Tensor, list[list[SafeSpecEvent]], list[str]]:
    """What a guarded call always returns, for type checkers."""
    assert output.provenance is not None
    assert output.risks is not None
    assert output.events is not None
    assert output.finish_reasons is not None
    return output.provenance, output.risks, output.events, output.finish_reasons


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
