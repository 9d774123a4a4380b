"""The drafts that the speed benchmark can be asked for by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import safespec_hf
from safespec_hf import DraftHead, DraftHeadConfig, load_truncated_draft


class Draft(NamedTuple):
    """What our arms draft with: a model or head with a lookup beside it, prompt lookup alone, or nothing."""

    name: str
    model: Any = None
    is_lookup: bool = False


def load_draft(name: str, target: PreTrainedModel) -> Draft:
    """Reads `--draft`.

    Args:
        name: `default` (the package's own draft for the target; prompt lookup while there is none), `none`, `lookup`,
            `truncated:N`, or the folder of a draft head or of a language model.
        target: The model it is for.
    """
    if name in ("none", "lookup"):
        return Draft(name, None, name == "lookup")
    load_default: Any = getattr(safespec_hf, "load_default_draft", None)
    if name == "default" and load_default is None:
        print("This version of safespec_hf has no draft of its own: prompt lookup is used in its place.")
        return Draft("lookup, as there is no default draft yet", None, True)
    if name == "default":
        return Draft(name, load_default(target))
    if name.startswith("truncated:"):
        return Draft(name, load_truncated_draft(target, int(name.partition(":")[2])))
    return Draft(Path(name).name, load_folder(Path(name), target))


def load_folder(folder: Path, target: PreTrainedModel) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(f"`--draft` names no draft and no folder: {str(folder)!r}.")
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type == DraftHeadConfig.model_type:
        head: Any = DraftHead.from_pretrained(folder)
        return head.to(target.device, target.dtype).eval().bind(target)
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
