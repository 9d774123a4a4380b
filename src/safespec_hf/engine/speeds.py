"""How long things take on this machine: measured once, and remembered on disk.

Something that is measured and then decided by must be decided the same way the next time. So what was measured holds
for as long as machine and model are the same, in this process and in later ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import distributed as dist
from torch import nn

from .private_names import attention_name
from .traits import is_plain, sharing_groups

FORMAT = 3
"""Of the files, and of the forwards that were timed; those of another one are measured anew."""
MIN_TIMED_WEIGHTS = 2**23
"""A model of fewer is not timed: whatever is decided, it saves next to nothing."""
CPU_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""What takes instructions away from a process."""
Value = TypeVar("Value")
_known: dict[tuple[str, str], Any] = {}
_spent = threading.local()
_described: WeakKeyDictionary[nn.Module, tuple[object, dict[str, Any]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class BlockSeconds:
    """Seconds of a forward, by the tokens in it.

    Args:
        points (`tuple[tuple[int, float], ...]`): Numbers of tokens, rising, at least one, and their seconds.

    Raises:
        ValueError: If there are none, or one of them is not positive.

    Example:

        >>> seconds = BlockSeconds(((1, 0.04), (5, 0.08)))
        >>> round(seconds.at(2), 6), round(seconds.at(9), 6)
        (0.05, 0.12)
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        is_sound = all(num >= 1 and 0 < seconds < math.inf for num, seconds in self.points)
        if not self.points or not is_sound:
            raise ValueError(f"Seconds of blocks must be positive, and at least one, but they are {self.points}.")

    def at(self, num_tokens: int) -> float:
        """Seconds for so many tokens, >= 1. More tokens never take less time.

        What disturbs a measurement makes it longer, so one that is longer than that of more tokens is none.
        """
        points, least = list[tuple[int, float]](), math.inf
        for num, seconds in sorted(self.points, reverse=True):
            least = min(least, seconds)
            points.insert(0, (num, least))
        if len(points) == 1 or num_tokens <= points[0][0]:
            return points[0][1]
        after = next((index for index, (num, _) in enumerate(points) if num >= num_tokens), len(points) - 1)
        (low, less), (high, more) = points[after - 1], points[after]
        return less + (more - less) * (num_tokens - low) / (high - low)


def measure_blocks(
    run: Callable[[int], object], widths: Sequence[int], budget: float, num_warm: int = 1
) -> BlockSeconds:
    """Times blocks of several widths in turns, so that all of them meet a machine that gets slower or faster.

    Args:
        run (`Callable`): A forward over so many tokens, that has ended when it returns.
        widths (`Sequence[int]`): Which ones; the first two are measured in any case.
        budget (`float`): Seconds that this may take, about, after the warm-up.
        num_warm (`int`, defaults to 1): So many widths are run once before: what is made once is made there.
    """
    for width in widths[:num_warm]:
        run(width)
    best: dict[int, float] = {}
    start, num_passes = time.perf_counter(), 0
    while num_passes < 3:
        for number, width in enumerate(widths):
            if number >= 2 and width not in best and time.perf_counter() - start > budget / 2:
                continue
            begin = time.perf_counter()
            run(width)
            best[width] = min(best.get(width, math.inf), time.perf_counter() - begin)
        num_passes += 1
        widths = [width for width in widths if width in best]
        if (time.perf_counter() - start) * (num_passes + 1) / num_passes > budget:
            break
    return BlockSeconds(tuple(sorted(best.items())))


def remembered(kind: str, about: Mapping[str, Any], measure: Callable[[], Any], read: Callable[[Any], Value]) -> Value:
    """What was measured on a machine like this one before, or else is measured now.

    Args:
        kind (`str`): What is measured.
        about (`Mapping[str, Any]`): What it depends on, besides the machine; ready for JSON.
        measure (`Callable`): Measures it; the result is ready for JSON.
        read (`Callable`):
            Makes of a result what is returned. Raises `TypeError`, `ValueError` or `LookupError` for one that is none:
            then it is measured anew.
    """
    about = json.loads(json.dumps({"kind": kind, "format": FORMAT, "machine": machine(), **about}))
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    path = folder() / f"{name}.json"
    key = str(path.parent), name
    if key not in _known:
        try:
            _known[key] = _read(path, read)
        except (OSError, TypeError, ValueError, LookupError):
            with suppress(OSError):
                path.unlink()  # it is no result
            start = time.perf_counter()
            result = measure()
            _spent.seconds = spent() + time.perf_counter() - start
            _write(path, {"about": about, "result": result})
            try:
                _known[key] = _read(path, read)  # of another process, if that was faster: they decide alike
            except (OSError, TypeError, ValueError, LookupError):
                _known[key] = read(json.loads(json.dumps(result)))
    known: Value = _known[key]
    return known


def _read(path: Path, read: Callable[[Any], Value]) -> Value:
    return read(json.loads(path.read_text(encoding="utf-8"))["result"])


def spent() -> float:
    """Seconds that this thread has spent on measuring so far."""
    seconds: float = getattr(_spent, "seconds", 0.0)
    return seconds


def forget() -> None:
    """Forgets what this process has read or measured; files stay."""
    _known.clear()


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder that everything is kept in: the given one, else `SAFESPEC_CACHE`, else `~/.cache/safespec-hf`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "safespec-hf"
    return Path(cache_dir or os.environ.get("SAFESPEC_CACHE") or default).expanduser()


def folder() -> Path:
    """Where files are kept: `speeds` in [`cache_root`]."""
    try:
        return cache_root() / "speeds"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(os.devnull)  # nothing can be written there: each process remembers by itself


def _write(path: Path, value: object) -> None:
    """Writes a file whole or not at all, and not over that of another process; where nothing can be written, this
    process remembers by itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as file:
            json.dump(value, file)
        try:
            os.link(file.name, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(file.name, path)
        Path(file.name).unlink(missing_ok=True)
    except OSError:
        return


def machine() -> dict[str, Any]:
    """What the speed of a process depends on, besides what it runs."""
    return {
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "variables": {name: os.environ[name] for name in CPU_VARIABLES if name in os.environ},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@functools.cache
def _cpu() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    wanted = ("model name", "cpu family", "model", "flags", "Features", "CPU part")
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    return [platform.machine(), *(value.strip() for name, value in found.items() if name.strip() in wanted)]


def is_timed(model: nn.Module, num_weights: int) -> bool:
    """Whether forwards of a model with so many weights are worth timing, and may be.

    Where other processes hold parts of it, all must run the same forwards, with the same roundings, and so must not go
    by clocks of their own.
    """
    has_others = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    is_shared_out = has_others and (sharing_groups(model) or not all(map(is_plain, model.parameters())))
    return num_weights >= MIN_TIMED_WEIGHTS and not is_shared_out


def describe(model: nn.Module) -> dict[str, Any]:
    """What the speed of a model's forwards depends on: its shapes, formats and devices, but not its weights."""
    attention = attention_name(model)
    now = attention, tuple((id(weight), weight.dtype, weight.device) for weight in model.parameters())
    known = _described.get(model)
    if known is None or known[0] != now:  # every call asks, and it takes a tenth of a short forward to find out
        known = _described[model] = now, _describe(model)
    return known[1]


def _describe(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)  # a layer on its own has none
    fields = {} if config is None else config.to_dict()
    fields = {name: value for name, value in fields.items() if not name.startswith("_") and name != "name_or_path"}
    kinds = {f"{weight.device} {weight.dtype} {type(weight).__name__}" for weight in model.parameters()}
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    shapes = [[name, list(weight.shape)] for name, weight in model.named_parameters()]
    text = json.dumps([fields, shapes], sort_keys=True, default=str)
    return {
        "class": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest()[:32],
        "attention": "" if config is None else str(attention_name(model)),
        "weights": sorted(kinds),
        "devices": sorted({torch.cuda.get_device_name(device) for device in devices}),
    }
