"""Saves, publishes and shows heads. What is published has been loaded first, and holds no pickle."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import HfApi, eval_result_entries_to_yaml, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import HeadFileError
from .card import (
    UNPUBLISHED,
    Report,
    describe_reading,
    describe_size,
    describe_threshold,
    eval_results,
    format_threshold,
    model_card,
    to_json,
    to_table,
)
from .safety_head import SafetyHead

__all__ = ["describe_push", "model_card", "push_head", "save_head", "show_head"]

logger = logging.get_logger(__name__)

_CARD, _REPORT, _TRAINING, _EVAL_RESULTS = "README.md", "report.json", "training.json", ".eval_results/safespec.yaml"
_PUBLISHED = (CONFIG_NAME, SAFE_WEIGHTS_NAME, _CARD, _REPORT, _TRAINING, ".eval_results/*.yaml", "report.md", "*.png")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")


def save_head(head: SafetyHead, folder: str | os.PathLike[str], report: Report | None = None) -> None:
    """Saves a head with its model card, so that an interrupted save leaves no weights rather than wrong ones.

    Files of a head that was there before are replaced; its report and results go, as they are not this head's.

    Args:
        head ([`SafetyHead`]): The head.
        folder (`str` or `os.PathLike`): Where to; made if it is missing.
        report (`Mapping`, *optional*): As for [`model_card`]; saved as `report.json`.

    Example:

        >>> import os, tempfile
        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import save_head
        >>> folder = tempfile.mkdtemp()
        >>> save_head(SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1])), folder)
        >>> sorted(os.listdir(folder))
        ['README.md', 'config.json', 'model.safetensors']
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # inside the folder, since files can be moved in one step within a file system only
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as staging:
        head.save_pretrained(staging)
        _write_texts(head, Path(staging), report)
        # without weights the folder is no head, whatever the rest of it is
        (path / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        for name in (_REPORT, _EVAL_RESULTS):
            (path / name).unlink(missing_ok=True)
        new = sorted(file for file in Path(staging).rglob("*") if file.is_file())
        for file in sorted(new, key=lambda file: file.name == SAFE_WEIGHTS_NAME):
            place = path / file.relative_to(staging)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)


def _write_texts(head: SafetyHead, folder: Path, report: Report | None, repo_id: str | None = None) -> None:
    """The card, the evaluation results and the report, each unless it is there."""
    if not (folder / _CARD).exists():
        model_card(head, report=report, repo_id=repo_id).save(folder / _CARD)
    if report and not (folder / _REPORT).exists():
        (folder / _REPORT).write_text(to_json(report), encoding="utf-8")
    entries = eval_results(report or {}, repo_id)
    if entries and not (folder / _EVAL_RESULTS).exists():
        (folder / _EVAL_RESULTS).parent.mkdir(exist_ok=True)
        (folder / _EVAL_RESULTS).write_text(
            yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8"
        )


def push_head(
    head: SafetyHead | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a safety head",
    dry_run: bool = False,
) -> str:
    """Publishes a head on the Hub. A folder without a model card gets one.

    Args:
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or the folder it is saved in.
        repo_id (`str`): `owner/name`; made if it is missing.
        private (`bool`, *optional*): For a repository that is made. Default: the owner's setting.
        token (`str` or `bool`, *optional*): Default: the one that is logged in.
        revision (`str`, *optional*): Branch to push to; made if it is missing. Default: the main one.
        commit_message (`str`, *optional*): First line of the commit.
        dry_run (`bool`, defaults to `False`): Check everything, and send nothing.

    Returns:
        `str`: The address of the repository, or of the branch in it.

    Raises:
        HeadFileError: If the folder holds no whole head, a pickle, or a card or report of another threshold, or if the
            head is bound to no target.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import push_head
        >>> config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], target={"model_id": "owner/target"})
        >>> push_head(SafetyHead(config), "owner/head", dry_run=True)
        'https://huggingface.co/owner/head'
    """
    api = HfApi(token=token)
    with _publication(head, repo_id) as folder:
        if not dry_run:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message)
    return _address(repo_id, revision)


def describe_push(head: SafetyHead | str | os.PathLike[str], repo_id: str, *, revision: str | None = None) -> str:
    """What [`push_head`] would publish: the address, every file with its size, and the card. Sends nothing.

    Args:
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or the folder it is saved in.
        repo_id (`str`): `owner/name`.
        revision (`str`, *optional*): Branch. Default: the main one.

    Raises:
        HeadFileError: As [`push_head`].

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import describe_push
        >>> config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], target={"model_id": "owner/target"})
        >>> print(describe_push(SafetyHead(config), "owner/head").splitlines()[0])
        To https://huggingface.co/owner/head:
    """
    with _publication(head, repo_id) as folder:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        rows = [f"  {file.relative_to(folder).as_posix()}, {file.stat().st_size:,} bytes" for file in files]
        card = (folder / _CARD).read_text(encoding="utf-8")
    return "\n".join([f"To {_address(repo_id, revision)}:", *rows, f"{_CARD}:", card])


