"""Commands that show a head and publish it. They need no extra."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SafeSpecError
from .options import Head, parse_name, parse_path

LICENSE_HELP = "Of the head's weights, as the Hub abbreviates it, such as apache-2.0. Default: what its card says."


def push(
    head: Head,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where to, on the Hub.")],
    license: Annotated[str | None, typer.Option(metavar="LICENCE", help=LICENSE_HELP)] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            parser=parse_path,
            metavar="FOLDER",
            help="What `safespec report` wrote, pictures too. Default: the figures that it kept beside the head.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is missing.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and send nothing.")] = False,
) -> None:
    """Publishes a head, or what `safespec export` wrote, with its card, on the Hub.

    Example: `safespec push head owner/smollm2-135m-safety-head --license apache-2.0 --dry-run`
    """
    from ..exporting.export import is_export
    from ..heads.hub import describe_push, find_license, push_head

    if is_export(head):
        if report is not None:
            raise SafeSpecError("`--report` belongs to a head. The export has what its head was saved with.")
        _push_export(head, repo_id, license, private=private, revision=revision, dry_run=dry_run)
        return
    if dry_run:
        typer.echo(describe_push(head, repo_id, revision=revision, report=report, license=license))
        return
    if license is None and head.is_dir():
        license = find_license(head) or _ask_license()
    typer.echo(push_head(head, repo_id, private=private, revision=revision, report=report, license=license))


def _push_export(
    folder: Path, repo_id: str, license: str | None, *, private: bool, revision: str | None, dry_run: bool
) -> None:
    from ..exporting.push import describe_files, push_guarded
    from ..heads.hub import find_license

    if dry_run:
        files = describe_files(folder, repo_id, license=license, revision=revision)
        sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
        typer.echo("\n".join(f"  {name}, {size:,} bytes" for name, size in sorted(sizes.items())))
        typer.echo(push_guarded(folder, repo_id, license=license, revision=revision, dry_run=True))
        return
    if license is None:
        license = find_license(folder) or _ask_license("guarded model")
    typer.echo(push_guarded(folder, repo_id, license=license, private=private, revision=revision))


def _ask_license(thing: str = "head") -> str:
    if not sys.stdin.isatty():
        raise SafeSpecError(
            f"Under which licence are the {thing}'s weights published? Give it with `--license`, such as "
            "`--license apache-2.0`."
        )
    return str(typer.prompt(f"Licence of the {thing}'s weights, such as apache-2.0", err=True))


def show(
    head: Annotated[str, typer.Argument(parser=parse_name, metavar="HEAD", help="Folder or Hub id of a head.")],
) -> None:
    """Prints a head's card and what it is bound to.

    Example: `safespec show owner/smollm2-135m-safety-head`
    """
    from ..heads.hub import show_head

    typer.echo(show_head(head))
