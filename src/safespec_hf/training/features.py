"""Features of labelled answers at several prefixes, cached on disk.

Shapes: P prefixes of all answers of a shard, L layers, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.segments import Boundaries, find_boundaries
from ..config import SafeSpecConfig
from ..errors import SafeSpecError
from .data import Example
from .hidden import Encoded, describe_states, encode, make_batches, pool_answer, read_hidden, span_counts
from .settings import check_counts, check_number, check_ranges
from .shards import Place, compute_shards, load_shard


class Reading(NamedTuple):
    """A way to read an answer: `pooling` and `span` as in [`SafetyHeadConfig`]."""

    pooling: str
    span: str

    @property
    def name(self) -> str:
        """For files and tables, such as `"mean-answer"`."""
        return f"{self.pooling}-{self.span}"

    @property
    def parts(self) -> list[Reading]:
        """One for each way of pooling."""
        return [Reading(way, self.span) for way in self.pooling.split("+")]

    @classmethod
    def parse(cls, text: str) -> Reading:
        """The reading of that name.

        Raises:
            SafeSpecError: If there is none; names all that there are.

        Example:

            >>> Reading.parse("mean-answer")
            Reading(pooling='mean', span='answer')
        """
        names = [reading.name for reading in READINGS]
        pooling, _, span = text.rpartition("-")
        parts = [part.name for part in cls(pooling, span).parts]
        if not set(parts) <= set(names) or len(set(parts)) < len(parts):
            raise SafeSpecError(
                f"A reading is a pooling and a span, one of {', '.join(names)}, or several poolings of one span, such "
                f"as mean+ewma-answer; but it is {text!r}."
            )
        return cls(pooling, span)


PER_ROW = ("num_tokens", "num_chars", "is_last")
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

    def __post_init__(self) -> None:
        check_counts(self, "max_prompt_tokens", "max_response_tokens", "num_batch_tokens", "num_shard_examples")
        check_ranges(self, {"ewma_decay": "(0, 1)"})
        for length in self.prefix_tokens:
            check_number("prefix_tokens", length, "[1, inf)", "an integer")
        if not self.readings:
            raise SafeSpecError("`readings` must name at least one way to pool, but it is empty.")


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Raises unless these are hidden states that a target has.

    Args:
        layers (`Sequence[int]`): As in [`SafetyHeadConfig`]: 0 is the embeddings, `num_layers` the last one.
        num_layers (`int`): The target's `num_hidden_layers`.

    Raises:
        SafeSpecError: If there are none, one is out of range, or one is named twice.
    """
    is_legal = all(isinstance(layer, int) and 0 <= layer <= num_layers for layer in layers)
    if not layers or not is_legal or len(set(layers)) < len(layers):
        raise SafeSpecError(
            f"Layers must be different numbers from 0 to {num_layers} for this target, but they are {list(layers)}."
        )


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
    """Reads all examples, or those that earlier runs with the same target, tokenizer and settings have left to read.

    What an earlier run read is found by its tokens, so another split of the data or one file more is no other data.

    Under `accelerate launch` the processes share the work; the files are the same for any number of them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        examples (`Sequence[Example]`): Answered ones.
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of target, tokenizer and settings.
        settings ([`FeatureSettings`]): What to read.

    Returns:
        [`Features`]: Of all examples.

    Raises:
        SafeSpecError: If the target lacks a layer, or the chat template refuses a conversation.
    """
    check_layers(settings.layers, model.config.get_text_config(decoder=True).num_hidden_layers)
    encoded = [encode(tokenizer, e, settings.max_prompt_tokens, settings.max_response_tokens) for e in examples]
    texts = {text.key: text for text in encoded}
    boundaries = find_boundaries(tokenizer)

    def compute(keys: Sequence[str]) -> dict[str, Tensor]:
        return _read_shard(model, tokenizer, [texts[key] for key in keys], settings, boundaries)

    lengths = {key: text.num_tokens for key, text in texts.items()}
    names = ["example", *(reading.name for reading in settings.readings), *PER_ROW]
    folder = Path(cache_dir) / cache_key(model, tokenizer, settings)
    places = compute_shards(folder, lengths, settings.num_shard_examples, compute, "features", lambda _: names)
    return load_features([places[text.key] for text in encoded], settings)


def cache_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: FeatureSettings) -> str:
    """16 hex digits over everything that features depend on besides the text."""
    read = [settings.layers, settings.readings, settings.ewma_decay, settings.prefix_tokens]
    parts = [*describe_states(model, tokenizer), *read]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_features(places: Sequence[Place], settings: FeatureSettings) -> Features:
    """Puts rows of shards together, in the order of the examples whose places these are."""
    rows: dict[int, dict[str, Tensor]] = {}
    for file in dict.fromkeys(place.file for place in places):
        shard = load_shard(file)
        # rows of one example lie together
        starts = [0, *shard["example"].bincount().cumsum(0).tolist()]
        for position, place in enumerate(places):
            if place.file == file:
                chosen = slice(starts[place.number], starts[place.number + 1])
                rows[position] = {name: tensor[chosen] for name, tensor in shard.items()}
    ordered = [rows[position] for position in range(len(places))]
    joined = {name: torch.cat([row[name] for row in ordered]) for name in ordered[0] if name != "example"}
    states = {reading.name: joined.pop(reading.name) for reading in settings.readings}
    sizes = torch.tensor([len(row["example"]) for row in ordered])
    example = torch.arange(len(ordered)).repeat_interleave(sizes)
    return Features(states, example=example, **joined, layers=settings.layers)


def prefix_positions(num_tokens: int, prefix_tokens: Sequence[int]) -> list[int]:
    """Lengths of the prefixes of an answer; the last one is the answer.

    Example:

        >>> prefix_positions(20, [8, 16, 32])
        [8, 16, 20]
    """
    return [length for length in sorted(prefix_tokens) if length < num_tokens] + [num_tokens]


def _read_shard(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Encoded],
    settings: FeatureSettings,
    boundaries: Boundaries,
) -> dict[str, Tensor]:
    parts: dict[int, dict[str, Tensor]] = {}
    for batch in make_batches([text.num_tokens for text in texts], settings.num_batch_tokens):
        states = read_hidden(model, [texts[index] for index in batch], settings.layers)
        for index, hidden_TF in zip(batch, states, strict=True):
            parts[index] = _pool_prefixes(index, texts[index], hidden_TF, settings, boundaries)
    tensors = {name: torch.cat([parts[index][name] for index in sorted(parts)]) for name in parts[0]}
    tensors["num_chars"] = _count_chars(tokenizer, texts, tensors)
    return tensors


def _pool_prefixes(
    index: int, text: Encoded, hidden_TF: Tensor, settings: FeatureSettings, boundaries: Boundaries
) -> dict[str, Tensor]:
    lengths = prefix_positions(len(text.response_ids), settings.prefix_tokens)
    rows = torch.tensor(lengths) - 1
    tensors = {
        "example": torch.full((len(lengths),), index),
        "num_tokens": torch.tensor(lengths),
        "is_last": torch.tensor([length == lengths[-1] for length in lengths]),
    }
    for reading in settings.readings:
        counts = span_counts(text.response_ids, reading.span, boundaries, SafeSpecConfig())
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
    check_layers(chosen, total)
    return FeatureSettings(layers=chosen, max_response_tokens=max_response_tokens)
