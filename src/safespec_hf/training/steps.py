"""Steps of a longer piece of work, each done once, whatever is killed when.

A step has a folder that is named by a hash of all that the step depends on, and is there as a whole or not at all. So
what is found is never of other settings or data, and a step that nothing has changed for is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import __version__
from ..errors import SafeSpecError
from .files import check_writable_folder

STEP_FILE, LOCK_FILE = "step.json", "lock"


class Step:
    """One step.

    Args:
        work (`Path`): Folder that all steps have theirs in.
        name (`str`): What it is called.
        inputs (`Mapping[str, Any]`): All that its results depend on, in JSON; of an earlier step its `key`.
        keeps_parts (`bool`, defaults to `False`): Whether it goes on with what a killed attempt has left.

    Attributes:
        key (`str`): 16 hex digits over the name, the inputs and the version of this package.
        folder (`Path`): Where its results are, once it is finished.

    Example:

        >>> import pathlib, tempfile
        >>> from safespec_hf.training.steps import Step
        >>> work = pathlib.Path(tempfile.mkdtemp())
        >>> step = Step(work, "sow", {"seed": 1})
        >>> step.finish(lambda folder: {"num_roses": 3})
        >>> Step(work, "sow", {"seed": 1}).facts
        {'num_roses': 3}
        >>> Step(work, "sow", {"seed": 2}).is_finished
        False
    """

    def __init__(self, work: Path, name: str, inputs: Mapping[str, Any], *, keeps_parts: bool = False):
        self.inputs = {"version": __version__, **inputs}
        self.key = hashlib.sha256(json.dumps([name, self.inputs], sort_keys=True).encode()).hexdigest()[:16]
        self.name, self.folder, self.keeps_parts = name, work / f"{name}-{self.key}", keeps_parts

    @property
    def is_finished(self) -> bool:
        """Whether its results are there."""
        return (self.folder / STEP_FILE).is_file()

    @property
    def facts(self) -> dict[str, Any]:
        """What `finish` was told, of a finished step."""
        return self._read()["facts"]

    @property
    def seconds(self) -> float:
        """How long the attempt took that finished it."""
        return self._read()["seconds"]

    def finish(self, do: Callable[[Path], Mapping[str, Any]]) -> None:
        """Does the step.

        Args:
            do (`Callable[[Path], Mapping[str, Any]]`):
                Writes results into the folder that it is given, and returns facts to remember, as JSON can hold them.
        """
        start = time.monotonic()
        attempt = self.folder.with_name(f".{self.folder.name}")
        if not self.keeps_parts:
            shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir(parents=True, exist_ok=True)
        facts = dict(do(attempt))
        about = {"step": self.name, "inputs": self.inputs, "seconds": time.monotonic() - start, "facts": facts}
        (attempt / STEP_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(self.folder, ignore_errors=True)  # what somebody left of it
        os.replace(attempt, self.folder)

    def _read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / STEP_FILE).read_text(encoding="utf-8"))
        return content


@contextmanager
def only_one(work: Path) -> Iterator[None]:
    """Keeps a second run out of a folder of steps, which is made if it is missing. A killed run keeps nobody out.

    Raises:
        SafeSpecError: If another run is at work there, or the folder can't be written to.
    """
    check_writable_folder(work)
    lock = FileLock(work / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SafeSpecError(f"Another run is at work in {work}. Wait for it, or name another folder.") from error
    try:
        yield
    finally:
        lock.release()
