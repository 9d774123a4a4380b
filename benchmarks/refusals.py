"""Requests for safety that can't be met: what invariant I5 asks for, and whether each is refused in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from safespec_hf import (
    SafeSpecConfig,
    SafeSpecError,
    SafetyHead,
    SafetyHeadConfig,
    attach_safety_head,
    detach_safety_head,
)

Case = tuple[str, Callable[[], object]]


def refusals(streamer: BaseStreamer) -> list[Case]:
    """Every way to ask for safety that can't be met."""
    words = tiny.build_tokenizer()
    target, plain, other = tiny.build_model(), tiny.build_model(seed=1), tiny.build_model(hidden_size=16)
    head = tiny.build_head(target)
    unbound = SafetyHead(SafetyHeadConfig(hidden_size=32, hidden_layers=[1]))
    attach_safety_head(target, head, tokenizer=words)
    always = attach_safety_head(tiny.build_model(), head, tokenizer=words, always=True)
    detached = detach_safety_head(attach_safety_head(tiny.build_model(), head, tokenizer=words))
    encoder_decoder = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    ids = torch.randint(9, 40, (2, 6))

    def ask(**kwargs: Any) -> Callable[[], object]:
        return lambda: target.generate(ids, **({"safespec": True, "max_new_tokens": 4} | kwargs))

    return [
        ("no head", lambda: plain.generate(ids, safespec=True)),
        ("head of another target", lambda: attach_safety_head(other, head, tokenizer=words)),
        ("head without a binding", lambda: attach_safety_head(plain, unbound, tokenizer=words)),
        ("encoder-decoder", lambda: attach_safety_head(encoder_decoder, head)),
        ("num_beams", ask(num_beams=2)),
        ("unknown way of speculation", ask(speculation_type="guess")),
        ("paged cache", ask(cache_implementation="paged")),
        ("offloaded cache", ask(cache_implementation="offloaded")),
        ("prefill in chunks", ask(prefill_chunk_size=2)),
        ("row of padding only", ask(attention_mask=torch.tensor([[1] * 6, [0] * 5 + [1]]) * torch.tensor([[1], [0]]))),
        ("vocabulary mismatch", ask(assistant_model=tiny.build_model(vocab_size=30))),
        ("two drafts", ask(assistant_model=plain, assistant_early_exit=1)),
        ("custom_generate", ask(custom_generate=lambda *_, **__: None)),
        ("embeddings of other tokens", ask(inputs_embeds=torch.zeros(2, 5, 32))),
        ("unknown forward argument", ask(token_type_ids=ids)),
        ("drafts that weigh in", ask(assistant_model=plain, assistant_ensemble_weight=0.5)),
        ("the target as a draft", ask(is_assistant=True)),
        ("token healing", ask(token_healing=True)),
        ("streamer with a batch", ask(streamer=streamer)),
        ("classifier-free guidance", ask(guidance_scale=2.0)),
        ("not a policy", ask(safespec="strict")),
        ("policy out of range", lambda: SafeSpecConfig(num_candidates=0)),
        ("head off where always on", lambda: always.generate(ids, safespec=False)),
        ("continuous batching where always on", lambda: always.generate_batch([[9, 10]])),
        ("after detaching", lambda: detached.generate(ids, safespec=True)),
        ("in a generation config", ask(generation_config=GenerationConfig(safespec=True, num_beams=2), safespec=None)),
    ]  # fmt: skip


def segment_refusals() -> list[Case]:
    """What segment mode can't do."""
    digits, words = tiny.build_tokenizer(has_digits=True), tiny.build_tokenizer()
    target, draft = tiny.build_model(), tiny.build_model(seed=1)
    head = tiny.build_head(target)
    attach_safety_head(target, head, tokenizer=digits)
    wordy = attach_safety_head(tiny.build_model(), head, tokenizer=words)
    ids, policy = torch.randint(9, 28, (2, 6)), SafeSpecConfig(verification="segment")

    def ask(model: Any = target, **kwargs: Any) -> Callable[[], object]:
        return lambda: model.generate(ids, safespec=policy, max_new_tokens=4, **kwargs)

    return [
        ("no draft", ask()),
        ("draft head", ask(assistant_model=tiny.build_draft_head(target))),
        ("prompt lookup", ask(prompt_lookup_num_tokens=3)),
        ("prompt lookup beside a draft", ask(prompt_lookup_num_tokens=3, assistant_model=draft)),
        ("tokenizer without digits", ask(wordy, assistant_model=draft)),
        ("threshold out of range", lambda: SafeSpecConfig(quality_threshold=10)),
    ]


def not_refused(cases: list[Case]) -> list[str]:
    """The cases that raise nothing, or only after a forward."""
    missed = []
    calls = [0]
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for name, request in cases:
        try:
            calls[0] = 0
            request()
            missed.append(name)
        except (SafeSpecError, ValueError, TypeError):
            missed += [f"{name} (after a forward)"] if calls[0] else []
    hook.remove()
    return missed
