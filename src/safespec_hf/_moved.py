"""Import paths from before modules had folders: each leads to the very module that has the name's new home."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HOMES = {
    "cache": "engine.cache",
    "candidates": "drafting.candidates",
    "card": "heads.card",
    "default_target": "defaults.default_target",
    "draft": "heads.draft_head",
    "head": "heads.safety_head",
    "hub": "heads.hub",
    "logits": "answer.logits",
    "recovery": "answer.recovery",
    "scoring": "answer.pooling",
    "training.distill": "distilling.distill",
    "verification": "decoding.verification",
}
"""Modules with names that are public or documented, by their old paths."""

_PACKAGE = __name__.rpartition(".")[0]


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        home = HOMES.get(fullname.removeprefix(f"{_PACKAGE}."))
        return ModuleSpec(fullname, self, origin=home) if home and fullname.startswith(f"{_PACKAGE}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{_PACKAGE}.{spec.origin}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # it has run under its own name, and keeps its own spec
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Finder())
