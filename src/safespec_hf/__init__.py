"""Speculative decoding that checks safety in the same forward pass, for any transformers model."""

from .candidates import SafeSpecCandidateGenerator
from .config import SafeSpecConfig, SafetyHeadConfig
from .default_target import (
    DEFAULT_TARGET_ID,
    load_default_draft,
    load_default_head,
    load_default_target,
    load_truncated_draft,
)
from .draft import DraftHead, DraftHeadConfig
from .errors import HeadFileError, HeadMismatchError, SafeSpecError, UnsupportedRequestError
from .head import SafetyHead, target_binding
from .logits import SafeSpecLogitsProcessor
from .modeling import attach_safety_head, detach_safety_head
from .outputs import Provenance, SafeSpecEvent, SafeSpecOutput, SafeSpecStatistics

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_TARGET_ID",
    "DraftHead",
    "DraftHeadConfig",
    "HeadFileError",
    "HeadMismatchError",
    "Provenance",
    "SafeSpecCandidateGenerator",
    "SafeSpecConfig",
    "SafeSpecError",
    "SafeSpecEvent",
    "SafeSpecLogitsProcessor",
    "SafeSpecOutput",
    "SafeSpecStatistics",
    "SafetyHead",
    "SafetyHeadConfig",
    "UnsupportedRequestError",
    "__version__",
    "attach_safety_head",
    "detach_safety_head",
    "load_default_draft",
    "load_default_head",
    "load_default_target",
    "load_truncated_draft",
    "target_binding",
]
