from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import emulated_processes

from safespec_hf import SafeSpecError
from safespec_hf.training import shards
from safespec_hf.training.shards import compute_shards, load_shard, plan_shards

LENGTHS = {"a": 3, "b": 1, "c": 2, "d": 5, "e": 4}


def compute(keys):
    return {"values": torch.tensor([ord(key) for key in keys])}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def values(places):
    return {key: chr(load_file(place.file)["values"][place.number]) for key, place in places.items()}


@pytest.mark.parametrize("num_processes", [2, 3])
def test_any_number_of_processes_gives_the_same_files(tmp_path, monkeypatch, num_processes):
    compute_shards(tmp_path / "one", LENGTHS, 2, compute, "")
    monkeypatch.setattr(shards, "PartialState", emulated_processes(num_processes))
    with ThreadPoolExecutor(num_processes) as pool:
        runs = [pool.submit(compute_shards, tmp_path / "many", LENGTHS, 2, compute, "") for _ in range(num_processes)]
    assert all(values(run.result()) == {key: key for key in LENGTHS} for run in runs)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize("num_lost", [1, 2, 3])
def test_only_what_is_missing_is_computed_and_the_files_are_the_same(tmp_path, num_lost):
    compute_shards(tmp_path, LENGTHS, 2, compute, "")
    whole, asked = contents(tmp_path), []
    for name in sorted(whole)[:num_lost]:
        (tmp_path / name).unlink()
    compute_shards(tmp_path, LENGTHS, 2, lambda keys: asked.append(keys) or compute(keys), "")
    assert len(asked) == num_lost
    assert contents(tmp_path) == whole


def test_a_part_or_a_larger_list_finds_what_was_computed(tmp_path):
    compute_shards(tmp_path, LENGTHS, 2, compute, "")
    assert values(compute_shards(tmp_path, {"a": 3, "d": 5}, 2, None, "")) == {"a": "a", "d": "d"}
    asked = []
    more = compute_shards(tmp_path, LENGTHS | {"f": 9}, 2, lambda keys: asked.append(keys) or compute(keys), "")
    assert asked == [["f"]]
    assert values(more)["f"] == "f"


@pytest.mark.parametrize("keys", [None, "roses", "1", "null", '{"a": 1}', "[1, 2]"])
def test_a_shard_that_does_not_say_what_is_in_it_is_computed_again(tmp_path, keys):
    places = compute_shards(tmp_path, LENGTHS, 2, compute, "")
    file, whole = places["a"].file, contents(tmp_path)
    save_file(load_file(file), file, metadata=None if keys is None else {"keys": keys})
    compute_shards(tmp_path, LENGTHS, 2, compute, "")
    assert contents(tmp_path) == whole


def test_a_shard_without_a_tensor_is_computed_again(tmp_path):
    def named(num):
        return [str(index) for index in range(num)]

    def compute(keys):
        return {str(index): torch.tensor([ord(key)]) for index, key in enumerate(keys)}

    places = compute_shards(tmp_path, LENGTHS, 2, compute, "", named)
    file, whole = places["a"].file, contents(tmp_path)
    with safe_open(file, "pt") as shard:
        metadata = shard.metadata()
    save_file({"0": load_file(file)["0"]}, file, metadata=metadata)
    compute_shards(tmp_path, LENGTHS, 2, compute, "", named)
    assert contents(tmp_path) == whole


def test_numbers_that_are_none_are_told_with_the_file(tmp_path):
    (place,) = compute_shards(tmp_path, {"a": 1}, 2, lambda _: {"values": torch.tensor([float("nan")])}, "").values()
    with pytest.raises(SafeSpecError, match=f"{place.file.name} is damaged.* Remove it"):
        load_shard(place.file)


def test_a_damaged_shard_is_computed_again(tmp_path):
    places = compute_shards(tmp_path, LENGTHS, 2, compute, "")
    whole = contents(tmp_path)
    places["a"].file.write_bytes(b"half")
    compute_shards(tmp_path, LENGTHS, 2, compute, "")
    assert contents(tmp_path) == whole


def test_an_interrupt_leaves_whole_shards_only_and_the_next_run_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute_shards(tmp_path, LENGTHS, 2, lambda keys: interrupt() if "d" in keys else compute(keys), "")
    assert len(contents(tmp_path)) == 2
    assert values(compute_shards(tmp_path, LENGTHS, 2, compute, "")) == {key: key for key in LENGTHS}


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "save_file", lambda _, file, **kwargs: file.write_text("half") and interrupt())
    with pytest.raises(KeyboardInterrupt):
        compute_shards(tmp_path, LENGTHS, 2, compute, "")
    assert contents(tmp_path) == {}


def interrupt():
    raise KeyboardInterrupt


def test_every_text_is_in_one_shard():
    planned = plan_shards(LENGTHS, 2)
    assert planned == [["b", "c"], ["a", "e"], ["d"]]


@pytest.mark.parametrize("has_gpu", [True, False])
def test_processes_on_cpus_know_of_each_other(monkeypatch, has_gpu):
    asked = []
    monkeypatch.setattr(shards.torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(shards, "PartialState", lambda **how: asked.append(how))
    shards.processes()
    assert asked == [{"cpu": not has_gpu}]
