from types import SimpleNamespace

import pytest
import torch

from safespec_hf.training import shards
from safespec_hf.training.shards import compute_shards, plan_shards


def compute(number):
    return {"values": torch.arange(number, number + 3)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_processes", [2, 3])
def test_any_number_of_processes_gives_the_same_files(tmp_path, monkeypatch, num_processes):
    compute_shards(tmp_path / "one", 5, compute, "")
    for index in range(num_processes):
        state = SimpleNamespace(
            process_index=index,
            num_processes=num_processes,
            is_main_process=index == 0,
            wait_for_everyone=lambda: None,
        )
        monkeypatch.setattr(shards, "PartialState", lambda state=state: state)
        compute_shards(tmp_path / "many", 5, compute, "")
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def test_only_what_is_missing_is_computed(tmp_path):
    files, asked = compute_shards(tmp_path, 4, compute, ""), []
    files[2].unlink()
    compute_shards(tmp_path, 4, lambda number: asked.append(number) or compute(number), "")
    assert asked == [2]


def test_a_failure_leaves_no_half_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute_shards(tmp_path, 2, lambda number: interrupt(), "")
    assert contents(tmp_path) == {}


def interrupt():
    raise KeyboardInterrupt


def test_every_text_is_in_one_shard():
    planned = plan_shards([3, 1, 2, 5, 4], 2)
    assert sorted(index for shard in planned for index in shard) == [0, 1, 2, 3, 4]
