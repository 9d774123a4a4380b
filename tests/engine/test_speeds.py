"""What is measured is measured once, remembered, and measured again only where something has changed."""

import json

import pytest
import torch
from tiny import build_model
from torch import nn

from safespec_hf.engine import speeds
from safespec_hf.engine.speeds import BlockSeconds, describe, measure_blocks, remembered


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFESPEC_CACHE", str(tmp_path))
    speeds.forget()
    return tmp_path / "speeds"


@pytest.mark.parametrize(
    ("num", "expected"), [(1, 0.04), (2, 0.05), (3, 0.06), (7, 0.08), (9, 0.09), (11, 0.10)], ids=str
)
def test_between_and_beyond_what_was_measured_seconds_go_on_straight(num, expected):
    assert BlockSeconds(((1, 0.04), (3, 0.06), (5, 0.07), (9, 0.09))).at(num) == pytest.approx(expected)


def test_more_tokens_never_take_less_time():
    found = [BlockSeconds(((1, 0.04), (2, 0.03), (4, 0.05), (8, 0.02))).at(num) for num in range(1, 40)]
    assert found == sorted(found)


@pytest.mark.parametrize("points", [(), ((1, 0.0),), ((0, 0.1),), ((1, float("nan")),), ((1, float("inf")),)], ids=str)
def test_seconds_that_are_none_are_refused(points):
    with pytest.raises(ValueError, match="must be positive"):
        BlockSeconds(points)


class Clock:
    """A machine on which a token takes so many seconds."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.runs = 0.0, seconds, []
        monkeypatch.setattr(speeds.time, "perf_counter", lambda: self.now)

    def run(self, width):
        self.runs.append(width)
        self.now += width * self.seconds


def test_widths_take_turns_and_the_least_time_counts(monkeypatch):
    clock = Clock(monkeypatch, 0.001)
    assert dict(measure_blocks(clock.run, [1, 4, 2], 1.0).points) == pytest.approx({1: 0.001, 2: 0.002, 4: 0.004})
    assert clock.runs == [1] + [1, 4, 2] * 3


def test_what_is_made_once_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch, 0.001)

    def run(width):
        # the first forward over one token, and over several, are compiled
        clock.now += 0 if {width > 1} & {seen > 1 for seen in clock.runs} else 60
        clock.run(width)

    assert measure_blocks(run, [1, 8, 2], 0.5, num_warm=2).at(8) == pytest.approx(0.008)


def test_one_disturbed_measurement_does_not_make_all_longer_blocks_dear():
    seconds = BlockSeconds(((1, 0.025), (2, 0.046), (4, 0.036), (8, 0.041), (16, 0.053)))
    assert [seconds.at(num) for num in (1, 2, 4, 8, 16)] == [0.025, 0.036, 0.036, 0.041, 0.053]


@pytest.mark.parametrize(("seconds", "most"), [(0.001, 0.5), (0.02, 0.75), (1.0, 10.0)])
def test_measuring_keeps_to_its_budget_or_to_two_forwards(monkeypatch, seconds, most):
    clock = Clock(monkeypatch, seconds)
    found = measure_blocks(clock.run, [1, 8, 2, 4, 16], 0.5)
    assert clock.now <= most
    assert {1, 8} <= {num for num, _ in found.points}


def measured_times(about, value=7, read=int):
    calls = []
    found = remembered("numbers", about, lambda: calls.append(1) or value, read)
    return found, len(calls)


def test_what_was_measured_holds_in_this_process_and_in_later_ones():
    assert measured_times({"model": "a"}) == (7, 1)
    assert measured_times({"model": "a"}, value=8) == (7, 0)
    speeds.forget()  # as a new process does
    assert measured_times({"model": "a"}, value=8) == (7, 0)
    assert measured_times({"model": "b"}, value=8) == (8, 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"result": "x"}', '{"result": null}', "\x00"])
def test_a_broken_file_is_measured_anew(cache, text):
    measured_times({})
    speeds.forget()
    (path,) = cache.glob("*.json")
    path.write_text(text)
    assert measured_times({}, value=9) == (9, 1)
    assert json.loads(path.read_text())["result"] == 9


def test_processes_that_measure_at_once_decide_by_what_the_first_of_them_found(cache):
    def measure():
        (path,) = [cache / f"{name}.json" for name in names]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"result": 3}))
        return 4

    measured_times({})
    names = [path.stem for path in cache.glob("*.json")]
    (cache / f"{names[0]}.json").unlink()
    speeds.forget()
    assert remembered("numbers", {}, measure, int) == 3
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_a_file_system_without_links_remembers_too(cache, monkeypatch):
    monkeypatch.setattr(speeds.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError("no links")))
    assert measured_times({}) == (7, 1)
    speeds.forget()
    assert measured_times({}, value=8) == (7, 0)
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_where_nothing_can_be_written_a_process_remembers_by_itself(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFESPEC_CACHE", str(tmp_path / "file"))
    assert [measured_times({})[1] for _ in range(3)] == [1, 0, 0]


def test_without_a_home_a_process_remembers_by_itself(monkeypatch):
    monkeypatch.delenv("SAFESPEC_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(speeds.Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    assert [measured_times({})[1] for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("change", ["threads", "variables", "torch"])
def test_another_machine_is_measured_anew(monkeypatch, change):
    measured_times({})
    other = speeds.machine() | {change: "another"}
    monkeypatch.setattr(speeds, "machine", lambda: other)
    assert measured_times({})[1] == 1


def test_time_spent_on_measuring_is_counted(monkeypatch):
    before = speeds.spent()
    clock = Clock(monkeypatch, 1.0)
    remembered("numbers", {}, lambda: clock.run(3) or 1, int)
    remembered("numbers", {}, lambda: clock.run(3) or 1, int)
    assert speeds.spent() - before == pytest.approx(3.0)


def test_models_that_differ_in_what_takes_time_are_told_apart():
    same, other = build_model(), build_model()
    other.config.name_or_path = "elsewhere"
    assert describe(same) == describe(other)
    eager = build_model()
    eager.config._attn_implementation = "eager"
    models = [
        same,
        eager,
        build_model().bfloat16(),
        build_model(num_hidden_layers=3),
        build_model("gpt2"),
        nn.Linear(2, 2),
    ]
    assert len({json.dumps(describe(model)) for model in models}) == len(models)
    assert torch.equal(same.lm_head.weight, other.lm_head.weight)  # weights are not looked at
