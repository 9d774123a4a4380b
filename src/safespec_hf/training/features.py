"""Features of labelled answers at several prefixes, cached on disk.

Shapes: P prefixes of all answers of a shard, L layers, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.pooling import find_newline_ids
from ..config import SafeSpecConfig
from ..errors import SafeSpecError
from ..heads.safety_head import target_binding
from .data import Example, hash_examples
from .hidden import Encoded, encode, make_batches, pool_answer, read_hidden, span_counts
from .shards import compute_shards, plan_shards


class Reading(NamedTuple):
    """A way to read an answer: `pooling` and `span` as in [`SafetyHeadConfig`]."""

    pooling: str
    span: str

    @property
    def name(self) -> str:
        """For files and tables, such as `"mean-answer"`."""
        return f"{self.pooling}-{self.span}"


READINGS = (
    Reading("last", "answer"),
    Reading("mean", "segment"),
    Reading("mean", "answer"),
    Reading("ewma", "answer"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSettings:
    """What is read of every answer.

    Args:
        layers (`tuple[int, ...]`): As in [`SafetyHeadConfig`].
        readings (`tuple[Reading, ...]`): Ways to pool.
        ewma_decay (`float`, defaults to 0.95): For `"ewma"`.
        prefix_tokens (`tuple[int, ...]`): Lengths of the prefixes; the whole answer is always one more.
        max_prompt_tokens, max_response_tokens (`int`): What is longer is cut, a prompt at its beginning.
        num_batch_tokens (`int`, defaults to 4096): Tokens of a batch, padding included.
        num_shard_examples (`int`, defaults to 64): Answers per file: what a kill can lose.
    """

    layers: tuple[int, ...]
    readings: tuple[Reading, ...] = READINGS
    ewma_decay: float = 0.95
    prefix_tokens: tuple[int, ...] = (4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224)
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 256
    num_batch_tokens: int = 4096
    num_shard_examples: int = 64


class Features(NamedTuple):
    """Features of a data set, one row per prefix, in the order of the examples.

    Attributes:
        states (`dict[str, torch.Tensor]`): By the reading's name, bfloat16 of shape `(P, L, H)`.
        example (`torch.Tensor` of shape `(P,)`): Which example a row belongs to.
        num_tokens (`torch.Tensor` of shape `(P,)`): Answer tokens in the prefix.
        num_chars (`torch.Tensor` of shape `(P,)`): Characters in it.
        is_last (`torch.Tensor` of shape `(P,)`): Whether it is the whole (or cut) answer.
        layers (`tuple[int, ...]`): What L counts through.
    """

    states: dict[str, Tensor]
    example: Tensor
    num_tokens: Tensor
    num_chars: Tensor
    is_last: Tensor
    layers: tuple[int, ...]


def extract_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    cache_dir: str | os.PathLike[str],
    settings: FeatureSettings,
) -> Features:
    """Reads all examples, or what an earlier run with the same target, tokenizer, data and settings has left to read.

    Under `accelerate launch` the processes share the work; the files are the same for any number of them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        examples (`Sequence[Example]`): Answered ones.
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of everything that matters.
        settings ([`FeatureSettings`]): What to read.

    Returns:
        [`Features`]: Of all examples.
    """
    folder = Path(cache_dir) / cache_key(model, tokenizer, examples, settings)
    encoded = [encode(tokenizer, e, settings.max_prompt_tokens, settings.max_response_tokens) for e in examples]
    shards = plan_shards([text.num_tokens for text in encoded], settings.num_shard_examples)
    newline_ids = find_newline_ids(tokenizer)

    def compute(number: int) -> dict[str, Tensor]:
        tensors = _read_shard(model, {index: encoded[index] for index in shards[number]}, settings, newline_ids)
        tensors["num_chars"] = _count_chars(tokenizer, encoded, tensors)
        return tensors

    return load_features(compute_shards(folder, len(shards), compute, "features"), settings)


def cache_key(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: FeatureSettings
) -> str:
    """16 hex digits over everything that features depend on."""
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()
    parts = [target_binding(model, tokenizer), template, str(model.dtype), hash_examples(examples), asdict(settings)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_features(files: Sequence[Path], settings: FeatureSettings) -> Features:
    """Puts shards together, in the order of the examples."""
    shards = [load_file(file) for file in files]
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    # examples lie in shards by length; rows of one example are already in order
    order = torch.argsort(joined["example"], stable=True)
    states = {reading.name: joined.pop(reading.name)[order] for reading in settings.readings}
    index = {name: tensor[order] for name, tensor in joined.items()}
    return Features(states, **index, layers=settings.layers)


def prefix_positions(num_tokens: int, prefix_tokens: Sequence[int]) -> list[int]:
    """Lengths of the prefixes of an answer; the last one is the answer.

    Example:

        >>> prefix_positions(20, [8, 16, 32])
        [8, 16, 20]
    """
    return [length for length in sorted(prefix_tokens) if length < num_tokens] + [num_tokens]


def _read_shard(
    model: PreTrainedModel, texts: dict[int, Encoded], settings: FeatureSettings, newline_ids: frozenset[int]
) -> dict[str, Tensor]:
    indices = list(texts)
    parts: dict[int, dict[str, Tensor]] = {}
    for batch in make_batches([texts[index].num_tokens for index in indices], settings.num_batch_tokens):
        chosen = [indices[position] for position in batch]
        states = read_hidden(model, [texts[index] for index in chosen], settings.layers)
        for index, hidden_TF in zip(chosen, states, strict=True):
            parts[index] = _pool_prefixes(index, texts[index], hidden_TF, settings, newline_ids)
    names = next(iter(parts.values()))
    return {name: torch.cat([parts[index][name] for index in sorted(parts)]) for name in names}


def _pool_prefixes(
    index: int, text: Encoded, hidden_TF: Tensor, settings: FeatureSettings, newline_ids: frozenset[int]
) -> dict[str, Tensor]:
    lengths = prefix_positions(len(text.response_ids), settings.prefix_tokens)
    rows = torch.tensor(lengths) - 1
    tensors = {
        "example": torch.full((len(lengths),), index),
        "num_tokens": torch.tensor(lengths),
        "is_last": torch.tensor([length == lengths[-1] for length in lengths]),
    }
    for reading in settings.readings:
        counts = span_counts(text.response_ids, reading.span, newline_ids, SafeSpecConfig())
        pooled_PF = pool_answer(hidden_TF, counts, reading.pooling, settings.ewma_decay)[rows]
        tensors[reading.name] = pooled_PF.view(len(lengths), len(settings.layers), -1).to(torch.bfloat16)
    return tensors


def _count_chars(tokenizer: PreTrainedTokenizerBase, encoded: Sequence[Encoded], tensors: dict[str, Tensor]) -> Tensor:
    pairs = zip(tensors["example"].tolist(), tensors["num_tokens"].tolist(), strict=True)
    texts = tokenizer.batch_decode([encoded[index].response_ids[:length] for index, length in pairs])
    return torch.tensor([len(text) for text in texts])


def default_settings(
    model: PreTrainedModel, layers: Sequence[int] | None = None, *, max_response_tokens: int = 256
) -> FeatureSettings:
    """Settings for a target.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        layers (`Sequence[int]`, *optional*): Hidden states to read. Default: from the middle on, about five of them.
        max_response_tokens (`int`, *optional*, defaults to 256): Longer answers are cut.

    Raises:
        SafeSpecError: If the target has no such hidden state.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    # the paper found the first quarter of the layers useless and all from the middle on alike
    chosen = tuple(range(total // 2, total + 1, max(1, total // 10))) if layers is None else tuple(layers)
    check_layers(model, chosen)
    return FeatureSettings(layers=chosen, max_response_tokens=max_response_tokens)


def check_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Raises unless a target has these hidden states.

    Raises:
        SafeSpecError: If it lacks one, or if one is named twice, or none.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer <= total for layer in layers):
        raise SafeSpecError(
            f"Layers must be different numbers from 0 (the embeddings) to {total} for this target, but they are "
            f"{list(layers)}."
        )
