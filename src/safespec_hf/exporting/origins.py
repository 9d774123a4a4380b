"""Whether what is attached is still what the Hub has, so that a light export may point there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import HeadFileError
from ..heads.loading import StrictModel
from ..heads.safety_head import SafetyHead

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_as_published(part: PreTrainedModel, name: str, revision: str | None) -> bool:
    """Whether a repository holds a head, draft or target as it is now.

    Heads are small, and are compared as a whole. Of other models the first and the last row of every weight are, as
    far as their files lie in the Hub's cache: what was trained, merged or loaded at another revision shows there.

    Args:
        part ([`~transformers.PreTrainedModel`]): The model, in whatever precision.
        name, revision (`str`): Id on the Hub, and the commit.
    """
    if isinstance(part, StrictModel):
        return _is_same_head(part, name, revision)
    weights = part.state_dict()
    return all(_is_same_file(weights, file) for file in _cached_files(name, revision))


def _is_same_head(head: StrictModel, name: str, revision: str | None) -> bool:
    try:
        published = type(head).from_pretrained(name, revision=revision)
    except HeadFileError:
        return False
    # a draft is cast to the target's precision when it is loaded; of a safety head it would be another risk
    is_same = not isinstance(head, SafetyHead) or head.dtype == published.dtype
    weights, theirs = head.state_dict(), published.state_dict()
    is_same = is_same and weights.keys() == theirs.keys() and _content(head) == _content(published)
    return is_same and all(torch.equal(weights[key], theirs[key].to(weights[key])) for key in weights)


def _content(head: StrictModel) -> dict[str, Any]:
    """What a head's config says beside what every config does."""
    names = [field.name for field in fields(head.config) if field.name in type(head.config).__annotations__]
    return {name: getattr(head.config, name) for name in names}


def _cached_files(name: str, revision: str | None) -> Iterator[Path]:
    """The files of a repository's weights, as far as they are there without asking the Hub."""
    index = try_to_load_from_cache(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    names = {SAFE_WEIGHTS_NAME}
    if isinstance(index, str):
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    found = [try_to_load_from_cache(name, file, revision=revision) for file in sorted(names)]
    yield from (Path(file) for file in found if isinstance(file, str))


def _is_same_file(weights: dict[str, Tensor], file: Path) -> bool:
    with safe_open(file, framework="pt") as stored:
        for key in weights.keys() & set(stored.keys()):
            own, theirs = weights[key], stored.get_slice(key)
            if own.is_meta or own.dtype not in _DTYPES or own.dim() == 0 or list(own.shape) != theirs.get_shape():
                continue  # nowhere, quantized, or put together otherwise: nothing that could be told by a look
            for at in {0, len(own) - 1}:
                row = theirs[at : at + 1]
                if row.dtype in _DTYPES and not torch.equal(own[at : at + 1], row.to(own)):
                    return False
    return True
