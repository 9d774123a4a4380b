"""The target's last states of a row: as a list of them would be, whatever is taken back or let go of."""

import random

import pytest
import torch

from safespec_hf.drafting.state_window import StateWindow


def test_a_window_gives_zeros_for_positions_it_never_saw():
    window = StateWindow(2)
    window.write(3, torch.ones(2, 2))
    assert window.read(1, 5).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_a_window_is_the_list_of_the_last_states(seed):
    choose, window, states, start = random.Random(seed), StateWindow(1), [], 0
    for _ in range(60):
        num = choose.choice([1, 2, 90])
        window.write(len(states), torch.arange(len(states), len(states) + num).float()[:, None])
        states += range(len(states), len(states) + num)
        kept = choose.randint(start, len(states))
        window.keep(kept)
        states = states[:kept]
        start = choose.randint(start, len(states))
        window.forget_before(start)
        assert window.read(start, len(states)).flatten().tolist() == states[start:]
        assert window.end == len(states)
