"""Writes a guarded model as one repository: the whole of it, or a light one that points to what is on the Hub."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import (
    ADDED_TOKENS_FILE,
    FULL_TOKENIZER_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
)
from transformers.utils import CONFIG_NAME, logging
from transformers.utils.hub import CHAT_TEMPLATE_DIR, CHAT_TEMPLATE_FILE

from ..config import SafeSpecConfig
from ..decoding.assistant import Draft, as_draft, check_assistant
from ..decoding.doors import choose_policy
from ..errors import SafeSpecError, UnsupportedRequestError
from ..heads.card import check_license, is_unedited
from ..heads.draft_head import DraftHead
from ..heads.loading import find_commit
from ..heads.publishing import CARD, read_report, save_folder
from ..heads.safety_head import SafetyHead, check_binding, is_hub_id, target_binding
from ..modeling import GuardedModel
from .card import THING, export_card
from .manifest import CODE, DRAFT, HEAD, MODEL_TYPE, TARGET, VERSION, Manifest, Part, check_policy
from .origins import is_as_published

logger = logging.get_logger(__name__)

STAGING = ".exporting-"
TOKENIZER_FILES = (
    *(ADDED_TOKENS_FILE, FULL_TOKENIZER_FILE, SPECIAL_TOKENS_MAP_FILE, TOKENIZER_CONFIG_FILE),
    *(CHAT_TEMPLATE_FILE, CHAT_TEMPLATE_DIR),
)
"""What tokenizers of all classes may write, beside the vocabulary files of their own."""
CODE_FILES = {
    f"{CODE}.py": '''\
"""Loads the target of this repository with its head on. Run by `from_pretrained(..., trust_remote_code=True)`."""

from safespec_hf.exporting.loading import GuardedConfig, GuardedModelForCausalLM, NoDecisionModel

__all__ = ["GuardedConfig", "GuardedModelForCausalLM", "NoDecisionModel"]
''',
    "custom_generate/generate.py": '''\
"""Guarded decoding. Run by `model.generate(..., custom_generate=<this repository>, trust_remote_code=True)`."""

from safespec_hf.exporting.loading import generate

__all__ = ["generate"]
''',
    "custom_generate/requirements.txt": f"safespec-hf>={VERSION}\n",
}


def export_guarded(
    model: GuardedModel,
    folder: str | os.PathLike[str],
    *,
    draft: PreTrainedModel | None = None,
    light: bool = False,
    revisions: Mapping[str, str] | None = None,
    license: str | None = None,
) -> Path:
    """Writes a guarded model as a repository that code which has never heard of us loads and runs guarded.

    With `trust_remote_code=True`, `AutoModelForCausalLM.from_pretrained(folder)`, pipelines and servers get the model
    with its head attached for every call. Without, transformers refuses to load it. And
    `other.generate(..., custom_generate=folder, trust_remote_code=True)` guards any model that the head is made for.

    A full repository has everything. A light one points to what is on the Hub, at one commit each; the target must be
    there, while a head or draft that is not, or that was changed since it was loaded, is copied.

    Args:
        model ([`GuardedModel`]): The target with its head, policy and tokenizer attached. For a light repository its
            weights may be on the `meta` device.
        folder (`str` or `os.PathLike`): Where to: a new or empty folder, or that of an earlier export, which is
            replaced but for a card that somebody has edited.
        draft ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*): Default: the one that is attached.
        light (`bool`, defaults to `False`): Point to the target instead of copying it.
        revisions (`Mapping[str, str]`, *optional*):
            For a light one, the revisions that `"target"`, `"head"` and `"draft"` were loaded from. Default: the main
            branch. Each is pinned to the commit that it is at now.
        license (`str`, *optional*): Of the whole, as the Hub abbreviates it, for the card.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        TypeError: If the model has no head.
        SafeSpecError: If the folder holds something else, or the model can't be exported; says why.

    Example:

        >>> import tempfile
        >>> from safespec_hf import export_guarded, load_default
        >>> model, tokenizer, draft = load_default()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     parts = export_guarded(model, folder, draft=draft).iterdir()
        ...     folders = sorted(part.name for part in parts if part.is_dir())
        >>> folders
        ['custom_generate', 'draft', 'head', 'target']
    """
    if not isinstance(model, GuardedModel):
        raise TypeError(
            f"Only a model with a safety head can be exported, but this {type(model).__name__} has none: see "
            "`attach_safety_head`."
        )
    path = Path(folder).expanduser()
    check_folder(path)
    check_license(license)
    draft = as_draft(draft) or model.safety.draft
    tokenizer = _check_exportable(model, draft, light)
    manifest = _describe(model, draft, light, revisions or {})
    path.mkdir(parents=True, exist_ok=True)
    # inside the folder, since files can be moved in one step within a file system only
    with tempfile.TemporaryDirectory(dir=path, prefix=STAGING) as staging:
        _write(Path(staging), model, draft, tokenizer, manifest, license)
        _replace(path, Path(staging))
    return path


def check_folder(path: Path) -> None:
    """Raises unless an export may be written there.

    Raises:
        SafeSpecError: If there is something else.
    """
    if path.exists() and not path.is_dir():
        raise SafeSpecError(f"{str(path)!r} is a file. Give a folder, which is made if it is missing.")
    found = [file.name for file in path.iterdir()] if path.exists() else []
    names = {name for name in found if name not in (".git", ".gitattributes", CARD) and not name.startswith(STAGING)}
    if names and not is_export(path):
        raise SafeSpecError(
            f"The folder {str(path)!r} holds something else than an exported model, such as {min(names)!r}. Give a "
            "new or an empty one."
        )


def is_export(path: Path) -> bool:
    """Whether a folder holds an exported model, or the beginning of one."""
    if not (path / CONFIG_NAME).is_file():
        return (path / f"{CODE}.py").is_file()  # it was interrupted
    try:
        return json.loads((path / CONFIG_NAME).read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE
    except (ValueError, AttributeError):
        return False


def _check_exportable(model: GuardedModel, draft: PreTrainedModel | None, light: bool) -> PreTrainedTokenizerBase:
    """What can be known before anything is written.

    Raises:
        UnsupportedRequestError: Says why whoever loads the export would not get this model.
    """
    check_policy(_policy_of(model))
    tokenizer, name = model.safety.tokenizer, type(model).__name__
    if tokenizer is None:
        raise UnsupportedRequestError("An export needs the tokenizer: pass `tokenizer=` to `attach_safety_head`.")
    if getattr(transformers, name, None) is not type(model)._plain_class:
        raise UnsupportedRequestError(
            f"{name} is not a class of transformers, so whoever loads the export would not have it. Models with code "
            "of their own can't be exported."
        )
    if getattr(model, "peft_config", None):
        raise UnsupportedRequestError("The model has adapters, which are saved apart from it. Merge them first.")
    is_empty = any(weight.is_meta for weight in model.parameters())
    if is_empty and not light:
        raise UnsupportedRequestError(
            "Weights of the model are on the `meta` device, so that there is nothing to copy."
        )
    if light and not is_hub_id(model.config.name_or_path or ""):
        raise UnsupportedRequestError(
            f"A light export points to its target on the Hub, but this one was loaded from "
            f"{model.config.name_or_path!r}. Load it by its id, or export all of it."
        )
    if isinstance(draft, DraftHead) and is_empty:
        check_binding(draft, target_binding(model), model.safety.ignore_mismatches)
    elif isinstance(draft, DraftHead):
        draft.bind(model, model.safety.ignore_mismatches)
    else:
        check_assistant(model, Draft(draft), tokenizer)
    return tokenizer


def _policy_of(model: GuardedModel) -> SafeSpecConfig:
    """What is asked for in the model's generation config, or else what was attached."""
    return choose_policy(model.safety, None, model.generation_config) or model.safety.policy


