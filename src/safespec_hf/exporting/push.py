"""Puts an exported repository on the Hub, in one commit. What is published is whole, and no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, ModelCard
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, logging

from ..errors import HeadFileError
from ..heads.card import UNPUBLISHED, check_license
from ..heads.publishing import CARD, PICKLES, address_of, check_destination, destination, is_named_like
from .export import CODE_FILES
from .loading import load_head, load_tokenizer
from .manifest import read_manifest

logger = logging.get_logger(__name__)


def push_guarded(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a guarded model",
    dry_run: bool = False,
) -> str:
    """Publishes what [`export_guarded`] wrote. `hf upload` does as well, but checks nothing.

    Args:
        folder (`str` or `os.PathLike`): The export.
        repo_id (`str`): `owner/name`; made if it is missing. The card is told of it.
        license (`str`, *optional*): Of the whole, such as `"apache-2.0"`. Default: what the card says.
        private (`bool`, *optional*): For a repository that is made. Default: the owner's setting.
        token (`str` or `bool`, *optional*): Default: the one that is logged in.
        revision (`str`, *optional*): Branch to push to; made if it is missing. Default: the main one.
        commit_message (`str`, *optional*): First line of the commit.
        dry_run (`bool`, defaults to `False`): Check everything, and send nothing.

    Returns:
        `str`: The address of the repository, or of the branch in it.

    Raises:
        HeadFileError: If the folder is no whole export, or has pickles in it.
        SafeSpecError: If `repo_id`, `revision` or `license` can't be one, or the Hub can't be reached.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.

    Example:

        >>> import tempfile
        >>> from safespec_hf import load_default
        >>> from safespec_hf.exporting import export_guarded, push_guarded
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export = export_guarded(load_default().model, folder)
        ...     address = push_guarded(export, "owner/guarded", license="apache-2.0", dry_run=True)
        >>> address
        'https://huggingface.co/owner/guarded'
    """
    files = describe_files(folder, repo_id, license=license, revision=revision)
    if not dry_run:
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        with destination(repo_id, private=private, token=token, revision=revision) as api:
            api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)
    return address_of(repo_id, revision)


def describe_files(
    folder: str | os.PathLike[str], repo_id: str, *, license: str | None = None, revision: str | None = None
) -> Mapping[str, Path | bytes]:
    """What [`push_guarded`] would send: the names of the files, and where each is; of the card what it would say.

    Args:
        folder, repo_id, license, revision: As for [`push_guarded`].

    Raises:
        HeadFileError, SafeSpecError: As [`push_guarded`].
    """
    check_destination(repo_id, revision)
    check_license(license)
    path = Path(folder)
    _check_whole(path)
    found = sorted(file for file in path.rglob("*") if file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in found}
    files: dict[str, Any] = {name: file for name, file in names.items() if not name.startswith(".")}
    if pickles := [name for name in files if is_named_like(name, PICKLES)]:
        raise HeadFileError(
            f"{str(path)!r} holds {', '.join(pickles)}. Pickles can run code where they are loaded, and are not "
            "published: remove them."
        )
    return files | {CARD: _finish_card(path, repo_id, license)}


def _check_whole(path: Path) -> None:
    """Loads all but the weights of the target, and looks whether these are there.

    Raises:
        HeadFileError: Says what is missing.
    """
    manifest = read_manifest(path, {})
    if missing := [name for name in (*CODE_FILES, CARD) if not (path / name).is_file()]:
        raise HeadFileError(f"{', '.join(missing)} of the export {str(path)!r} is missing: export the model again.")
    if manifest.head.folder:
        load_head(manifest, path, {})
    if manifest.target.folder is None:
        return
    target = path / manifest.target.folder
    if not (target / CONFIG_NAME).is_file() or not any(target.glob("*.safetensors")):
        raise HeadFileError(f"The target of the export is not in {str(target)!r}: export the model again.")
    load_tokenizer(path, AutoConfig.from_pretrained(target), {})


def _finish_card(path: Path, repo_id: str, license: str | None) -> bytes:
    card = ModelCard.load(path / CARD)
    if license is not None:
        card.data.license = license
    if not card.data.get("license"):
        logger.warning("license: not chosen. Choose with `--license`, such as apache-2.0 (`license=` in Python).")
    return str(card).replace(UNPUBLISHED, repo_id).encode()
