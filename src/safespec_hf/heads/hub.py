"""Saves, publishes and shows heads: what users call, and the command `safespec`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .card import Report, describe_reading, describe_size, describe_threshold, model_card, to_table
from .loading import hub_arguments
from .publishing import (
    CARD,
    REPORT,
    address_of,
    check_destination,
    copy_report,
    find_license,
    publication,
    publish,
    read_report,
    refresh_card,
    save_folder,
)
from .safety_head import SafetyHead

__all__ = [
    "describe_push",
    "find_license",
    "keep_report",
    "model_card",
    "push_head",
    "refresh_card",
    "save_head",
    "show_head",
]


def save_head(
    head: SafetyHead,
    folder: str | os.PathLike[str],
    report: Report | None = None,
    *,
    license: str | None = None,
) -> None:
    """Saves a head with its model card, so that an interrupted save leaves no weights rather than wrong ones.

    Files of a head that was there before are replaced; its report and results go, as they are not this head's.

    Args:
        head ([`SafetyHead`]): The head.
        folder (`str` or `os.PathLike`): Where to; made if it is missing.
        report (`Mapping`, *optional*): As for [`model_card`]; saved as `report.json`.
        license (`str`, *optional*): Of the weights, for the card: as for [`model_card`].

    Example:

        >>> import os, tempfile
        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import save_head
        >>> folder = tempfile.mkdtemp()
        >>> save_head(SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1])), folder)
        >>> sorted(os.listdir(folder))
        ['README.md', 'config.json', 'model.safetensors']
    """
    save_folder(head, folder, report, license)


def push_head(
    head: SafetyHead | str | os.PathLike[str],
    repo_id: str,
    *,
    report: str | os.PathLike[str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a safety head",
    dry_run: bool = False,
) -> str:
    """Publishes a head on the Hub, with a card that is written anew unless somebody has edited it.

    A head without an evaluation or a licence is published with a warning, and its card says so.

    Args:
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or the folder it is saved in.
        repo_id (`str`): `owner/name`; made if it is missing.
        report (`str` or `os.PathLike`, *optional*):
            Folder that `safespec report` wrote. Default: the report beside the head.
        license (`str`, *optional*): Of the weights, such as `"apache-2.0"`. Default: what a card beside the head says.
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
        SafeSpecError: If `repo_id`, `revision` or `license` can't be one.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import push_head
        >>> config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], target={"model_id": "owner/target"})
        >>> push_head(SafetyHead(config), "owner/head", dry_run=True)
        'https://huggingface.co/owner/head'
    """
    return publish(
        SafetyHead,
        head,
        repo_id,
        report=report,
        license=license,
        private=private,
        token=token,
        revision=revision,
        dry_run=dry_run,
        commit_message=commit_message,
    )


def describe_push(
    head: SafetyHead | str | os.PathLike[str],
    repo_id: str,
    *,
    revision: str | None = None,
    report: str | os.PathLike[str] | None = None,
    license: str | None = None,
) -> str:
    """What [`push_head`] would publish: the address, every file with its size, and the card. Sends nothing.

    Args:
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or the folder it is saved in.
        repo_id (`str`): `owner/name`.
        revision (`str`, *optional*): Branch. Default: the main one.
        report, license: As for [`push_head`].

    Raises:
        HeadFileError: As [`push_head`].
        SafeSpecError: As [`push_head`].

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.hub import describe_push
        >>> config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], target={"model_id": "owner/target"})
        >>> print(describe_push(SafetyHead(config), "owner/head").splitlines()[0])
        To https://huggingface.co/owner/head:
    """
    check_destination(repo_id, revision)
    with publication(SafetyHead, head, repo_id, report, license) as folder:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        rows = [f"  {file.relative_to(folder).as_posix()}, {file.stat().st_size:,} bytes" for file in files]
        card = (folder / CARD).read_text(encoding="utf-8")
    return "\n".join([f"To {address_of(repo_id, revision)}:", *rows, f"{CARD}:", card])


def keep_report(report: str | os.PathLike[str], head: str | os.PathLike[str]) -> str:
    """Keeps the figures of a report beside the head that they were measured on, where a push finds them.

    Pictures stay where they are; [`push_head`] publishes them if it is given the report's folder.

    Args:
        report (`str` or `os.PathLike`): Folder that `safespec report` wrote.
        head (`str` or `os.PathLike`): Folder of the head. What can't be written to, or is no folder, is left alone.

    Returns:
        `str`: What was done.
    """
    if not os.path.isdir(head):
        return f"Not kept beside the head, as {str(head)!r} is no folder: push it with `--report {report}`."
    try:
        copy_report(report, Path(head), is_whole=False)
        refresh_card(SafetyHead, head)
    except PermissionError as error:
        return f"Not kept beside the head ({error}): push it with `--report {report}`."
    return f"{Path(head) / REPORT}: kept beside the head, for its card"


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
        head = SafetyHead.from_pretrained(location, **hub_kwargs)
        report = read_report(location, **hub_arguments(location, hub_kwargs))
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
