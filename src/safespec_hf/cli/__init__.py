"""The command `safespec`: from labelled text to a calibrated, published head. Thin: the work is in `training` and
`evaluation`.

Nothing here imports torch, transformers or an extra at its top: `safespec --help` answers at once, in any install.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import SafeSpecError
from .evaluate import evaluate, report_evaluation
from .export import export
from .make_head import make_head
from .make_judge import make_judge
from .making import calibrate, collect, distill_draft, features, report, train
from .serving import OTHERS, serve
from .sharing import push, show
from .train_prompts import train_prompts

__all__ = ["app", "main", "run"]

EXTRAS = {
    "datasets": "data",
    "matplotlib": "train",
    "pyarrow": "data",
    "scipy": "train",
    "sklearn": "train",
    "vllm": "vllm",
}
"""The extra that brings a package, by the name that the package is imported by."""

INTERRUPTED = "interrupted; the same command goes on where it was."

app = typer.Typer(
    name="safespec",
    help="Safety heads for speculative decoding: collect answers, train, calibrate, measure, publish, and evaluate.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (
    make_head,
    collect,
    features,
    train,
    calibrate,
    train_prompts,
    report,
    distill_draft,
    make_judge,
    evaluate,
    report_evaluation,
    export,
    push,
    show,
):
    app.command()(command)
app.command(context_settings=OTHERS)(serve)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"safespec-hf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before a command."""


def main() -> NoReturn:
    """Runs the command with the arguments of this process, and ends it."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command. What a user can mend is told in one line, on stderr, without a traceback.

    Args:
        arguments (`Sequence[str]`): Of the command line, without the program's name.

    Returns:
        `int`: The exit status: 0, 1 for what could not be done, 2 for arguments that make no sense, or 130 if it was
        interrupted.

    Example:

        >>> from safespec_hf.cli import run
        >>> run(["--version"])
        safespec-hf 0.1.0
        0
    """
    try:
        status = app(list(arguments), prog_name="safespec", standalone_mode=False) or 0
        return _fail(INTERRUPTED, 130) if status == 130 else status  # typer makes that of an interrupt
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f'this needs {package}, which is not installed: pip install "safespec-hf[{EXTRAS[package]}]"')
    except (SafeSpecError, OSError) as error:
        return _fail(str(error) or type(error).__name__)


def _fail(message: str, status: int = 1) -> int:
    if message:  # there is none after a help that nobody asked for
        typer.secho(f"safespec: {' '.join(message.split())}", fg="red", err=True)
    return status
