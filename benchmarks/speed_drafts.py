"""The drafts that the speed benchmark can be asked for by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import safespec_hf
from safespec_hf import load_truncated_draft

LOOKUP = "lookup"


class Draft(NamedTuple):
    """What our arms draft with: a model of any kind, prompt lookup, both or nothing."""

    name: str
    model: Any = None
    has_lookup: bool = False


def load_draft(name: str, target: PreTrainedModel) -> Draft:
    """Reads `--draft`: parts joined by `+`, such as `default+lookup`.

    Args:
        name: `default` (the package's own draft for the target; prompt lookup while there is none), `none`, `lookup`,
            `truncated:N`, or a path.
        target: The model it is for.
    """
    parts = name.split("+")
    names = [part for part in parts if part not in (LOOKUP, "none")]
    if len(names) > 1:
        raise ValueError(f"`--draft` takes one draft model, with or without `+{LOOKUP}`, but got {name!r}.")
    load_default: Any = getattr(safespec_hf, "load_default_draft", None)
    if names == ["default"] and load_default is None:
        print("This version of safespec_hf has no draft of its own: prompt lookup is used in its place.")
        return Draft("lookup (no default draft yet)", None, True)
    has_lookup = LOOKUP in parts
    if not names:
        return Draft(name, None, has_lookup)
    return Draft(name, load_default(target) if names == ["default"] else load_model(names[0], target), has_lookup)


def load_model(name: str, target: PreTrainedModel) -> Any:
    if name.startswith("truncated:"):
        return load_truncated_draft(target, int(name.partition(":")[2]))
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"`--draft` names no draft and no folder: {name!r}.")
    draft_head = getattr(safespec_hf, "DraftHead", None)
    if draft_head is not None and '"LlamaForCausalLM"' not in (folder / "config.json").read_text(encoding="utf-8"):
        return draft_head.from_pretrained(folder).to(target.device, target.dtype).eval()
    draft: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=target.dtype)
    return draft.to(target.device).eval()


def load_hopeless_draft(target: PreTrainedModel, num_layers: int = 2) -> Any:
    """A truncated draft's architecture with random weights: it costs what a draft costs, and is never right."""
    config = copy.deepcopy(load_truncated_draft(target, num_layers).config)
    torch.manual_seed(0)
    draft: Any = AutoModelForCausalLM.from_config(config, dtype=target.dtype)  # type: ignore[no-untyped-call]
    return draft.to(target.device).eval()


def is_usable_by_transformers(draft: Any) -> bool:
    """Whether `generate(assistant_model=draft)` works: a language model of its own, not a head on the target."""
    return isinstance(draft, PreTrainedModel) and draft.can_generate()
