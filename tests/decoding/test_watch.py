"""Speculation that loses is stopped within a few rounds, and tried again rarely."""

import pytest

from safespec_hf.decoding.watch import FIRST_PAUSE, NUM_PROBES, ROUNDS, Watch


def run(watch, num_rounds, seconds_drafted, seconds_plain=0.01, num_tokens=2.0):
    """Which rounds drafted."""
    drafted = []
    for index in range(num_rounds):
        if drafts := watch.lets_draft():
            drafted.append(index)
        watch.record(seconds_drafted if drafts else seconds_plain, num_tokens if drafts else 1.0, 1, drafts)
    return drafted


@pytest.fixture
def watch():
    return Watch(lambda num_rows: 0.01 * num_rows)


def test_rounds_that_win_go_on(watch):
    assert run(watch, 200, seconds_drafted=0.015) == list(range(200))
    assert watch.num_pauses == 0


def test_rounds_that_lose_are_stopped_within_a_few_and_tried_again_ever_more_rarely(watch):
    drafted = run(watch, 1000, seconds_drafted=0.05)
    assert drafted[:ROUNDS] == list(range(ROUNDS))
    assert drafted[ROUNDS] >= ROUNDS + FIRST_PAUSE
    assert len(drafted) < 60
    assert watch.num_pauses > 3


def test_a_machine_that_is_slower_than_it_was_costs_a_few_plain_steps_and_no_pause(watch):
    # everything takes three times as long by now
    drafted = run(watch, 400, seconds_drafted=0.045, seconds_plain=0.03)
    assert watch.num_pauses == 0
    assert len(drafted) == 400 - NUM_PROBES


def test_a_machine_that_gets_slower_and_faster_again_is_followed(watch):
    for slowness in (1, 3, 1, 2, 0.5):
        run(watch, 60, seconds_drafted=0.015 * slowness, seconds_plain=0.01 * slowness)
    assert watch.num_pauses == 0


def test_speculation_that_wins_again_is_taken_up(watch):
    run(watch, 100, seconds_drafted=0.05)
    assert len(run(watch, 600, seconds_drafted=0.012)) > 300


def test_a_round_of_many_rows_is_compared_with_a_plain_step_of_as_many(watch):
    for _ in range(2 * ROUNDS):
        watch.record(0.1, num_tokens=2.0, num_rows=8, has_drafts=True)
    assert watch.num_pauses == 0
