"""Saves heads with their cards and puts them on the Hub. What is published has been loaded first, and is no pickle."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import HfApi, ModelCard, ModelCardData, eval_result_entries_to_yaml, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # `HTTPError` is that of its HTTP library
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import HeadFileError, SafeSpecError
from .card import UNPUBLISHED, Report, eval_results, format_threshold, is_unedited, model_card, to_json
from .loading import StrictModel, is_hub_reachable, no_such_folder
from .shapes import check_shape

logger = logging.get_logger(__name__)

CARD, REPORT, TRAINING, EVAL_RESULTS = "README.md", "report.json", "training.json", ".eval_results/safespec.yaml"
_FROM_REPORT = (REPORT, "report.md", "*.png")
_PUBLISHED = (CONFIG_NAME, SAFE_WEIGHTS_NAME, CARD, TRAINING, ".eval_results/*.yaml", *_FROM_REPORT)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib")
_BRANCH = re.compile(r"(?!.*(\.\.|//|/$|\.lock$|\.$))[A-Za-z0-9_][A-Za-z0-9_./-]*")

Source = StrictModel | str | os.PathLike[str]


def save_folder(
    head: StrictModel,
    folder: str | os.PathLike[str],
    report: Report | None = None,
    license: str | None = None,
    **save_kwargs: Any,
) -> None:
    """What `save_head` does; `save_kwargs` go to transformers."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    # inside the folder, since files can be moved in one step within a file system only
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as staging:
        PreTrainedModel.save_pretrained(head, staging, **save_kwargs)
        _write_texts(head, Path(staging), report, license)
        # without weights the folder is no head, whatever the rest of it is
        (path / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        for name in (REPORT, EVAL_RESULTS):
            (path / name).unlink(missing_ok=True)
        new = sorted(file for file in Path(staging).rglob("*") if file.is_file())
        for file in sorted(new, key=lambda file: file.name == SAFE_WEIGHTS_NAME):
            place = path / file.relative_to(staging)
            place.parent.mkdir(exist_ok=True)
            os.replace(file, place)


def publish(
    kind: type[StrictModel],
    head: Source,
    repo_id: str,
    *,
    report: str | os.PathLike[str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
    dry_run: bool = False,
    **commit_kwargs: Any,
) -> str:
    """What `push_head` does; `commit_kwargs` go to the Hub's client."""
    check_destination(repo_id, revision)
    with publication(kind, head, repo_id, report, license, tags) as folder:
        if not dry_run:
            with destination(repo_id, private=private, token=token, revision=revision) as api:
                api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **commit_kwargs)
    return address_of(repo_id, revision)


@contextlib.contextmanager
def destination(
    repo_id: str, *, private: bool | None, token: str | bool | None, revision: str | None
) -> Iterator[HfApi]:
    """The Hub's client, for sending something into a repository and a branch, which are made if they are missing.

    Raises:
        SafeSpecError: If the Hub can't be reached, or the connection breaks off.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
    """
    api = HfApi(token=token)
    if not is_hub_reachable():
        raise SafeSpecError(f"Hub unreachable ({api.endpoint}): nothing was sent. Push again when it answers.")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        yield api
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise SafeSpecError(f"The connection to {api.endpoint} broke off ({error}). Push again.") from error


def check_destination(repo_id: str, revision: str | None = None) -> None:
    """Raises unless these can be a repository of somebody on the Hub and a branch of it.

    Raises:
        SafeSpecError: Says which of them can't, and why.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SafeSpecError(
            f"`repo_id` must be an id on the Hub, owner/name, but it is {repo_id!r}: {error}"
        ) from error
    if "/" not in repo_id:
        raise SafeSpecError(f"`repo_id` must name its owner too, owner/name, but it is {repo_id!r}.")
    if revision is not None and not _BRANCH.fullmatch(revision):
        raise SafeSpecError(
            f"`revision` must be the name of a branch, letters, digits and any of '_./-', but it is {revision!r}."
        )


def address_of(repo_id: str, revision: str | None) -> str:
    """Of a repository, or of a branch in it."""
    return f"{HfApi().endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


@contextlib.contextmanager
def publication(
    kind: type[StrictModel],
    head: Source,
    repo_id: str,
    report: str | os.PathLike[str] | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
) -> Iterator[Path]:
    """A folder with exactly what is published of a head, checked; it is gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(head, StrictModel):
            save_folder(head, folder, license=license)
        else:
            _copy_published(Path(head), folder)
            read_report(head)  # what is wrong in it is told with its own place
        if report is not None:
            copy_report(report, folder)
        loaded = kind.from_pretrained(folder)
        _check_publishable(loaded, folder)
        _write_texts(loaded, folder, read_report(folder), license, repo_id)
        _finish_card(folder, repo_id, license, tags)
        yield folder


def copy_report(report: str | os.PathLike[str], folder: Path, *, is_whole: bool = True) -> None:
    """Puts a report, if it is the whole of it with text and pictures, beside a head, in place of another one."""
    source = Path(report)
    if not (source / REPORT).is_file():
        raise HeadFileError(
            f"There is no `{REPORT}` in {str(source)!r}. Give the folder that `safespec report` wrote."
        )
    (folder / EVAL_RESULTS).unlink(missing_ok=True)
    wanted = _FROM_REPORT if is_whole else (REPORT,)
    for file in sorted(file for file in source.iterdir() if is_named_like(file.name, wanted)):
        if not (folder / file.name).exists() or not file.samefile(folder / file.name):
            shutil.copyfile(file, folder / file.name)


def find_license(head: Source) -> str | None:
    """The licence that the card beside a head states."""
    if isinstance(head, StrictModel) or not (Path(head) / CARD).is_file():
        return None
    license = _load_card(Path(head)).data.get("license")
    return license if isinstance(license, str) else None


def refresh_card(kind: type[StrictModel], folder: str | os.PathLike[str]) -> None:
    """Writes the card in a head's folder anew from what lies beside it, unless somebody has edited it."""
    _write_texts(kind.from_pretrained(folder), Path(folder), read_report(folder))


def read_report(head: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, Any]:
    """The report beside a head, with the record of its training."""
    report, training = (_read_json(head, name, **hub_kwargs) for name in (REPORT, TRAINING))
    return report | ({"training": training} if training else {})


def _copy_published(source: Path, folder: Path) -> None:
    if not source.is_dir():
        raise HeadFileError(f"{str(source)!r} is not a folder: {no_such_folder(source, 'head')}")
    names = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
    if pickles := [name for name in names if is_named_like(name, PICKLES)]:
        raise HeadFileError(
            f"{str(source)!r} holds {', '.join(pickles)}. Pickles can run code where they are loaded, and are not "
            "published: remove them. A head's weights are in `model.safetensors`."
        )
    published = [
        name for name in names if is_named_like(name, [p for p in _PUBLISHED if p.count("/") == name.count("/")])
    ]
    for name in published:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    # of folders their names: what `make-head` works in has thousands of files
    if left := sorted({name.partition("/")[0] for name in set(names) - set(published)}):
        logger.warning("Not published from %s: %s.", source, ", ".join(left))


def is_named_like(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's name fits one of these patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _check_publishable(head: StrictModel, folder: Path) -> None:
    if not head.config.target:
        raise HeadFileError(
            "This head is bound to no target, so nobody could attach it. Set `head.config.target = "
            "target_binding(model, tokenizer)` and save it again."
        )
    threshold, results = format_threshold(head.config.risk_threshold), read_report(folder).get("results")
    if (folder / CARD).exists() and threshold not in _load_card(folder).text:
        raise HeadFileError(
            f"`{CARD}` doesn't state the head's threshold, {threshold}: it may be the card of another head. Remove "
            "it, and a new one is written; or correct it."
        )
    if not results:
        logger.warning(
            "No evaluation is published with this head, and its card says so. Measure it with `safespec report`, or "
            "give the folder of its report with `--report` (`report=` in Python)."
        )
        return
    measured_at = results.get("risk_threshold")
    if measured_at is not None and format_threshold(measured_at) != threshold:
        raise HeadFileError(
            f"`{REPORT}` was measured at the threshold {format_threshold(measured_at)}, but the head's is "
            f"{threshold}. Measure again with `safespec report`, or remove the file."
        )


def _write_texts(
    head: StrictModel, folder: Path, report: Report | None, license: str | None = None, repo_id: str | None = None
) -> None:
    """The card, unless somebody has edited it, and the report and evaluation results unless they are there."""
    if not (folder / CARD).exists() or is_unedited((folder / CARD).read_text(encoding="utf-8")):
        stated = find_license(folder) if license is None else license
        model_card(head, report=report, repo_id=repo_id, license=stated).save(folder / CARD)
    if report and "results" in report and not (folder / REPORT).exists():
        (folder / REPORT).write_text(to_json(report), encoding="utf-8")
    entries = eval_results(report or {}, repo_id)
    if entries and not (folder / EVAL_RESULTS).exists():
        (folder / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        (folder / EVAL_RESULTS).write_text(
            yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8"
        )


def _finish_card(folder: Path, repo_id: str, license: str | None, tags: Sequence[str] | None) -> None:
    """Adds what a head is published with to its card, also to one that somebody has edited."""
    card = _load_card(folder)
    data: ModelCardData = card.data  # type: ignore[assignment]  # typed as any card's
    if license not in (None, data.license) or tags:
        data.license, data.tags = license or data.license, list(dict.fromkeys([*(data.tags or []), *(tags or [])]))
        card.save(folder / CARD)
    if not data.license:
        logger.warning("license: not chosen. Choose with `--license`, such as apache-2.0 (`license=` in Python).")
    text = (folder / CARD).read_text(encoding="utf-8")
    (folder / CARD).write_text(text.replace(UNPUBLISHED, repo_id), encoding="utf-8")


def _load_card(folder: Path) -> ModelCard:
    try:
        return ModelCard.load(folder / CARD)
    except (ValueError, yaml.YAMLError) as error:
        raise HeadFileError(f"The metadata at the head of `{CARD}` can't be read: {error}") from error


def _read_json(head: str | os.PathLike[str], name: str, **hub_kwargs: Any) -> dict[str, Any]:
    try:
        file = Path(head, name) if os.path.isdir(head) else Path(hf_hub_download(str(head), name, **hub_kwargs))
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, EntryNotFoundError):  # a head may have none
        return {}
    except (ValueError, RecursionError) as error:
        raise HeadFileError(f"`{name}` of {str(head)!r} is not JSON: {error}.") from error
    return check_shape(content, name, f"`{name}` of {str(head)!r}")