def _describe(
    model: GuardedModel, draft: PreTrainedModel | None, light: bool, revisions: Mapping[str, str]
) -> Manifest:
    name, architecture = model.config.name_or_path, type(model).__name__
    target = Part(TARGET, model_id=_original_id(name, model.safety.head, draft), architecture=architecture)
    if light and name:
        commit = find_commit(name, revisions.get(TARGET))
        if commit is None:
            logger.warning("The commit of %s is not known, so the export points to whatever is there later.", name)
        if not is_as_published(model, name, commit):
            logger.warning(
                "The weights of this %s are not those of %s at %s, which a light export points to: they were trained, "
                "merged or loaded at another revision (`revisions=`). Whoever loads the export gets those of the Hub. "
                "Export all of it to have these.",
                *(architecture, name, commit or "its main branch"),
            )
        target = Part(repo_id=name, revision=commit, architecture=architecture)
    known = revisions if light else None
    return Manifest(
        target,
        _place(model.safety.head, HEAD, known),
        None if draft is None else _place(draft, DRAFT, known),
        _policy_of(model),
        tuple(model.safety.ignore_mismatches),
    )


def _original_id(name: str | None, *parts: PreTrainedModel | None) -> str | None:
    """The id on the Hub of a target: its own, or, of one from a folder, the one that its head or draft is bound to."""
    bound = [(getattr(part.config, "target", None) or {}).get("model_id") for part in parts if part is not None]
    return name if name and is_hub_id(name) else next(filter(None, bound), None)


