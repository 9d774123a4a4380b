"""A short run of the soak test: see `benchmarks/soak.py`, which does the same by the thousand."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import soak


def test_generations_with_flags_and_interrupts_leave_nothing_behind():
    assert soak.soak(30, kinds=["alternating"]) == []


def test_what_stays_behind_is_seen(monkeypatch):
    leak, run = [], soak.Soak.run

    def run_and_forget(self, number):
        run(self, number)
        leak.append(soak.torch.zeros(1))
        self.models[number % 2][0].register_forward_hook(lambda *_: None)

    monkeypatch.setattr(soak.Soak, "run", run_and_forget)
    wrong = soak.soak(8, kinds=["llama"])
    assert any("left changed" in one for one in wrong)
    assert any("tensors are left" in one for one in wrong)


@pytest.mark.parametrize("drafting", ["none", "lookup"])
def test_a_token_of_a_long_answer_takes_as_much_memory_as_one_of_a_short_answer(drafting):
    assert soak.long_answer(160, drafting) == []
