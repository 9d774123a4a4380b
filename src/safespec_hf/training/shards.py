"""Work done shard by shard into files: a kill loses one shard, and any number of processes can share it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm


def plan_shards(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in shards of `size`, by length, so that a shard's texts make full batches.

    Example:

        >>> plan_shards([5, 2, 4], size=2)
        [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def compute_shards(
    folder: Path, num_shards: int, compute: Callable[[int], dict[str, Tensor]], title: str
) -> list[Path]:
    """Computes the shards that are not in a folder yet.

    Under `accelerate launch` process r of n does shards r, r + n, ...; the files are the same for any n.

    Args:
        folder (`Path`): Gets one safetensors file per shard. A file is there completely or not at all.
        num_shards (`int`): How many there are.
        compute (`Callable[[int], dict[str, torch.Tensor]]`): The tensors of a shard, given its number.
        title (`str`): Of the progress bar.

    Returns:
        `list[Path]`: The files, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.safetensors" for number in range(num_shards)]
    state = PartialState()
    todo = [
        number for number in range(state.process_index, num_shards, state.num_processes) if not files[number].exists()
    ]
    for number in tqdm(todo, desc=title, unit="shard", disable=not state.is_main_process or not todo):
        partial = files[number].with_name(f".{files[number].name}.{os.getpid()}")
        save_file({name: tensor.contiguous() for name, tensor in compute(number).items()}, partial)
        os.replace(partial, files[number])
    state.wait_for_everyone()
    return files
