"""Arguments and options that several commands share: their names, and what is legal, checked before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import SafeSpecError
from ..training.chat_template import read_template
from ..training.settings import NUM_SEEDS

MAX_COUNT = 1_000_000
MAX_SEED = NUM_SEEDS - 1


def parse_path(text: str | Path) -> Path:  # defaults are parsed, too
    """A path. An empty one would be the current folder."""
    return Path(parse_name(str(text))).expanduser()


def parse_name(text: str) -> str:
    """A path, or an id on the Hub."""
    if not text.strip() or "\0" in text:
        raise typer.BadParameter(f"{text!r} is neither a path nor an id.")
    return text


def parse_layers(text: str) -> list[int]:
    """Numbers of hidden states, of any target: which of them there are is seen when it is loaded."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 4 for part in parts):
        raise typer.BadParameter(f"expected numbers with commas between them, such as 12,18,24, but got {text!r}.")
    return [int(part) for part in parts]


def check_share(value: float) -> float:
    """A number strictly between 0 and 1."""
    if not 0 < value < 1:
        raise typer.BadParameter(f"expected a number between 0 and 1, without these, but got {value}.")
    return value


def parse_template(name: str) -> str:
    """The chat template of that name, or in that file."""
    try:
        return read_template(parse_name(name))
    except SafeSpecError as error:
        raise typer.BadParameter(str(error)) from error


DATA_HELP = "JSON lines, CSV, Parquet, a folder of `datasets.save_to_disk`, or the id of a data set on the Hub."
Data = Annotated[list[str], typer.Argument(parser=parse_name, metavar="DATA", help=DATA_HELP)]
Prompts = Annotated[list[str], typer.Argument(parser=parse_name, metavar="PROMPTS", help=DATA_HELP)]
Benign = Annotated[
    list[str] | None,
    typer.Option(parser=parse_name, metavar="DATA", help="As DATA, but rows without a label are safe. Repeatable."),
]
Validation = Annotated[
    list[str] | None,
    typer.Option(parser=parse_name, metavar="DATA", help="Labelled answers to choose by. Repeatable."),
]
Target = Annotated[
    str | None,
    typer.Option(
        parser=parse_name, metavar="MODEL", help="The target, a Hub id or folder. Default: SmolLM2-135M-Instruct."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        parser=parse_template, metavar="NAME", help="For a base model, which has none: plain, or a file with Jinja."
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(metavar="TYPE", help="Of the target's weights: float32, bfloat16 or float16."),
]
Cache = Annotated[
    Path,
    typer.Option(parser=parse_path, metavar="FOLDER", help="Keeps features and risks, so that a killed run goes on."),
]
DEFAULT_CACHE = Path("~/.cache/safespec-hf/training")
Alpha = Annotated[
    float,
    typer.Option(metavar="SHARE", callback=check_share, help="Bound on the share of benign answers flagged anywhere."),
]
Head = Annotated[Path, typer.Argument(parser=parse_path, metavar="HEAD", help="Folder of the head.")]
LAYERS_HELP = "Hidden states to read, such as 12,18,24. Default: from the middle on."
MaxTokens = Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Longer answers are cut.")]
