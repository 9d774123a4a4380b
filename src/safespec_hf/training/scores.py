"""Risks of whole answers at every token, cached on disk: what calibration, reports and benchmarks are made of.

Shapes: H heads, T tokens of an answer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.segments import find_boundaries
from ..config import SafeSpecConfig
from ..errors import SafeSpecError
from ..heads.safety_head import SafetyHead
from .data import Example
from .hidden import describe_states, encode, score_texts
from .shards import compute_texts

NUM_SHARD_EXAMPLES = 64
READING = ("hidden_layers", "pooling", "span", "ewma_decay", "unsafe_label")


def read_risks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heads: Sequence[SafetyHead],
    examples: Sequence[Example],
    cache_dir: str | os.PathLike[str],
    *,
    max_prompt_tokens: int = 1024,
    max_response_tokens: int = 256,
) -> list[list[Tensor]]:
    """The risk of every token of every answer, as decoding sees it, or from the cache of an earlier run.

    Each text is read once, for all heads.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        heads (`Sequence[SafetyHead]`): Its heads, one or more.
        examples (`Sequence[Example]`): Answered ones.
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of target and heads.
        max_prompt_tokens, max_response_tokens (`int`): What is longer is cut, a prompt at its beginning.

    Returns:
        `list[list[torch.Tensor]]`: For each head one of shape `(T,)` per example.

    Raises:
        SafeSpecError: If the chat template refuses a conversation, or a risk is no number.
    """
    encoded = [encode(tokenizer, example, max_prompt_tokens, max_response_tokens) for example in examples]
    texts = {text.key: text for text in encoded}
    boundaries, policy = find_boundaries(tokenizer), SafeSpecConfig()

    def compute(keys: Sequence[str]) -> dict[str, Tensor]:
        scored = dict(score_texts(model, heads, [texts[key] for key in keys], boundaries, policy))
        if any(bool(risks_HT.isnan().any()) for risks_HT in scored.values()):
            raise SafeSpecError("The head gives risks that are no numbers: its weights are broken. Train it again.")
        return {str(index): risks_HT for index, risks_HT in scored.items()}

    parts = [*describe_states(model, tokenizer), *([hash_head(head), str(head.dtype)] for head in heads)]
    lengths = {key: text.num_tokens for key, text in texts.items()}
    found = compute_texts(cache_dir, parts, lengths, NUM_SHARD_EXAMPLES, compute, "risks")
    return [[found[text.key][number] for text in encoded] for number in range(len(heads))]


def hash_head(head: SafetyHead) -> str:
    """16 hex digits over a head's weights and what it reads; the threshold and the card are not in it."""
    how = tuple(getattr(head.config, name) for name in READING)
    digest = hashlib.sha256(repr(how).encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe_head(head: SafetyHead) -> dict[str, Any]:
    """All that a head's flags depend on, as JSON can hold it: weights, reading, and every threshold."""
    config, points = head.config, head.config.operating_points or {}
    thresholds = ("risk_threshold", "prompt_threshold")
    return {
        "hash": hash_head(head),
        "dtype": str(head.dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in (*READING, *thresholds)},
        "operating_points": {
            name: {field: point[field] for field in thresholds if field in point} for name, point in points.items()
        },
    }


def highest(risks: Sequence[Tensor]) -> Tensor:
    """The score of each answer: its highest risk over all decision points, of shape `(N,)`."""
    return torch.stack([risks_T.max() for risks_T in risks])
