"""Risks of whole answers at every token, cached on disk: what calibration, reports and benchmarks are made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..heads.safety_head import SafetyHead, target_binding
from .data import Example, hash_examples
from .hidden import score_answers
from .shards import compute_shards, plan_shards

NUM_SHARD_EXAMPLES = 64


def read_risks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: SafetyHead,
    examples: Sequence[Example],
    cache_dir: str | os.PathLike[str],
    *,
    max_prompt_tokens: int = 1024,
    max_response_tokens: int = 256,
) -> list[Tensor]:
    """The risk of every token of every answer, as decoding sees it, or from the cache of an earlier run.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        head ([`SafetyHead`]): Its head.
        examples (`Sequence[Example]`): Answered ones.
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of everything that matters.
        max_prompt_tokens, max_response_tokens (`int`): What is longer is cut, a prompt at its beginning.

    Returns:
        `list[torch.Tensor]`: One of shape `(T,)` per example.
    """
    limits = [max_prompt_tokens, max_response_tokens]
    binding = target_binding(model, tokenizer)
    parts = [binding, str(model.dtype), hash_head(head), hash_examples(examples), limits]
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    shards = plan_shards([len(example.response) for example in examples], NUM_SHARD_EXAMPLES)

    def compute(number: int) -> dict[str, Tensor]:
        chosen = [examples[index] for index in shards[number]]
        scored = score_answers(
            model,
            tokenizer,
            head,
            chosen,
            max_prompt_tokens=max_prompt_tokens,
            max_response_tokens=max_response_tokens,
        )
        return {str(shards[number][index]): risks_T for index, risks_T in scored}

    risks: dict[str, Tensor] = {}
    for file in compute_shards(folder, len(shards), compute, "risks"):
        risks |= load_file(file)
    return [risks[str(index)] for index in range(len(examples))]


def hash_head(head: SafetyHead) -> str:
    """16 hex digits over a head's weights and what it reads; the threshold and the card are not in it."""
    config = head.config
    digest = hashlib.sha256(repr((config.hidden_layers, config.pooling, config.span, config.ewma_decay)).encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def highest(risks: Sequence[Tensor]) -> Tensor:
    """The score of each answer: its highest risk over all decision points, of shape `(N,)`."""
    return torch.stack([risks_T.max() for risks_T in risks])
