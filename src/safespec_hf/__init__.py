"""Speculative decoding that checks safety in the same forward pass, for any transformers model."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import _moved  # noqa: F401  # lets old import paths be found

if TYPE_CHECKING:
    from .answer.logits import SafeSpecLogitsProcessor
    from .config import SafeSpecConfig
    from .defaults.default_target import (
        DEFAULT_TARGET_ID,
        load_default,
        load_default_draft,
        load_default_head,
        load_default_target,
        load_truncated_draft,
    )
    from .drafting.candidates import SafeSpecCandidateGenerator
    from .errors import HeadFileError, HeadMismatchError, SafeSpecError, UnsupportedRequestError
    from .exporting.export import export_guarded
    from .heads.draft_head import DraftHead, DraftHeadConfig
    from .heads.eagle import load_eagle3_draft
    from .heads.head_config import SafetyHeadConfig
    from .heads.safety_head import SafetyHead, target_binding
    from .modeling import GuardedModel, attach_safety_head, detach_safety_head
    from .outputs import (
        Provenance,
        SafeSpecEvent,
        SafeSpecOutput,
        SafeSpecSegment,
        SafeSpecStatistics,
        carried_risk,
    )

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_TARGET_ID",
    "DraftHead",
    "DraftHeadConfig",
    "GuardedModel",
    "HeadFileError",
    "HeadMismatchError",
    "Provenance",
    "SafeSpecCandidateGenerator",
    "SafeSpecConfig",
    "SafeSpecError",
    "SafeSpecEvent",
    "SafeSpecLogitsProcessor",
    "SafeSpecOutput",
    "SafeSpecSegment",
    "SafeSpecStatistics",
    "SafetyHead",
    "SafetyHeadConfig",
    "UnsupportedRequestError",
    "__version__",
    "attach_safety_head",
    "carried_risk",
    "detach_safety_head",
    "export_guarded",
    "load_default",
    "load_default_draft",
    "load_default_head",
    "load_default_target",
    "load_eagle3_draft",
    "load_truncated_draft",
    "target_binding",
]

# Loaded when they are first asked for: importing transformers takes seconds, which `safespec --help` must not.
_HOMES = {
    "answer.logits": ["SafeSpecLogitsProcessor"],
    "config": ["SafeSpecConfig"],
    "defaults.default_target": [
        "DEFAULT_TARGET_ID",
        "load_default",
        "load_default_draft",
        "load_default_head",
        "load_default_target",
        "load_truncated_draft",
    ],
    "drafting.candidates": ["SafeSpecCandidateGenerator"],
    "errors": ["HeadFileError", "HeadMismatchError", "SafeSpecError", "UnsupportedRequestError"],
    "exporting.export": ["export_guarded"],
    "heads.draft_head": ["DraftHead", "DraftHeadConfig"],
    "heads.eagle": ["load_eagle3_draft"],
    "heads.head_config": ["SafetyHeadConfig"],
    "heads.safety_head": ["SafetyHead", "target_binding"],
    "modeling": ["GuardedModel", "attach_safety_head", "detach_safety_head"],
    "outputs": [
        "Provenance",
        "SafeSpecEvent",
        "SafeSpecOutput",
        "SafeSpecSegment",
        "SafeSpecStatistics",
        "carried_risk",
    ],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "transformers" in sys.modules:  # then it costs nothing, and `AutoModel.from_pretrained` knows our heads at once
    importlib.import_module(".heads.safety_head", __name__)
    importlib.import_module(".heads.draft_head", __name__)
    importlib.import_module(".heads.eagle", __name__)
