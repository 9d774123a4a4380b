"""What is known of a head's making, in `training.json` beside it: its sweep, its calibration, and from what data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import HeadFileError
from ..heads.card import to_json
from ..heads.shapes import check_shape
from .files import write_whole

RECORD_FILE = "training.json"


def read_record(head: str | os.PathLike[str]) -> dict[str, Any]:
    """The record beside a head; empty if there is none.

    Args:
        head (`str` or `os.PathLike`): Folder of the head.

    Raises:
        HeadFileError: If the file holds no JSON object, or something in it is of another shape.
    """
    file = Path(head) / RECORD_FILE
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeadFileError(f"{file} is not JSON: {error}. Remove it, or train the head again.") from error
    return check_shape(record, RECORD_FILE, str(file))


def update_record(head: str | os.PathLike[str], **parts: Any) -> None:
    """Adds parts to the record beside a head, in place of earlier ones of the same names.

    Args:
        head (`str` or `os.PathLike`): Folder of the head.
        parts: What JSON can hold.

    Example:

        >>> import tempfile
        >>> from safespec_hf.training.record import read_record, update_record
        >>> folder = tempfile.mkdtemp()
        >>> update_record(folder, seed=1)
        >>> update_record(folder, width=32)
        >>> read_record(folder)
        {'seed': 1, 'width': 32}
    """
    write_whole(Path(head) / RECORD_FILE, to_json(read_record(head) | parts))
