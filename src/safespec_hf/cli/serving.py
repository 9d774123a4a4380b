"""The command that serves a guarded target over HTTP, through vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import SafeSpecError
from .options import parse_name

POLICY_HELP = (
    'What follows a flag: fields of SafeSpecConfig as JSON, such as {"num_candidates": 4}, or a file with them. '
    "Default: its defaults."
)
REPORTS_HELP = (
    "What answers tell beside their text: full (risks and events), outcome, or none. Risks help whoever tries to get "
    "past the head."
)
HEAD_HELP = "Folder or Hub id of the head, trained for this very target."
OTHERS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""vLLM has some hundred options of its own, and knows itself which: what we don't know goes there."""


def serve(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(parser=parse_name, metavar="TARGET", help="The target, a Hub id or folder.")
    ],
    head: Annotated[str, typer.Option(parser=parse_name, metavar="HEAD", help=HEAD_HELP)],
    policy: Annotated[str | None, typer.Option(metavar="JSON", help=POLICY_HELP)] = None,
    reports: Annotated[Literal["full", "outcome", "none"], typer.Option(metavar="HOW", help=REPORTS_HELP)] = "full",
) -> None:
    """Serves guarded answers behind an API like OpenAI's, through vLLM. All other options are vLLM's own.

    Example: `safespec serve owner/target --head owner/head --port 8000 --max-model-len 4096`
    """
    if target.startswith("-"):
        raise typer.BadParameter(f"the target comes first, before {target}.")
    from ..vllm.parameters import read_policy

    chosen = read_policy(_read_fields(policy))  # before vLLM is imported, which takes its time
    from ..vllm.runner import check_version

    check_version()  # before more of vLLM is imported, of which another version has other parts
    from ..vllm.server import serve as run

    run(target, head, chosen, context.args, reports)


def _read_fields(text: str | None) -> dict[str, object]:
    """The fields of a policy, from JSON or from a file with it."""
    if text is None:
        return {}
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).expanduser().read_text("utf-8"))
    # a home that nobody has, and nesting without end, are both a RuntimeError
    except (OSError, ValueError, RuntimeError) as error:
        raise SafeSpecError(f"`--policy` is neither an object in JSON nor a file with one: {error}") from error
    if not isinstance(found, dict):
        raise SafeSpecError(f"`--policy` must be an object in JSON, but it is a {type(found).__name__}.")
    return found