def _place(part: PreTrainedModel, folder: str, revisions: Mapping[str, str] | None) -> Part:
    """The folder that a head or a draft is copied to; or, with revisions, where it is on the Hub."""
    name = part.config.name_or_path
    if revisions is None or not name or not is_hub_id(name):
        return Part(folder)
    commit = find_commit(name, revisions.get(folder))
    # one that was changed since, or loaded at another revision, is copied as well
    return Part(repo_id=name, revision=commit) if commit and is_as_published(part, name, commit) else Part(folder)


def _write(
    folder: Path,
    model: GuardedModel,
    draft: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest,
    license: str | None,
) -> None:
    for name, text in CODE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    settings = copy.deepcopy(model.generation_config)
    vars(settings).pop("safespec", None)  # it is in the manifest, and the plain target would ignore it
    settings.save_pretrained(folder)
    if manifest.target.folder:
        model.save_pretrained(folder / manifest.target.folder)
        settings.save_pretrained(folder / manifest.target.folder)
    parts: list[tuple[Part | None, Any]] = [(manifest.head, model.safety.head), (manifest.draft, draft)]
    for part, value in parts:
        if part is not None and part.folder:
            _save_part(value, folder / part.folder)
    export_card(model, manifest, license).save(folder / CARD)
    text = json.dumps(manifest.to_config(), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _save_part(part: PreTrainedModel, folder: Path) -> None:
    if not isinstance(part, SafetyHead):
        part.save_pretrained(folder)
        return
    source = part.config.name_or_path
    save_folder(part, folder, read_report(source) if source and os.path.isdir(source) else None)


def _replace(folder: Path, staging: Path) -> None:
    """Moves everything over what was there. The config comes last: without it the folder is no model."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    interrupted = [file.name for file in folder.glob(f"{STAGING}*") if file != staging]
    stale = [name for name in _tokenizer_files(folder) if not (staging / name).exists()]
    for name in (TARGET, HEAD, DRAFT, *interrupted, *stale):
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name).is_file():
            (folder / name).unlink()
    card = folder / CARD
    is_edited = card.is_file() and not is_unedited(card.read_text(encoding="utf-8"), THING)
    for file in sorted(staging.iterdir(), key=lambda file: file.name == CONFIG_NAME):
        if file.name == CARD and is_edited:
            continue
        place = folder / file.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(file, place)


def _tokenizer_files(folder: Path) -> set[str]:
    """What the tokenizer of an earlier export may have written there: the new one reads whatever of it is left."""
    config = folder / TOKENIZER_CONFIG_FILE
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):  # no export, or what is left of one
        kind = ""
    return {*TOKENIZER_FILES, *getattr(getattr(transformers, str(kind), None), "vocab_files_names", {}).values()}
