"""Puts prompts of several files together, without the answers that others gave to them; see README.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Writes every prompt once, in the order of the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines with a field `prompt`")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    rows: dict[str, str] = {}
    for file in arguments.files:
        with file.open(encoding="utf-8") as lines:  # not splitlines(), which also splits at rare characters in texts
            for number, line in enumerate(lines, start=1):
                # a `response` would be taken for how the target's own answer begins
                rows.setdefault(json.loads(line)["prompt"].strip(), f"{file.stem}:{number}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    written = [
        json.dumps({"id": name, "prompt": prompt}, ensure_ascii=False) for prompt, name in rows.items() if prompt
    ]
    arguments.out.write_text("\n".join(written) + "\n", encoding="utf-8")
    print(f"{len(written)} prompts in {arguments.out}")


if __name__ == "__main__":
    main()
