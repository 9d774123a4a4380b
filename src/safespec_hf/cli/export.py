"""The command that writes a guarded model as one repository."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import SafeSpecError
from .loading import load_target, open_draft
from .options import Target, parse_name, parse_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HEAD_HELP = "Its safety head, a folder or Hub id. Default: the default target's own."
DRAFT_HELP = "A draft head or model, a folder or Hub id, or none. Default: the default target's own, else none."


def export(
    folder: Annotated[
        Path, typer.Argument(parser=parse_path, metavar="DIR", help="A new or empty folder, or an earlier export.")
    ],
    target: Target = None,
    head: Annotated[str | None, typer.Option(parser=parse_name, metavar="HEAD", help=HEAD_HELP)] = None,
    draft: Annotated[str | None, typer.Option(parser=parse_name, metavar="MODEL", help=DRAFT_HELP)] = None,
    light: Annotated[bool, typer.Option("--light", help="Point to what is on the Hub instead of copying it.")] = False,
    operating_point: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="One of the head's thresholds, such as strict. Default: its own."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(metavar="LICENCE", help="Of the whole, as the Hub abbreviates it, for the card.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(metavar="TYPE", help="Of the weights that are written: auto, float32, bfloat16 or float16."),
    ] = "auto",
) -> None:
    """Writes a guarded model as a repository that any code loads and runs guarded.

    Example: `safespec export guarded --target owner/target --head owner/head --draft owner/draft`
    """
    from ..config import SafeSpecConfig
    from ..decoding.attachment import find_threshold
    from ..exporting.export import check_folder, export_guarded
    from ..heads.card import check_license
    from ..modeling import attach_safety_head
    from ..training.files import check_writable_folder

    check_folder(folder)
    check_license(license)
    check_writable_folder(folder)
    if target is not None and head is None:
        raise SafeSpecError("Give the target's safety head with `--head`, or make one with `safespec make-head`.")
    small = _load_small(head, draft, is_default_target=target is None)  # first, as the target takes long
    policy = SafeSpecConfig(operating_point=operating_point)
    find_threshold(policy, small[0])
    model, tokenizer = _load_empty(target) if light else load_target(target, dtype, needs_chat=False)
    guarded = attach_safety_head(model, small[0], tokenizer=tokenizer, policy=policy)
    typer.echo(export_guarded(guarded, folder, draft=small[1], light=light, license=license))


def _load_small(head: str | None, draft: str | None, *, is_default_target: bool) -> tuple[Any, Any]:
    """Head and draft as they are stored, not on a target yet.

    Raises:
        SafeSpecError: If there is no such head or draft; says why.
    """
    from ..defaults.default_target import find_default_draft, load_default_head
    from ..heads.safety_head import SafetyHead

    loaded_head = load_default_head() if head is None else SafetyHead.from_pretrained(head)
    if draft is None and is_default_target:
        draft = str(find_default_draft())
    return loaded_head, None if draft is None or draft == "none" else open_draft(draft)


def _load_empty(target: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A target without its weights, which a light export does not need.

    Raises:
        SafeSpecError: If there is no such model, or no tokenizer beside it; says why.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from ..defaults.default_target import DEFAULT_TARGET_ID
    from ..heads.loading import explain_hub_error, hub_arguments

    name = target or DEFAULT_TARGET_ID
    try:
        where = hub_arguments(name, {}, "target")
        config = AutoConfig.from_pretrained(name, **where)
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        why = explain_hub_error(name, error, {}) or error
        raise SafeSpecError(f"No target could be loaded from {name!r}: {why}") from error
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.config.name_or_path = name
    with contextlib.suppress(OSError):  # a model may have none, and keeps what its config says
        model.generation_config = GenerationConfig.from_pretrained(name, **where)
    return model.eval(), tokenizer
