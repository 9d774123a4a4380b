"""Work done shard by shard into files: a kill loses one shard, and any number of processes can share it.

A folder of shards is a store of texts, found by a key of their content: which list a text was computed in does not
matter. So a part of a data set, or one that has grown, finds what was computed for the whole or the smaller one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..errors import SafeSpecError


class Place(NamedTuple):
    """Where a text lies: its shard, and its number in there."""

    file: Path
    number: int


def processes() -> PartialState:
    """The processes of this run; on CPUs, too, where each would otherwise believe that it is alone."""
    return PartialState(cpu=not torch.cuda.is_available())


def plan_shards(lengths: Mapping[str, int], size: int) -> list[list[str]]:
    """Keys in shards of `size`, by length, so that a shard's texts make full batches.

    Example:

        >>> plan_shards({"a": 5, "b": 2, "c": 4}, size=2)
        [['b', 'c'], ['a']]
    """
    order = sorted(lengths, key=lambda key: (lengths[key], key))
    return [order[start : start + size] for start in range(0, len(order), size)]


def find_places(folder: Path, named: Callable[[int], Collection[str]]) -> dict[str, Place]:
    """Every text that is in a folder of shards, by its key. A damaged file counts as missing.

    Args:
        folder (`Path`): The folder.
        named (`Callable[[int], Collection[str]]`): Names of the tensors that a shard of so many texts has.
    """
    places: dict[str, Place] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as shard:
                keys = json.loads((shard.metadata() or {}).get("keys", "[]"))
                names = set(shard.keys())
        except (SafetensorError, ValueError):
            continue
        is_whole = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not is_whole or not names.issuperset(named(len(keys))):
            continue
        for number, key in enumerate(keys):
            places.setdefault(key, Place(file, number))
    return places


def compute_shards(
    folder: Path,
    lengths: Mapping[str, int],
    size: int,
    compute: Callable[[Sequence[str]], dict[str, Tensor]],
    title: str,
    named: Callable[[int], Collection[str]] = lambda _: (),
) -> dict[str, Place]:
    """Computes the texts that are not in a folder yet.

    Under `accelerate launch` process r of n does shards r, r + n, ...; the files are the same for any n, and after a
    kill.

    Args:
        folder (`Path`): Gets one safetensors file per shard. A file is there completely or not at all.
        lengths (`Mapping[str, int]`): Tokens of each text, by its key.
        size (`int`): Texts of a shard: what a kill can lose.
        compute (`Callable[[Sequence[str]], dict[str, torch.Tensor]]`): The tensors of a shard, given its keys.
        title (`str`): Of the progress bar.
        named (`Callable[[int], Collection[str]]`): As for [`find_places`]. Default: any tensors.

    Returns:
        `dict[str, Place]`: Where each text is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = processes()
    found = find_places(folder, named)
    # Whole shards that are there already leave the borders of the others as they were.
    todo = plan_shards({key: length for key, length in lengths.items() if key not in found}, size)
    # no process may write before each has seen what is missing, or their plans would differ
    state.wait_for_everyone()
    mine = todo[state.process_index :: state.num_processes]
    for keys in tqdm(mine, desc=title, unit="shard", disable=not state.is_main_process or not mine):
        _save(folder, keys, compute(keys))
    state.wait_for_everyone()
    found = find_places(folder, named)
    return {key: found[key] for key in lengths}


def compute_texts(
    cache_dir: str | os.PathLike[str],
    parts: Sequence[object],
    lengths: Mapping[str, int],
    size: int,
    compute: Callable[[Sequence[str]], dict[str, Tensor]],
    title: str,
) -> dict[str, Tensor]:
    """One tensor for each text, computed or found in the cache.

    Args:
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of `parts`.
        parts (`Sequence[object]`): All that the tensors depend on besides the texts, as JSON can hold it.
        lengths, size, title: As for [`compute_shards`].
        compute (`Callable`): As there, but its tensors are named by the place of their keys: "0", "1", ...

    Returns:
        `dict[str, torch.Tensor]`: By the key of each text.
    """
    folder = Path(cache_dir) / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    places = compute_shards(folder, lengths, size, compute, title, lambda num: [str(index) for index in range(num)])
    shards = {file: load_shard(file) for file in {place.file for place in places.values()}}
    return {key: shards[place.file][str(place.number)] for key, place in places.items()}


def load_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard.

    Raises:
        SafeSpecError: If a number is none, or infinite: none that is kept is. Names the file.
    """
    tensors = load_file(file)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise SafeSpecError(f"{file} is damaged: numbers in it are none. Remove it, and it is made again.")
    return tensors


def _save(folder: Path, keys: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    file = folder / f"{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]}.safetensors"
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"keys": json.dumps(keys)})
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
