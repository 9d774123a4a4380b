"""What the adapter says of a call, on calls of which that is known."""

import guarding
import pytest
import torch
from tiny import PROMPT, build_model
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

PLAIN = GenerationMixin.generate


class Counting(LogitsProcessor):
    """Not a function of its arguments: each call bans another token."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        self.num_calls += 1
        scores = scores.clone()
        scores[:, : 10 + self.num_calls % 30] = -torch.inf
        return scores


class Failing(LogitsProcessor):
    """Fails under guarded decoding only, which asks row by row."""

    def __call__(self, input_ids, scores):
        assert len(scores) == 2
        return scores


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(guarding, "CALLS", [])
    monkeypatch.setattr(GenerationMixin, "generate", guarding.generate)
    return guarding.CALLS


ARGUMENTS = {"max_new_tokens": 8, "do_sample": False}
KNOWN = {
    "guarded": {"output_scores": True, "return_dict_in_generate": True},
    "refused": {"num_beams": 2},
    "differed": {"logits_processor": LogitsProcessorList([Counting()])},
    "crashed": {"logits_processor": LogitsProcessorList([Failing()])},
}


@pytest.mark.parametrize("outcome", KNOWN)
def test_every_outcome_is_told(calls, outcome):
    model, prompts = build_model(), PROMPT.expand(2, -1)
    output = model.generate(prompts, **ARGUMENTS, **KNOWN[outcome])
    assert [call["outcome"] for call in calls] == [outcome]
    if outcome != "differed":
        expected = PLAIN(model, prompts, **ARGUMENTS, **KNOWN[outcome])
        assert torch.equal(getattr(output, "sequences", output), getattr(expected, "sequences", expected))
    assert "_safespec" not in vars(model)


def test_what_plain_decoding_refuses_is_not_counted(calls):
    with pytest.raises(ValueError, match="max_new_tokens"):
        build_model().generate(PROMPT, max_new_tokens=0)
    assert calls == []


def test_calls_inside_of_a_call_are_not_counted(calls):
    model = build_model()
    model.generate(PROMPT, **ARGUMENTS, assistant_model=build_model())
    assert len(calls) == 1