def _address(repo_id: str, revision: str | None) -> str:
    return f"{HfApi().endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


@contextlib.contextmanager
def _publication(head: SafetyHead | str | os.PathLike[str], repo_id: str) -> Iterator[Path]:
    """A folder with exactly what is published of a head, checked; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(head, SafetyHead):
            head.save_pretrained(folder)
        else:
            _copy_published(Path(head), Path(folder))
        _prepare(Path(folder), repo_id)
        yield Path(folder)


def _copy_published(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise HeadFileError(f"{str(source)!r} is not a folder. Give the folder that the head was saved in.")
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
    if pickles := [name for name in names if _matches(name, _PICKLES)]:
        raise HeadFileError(
            f"{str(source)!r} holds {', '.join(pickles)}. Pickles can run code where they are loaded, and are not "
            "published: remove them. A head's weights are in `model.safetensors`."
        )
    published = [name for name in names if _matches(name, _PUBLISHED)]
    for name in published:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    if left := sorted(set(names) - set(published)):
        logger.warning("Not published from %s: %s.", source, ", ".join(left))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _prepare(folder: Path, repo_id: str) -> None:
    """Checks that a head may be published, and writes the texts that are missing."""
    head = SafetyHead.from_pretrained(folder)
    if not head.config.target:
        raise HeadFileError(
            "This head is bound to no target, so nobody could attach it. Set `head.config.target = "
            "target_binding(model, tokenizer)` and save it again."
        )
    threshold, report = format_threshold(head.config.risk_threshold), _read_report(folder)
    measured_at = report.get("results", {}).get("risk_threshold")
    if measured_at is not None and format_threshold(measured_at) != threshold:
        raise HeadFileError(
            f"`{_REPORT}` was measured at the threshold {format_threshold(measured_at)}, but the head's is "
            f"{threshold}. Measure again with `safespec report`, or remove the file."
        )
    _write_texts(head, folder, report, repo_id)
    card = (folder / _CARD).read_text(encoding="utf-8")
    (folder / _CARD).write_text(card.replace(UNPUBLISHED, repo_id), encoding="utf-8")
    if threshold not in card:
        raise HeadFileError(
            f"`{_CARD}` doesn't state the head's threshold, {threshold}: it may be the card of another head. Remove "
            "it, and a new one is written; or correct it."
        )


def show_head(head: SafetyHead | str | os.PathLike[str], **hub_kwargs: Any) -> str:
    """What a head reads, its threshold, its target and, if a report is beside it, how well it does.

    Args:
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or its folder or Hub id.
        hub_kwargs: For loading it: `revision`, `token`, `cache_dir`, ...

    Raises:
        HeadFileError: If there is no whole head.

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import show_head
        >>> print(show_head(SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1]))).splitlines()[0])
        Safety head
    """
    report: Report = {}
    name = ""
    if not isinstance(head, SafetyHead):
        name, location = f" {head}", head
        head = SafetyHead.from_pretrained(head, **hub_kwargs)
        report = _read_report(location, **hub_kwargs)
    binding = "\n".join(f"  {field}: {value}" for field, value in (head.config.target or {}).items())
    sources = report.get("results", {}).get("sources", {})
    rows = [{"source": source, **row} for source, row in sources.items()]
    parts = [
        f"Safety head{name}",
        f"Reads: {describe_reading(head.config)}",
        f"Is: {describe_size(head)}",
        f"Threshold: {describe_threshold(head.config.risk_threshold, report)}",
        f"Target:\n{binding}" if binding else "Target: none, so it can't be attached",
        f"Measured:\n{to_table(rows)}" if rows else "Measured: no report beside it",
    ]
    return "\n".join(parts)


def _read_report(head: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, Any]:
    """The report beside a head, with the record of its training."""
    report, training = (_read_json(head, name, **hub_kwargs) for name in (_REPORT, _TRAINING))
    return report | ({"training": training} if training else {})


def _read_json(head: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> dict[str, Any]:
    try:
        file = Path(head, name) if os.path.isdir(head) else Path(hf_hub_download(str(head), name, **hub_kwargs))
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, EntryNotFoundError):  # a head may have none
        return {}
    except ValueError as error:
        raise HeadFileError(f"`{name}` of {str(head)!r} is not JSON: {error}.") from error
    return content
