"""Whatever drafts: greedy answers are the target's own, drafts are used, and nothing flagged comes back."""

import pytest
import torch
from drafting_methods import METHODS
from tiny import ADAPTIVE, FIELDS, POLICY, PROMPT, attach, build_coin_head, cheap_drafts

from safespec_hf import SafeSpecConfig, UnsupportedRequestError

GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
IDS = torch.tensor([[11, 17, 23, 24, 13], [0, 0, 12, 18, 24], [0, 15, 16, 15, 16]])
MASK = (IDS != 0).long()


@pytest.fixture(params=METHODS)
def case(request):
    """Its own target, so that a test may do with it what it likes."""
    return METHODS[request.param]()


@pytest.mark.parametrize("policy", [POLICY, ADAPTIVE], ids=["constant", "adaptive"])
def test_greedy_answers_are_those_of_the_target_alone(case, tokenizer, policy):
    arguments = {**case.arguments, "do_sample": False}
    expected = [
        case.target.generate(ids[mask.bool()][None], **GREEDY)[0, -20:] for ids, mask in zip(IDS, MASK, strict=True)
    ]
    attach(case.target, tokenizer)
    with cheap_drafts():
        found = case.target.generate(
            IDS, attention_mask=MASK, **{**GREEDY, **arguments}, safespec=policy, return_dict_in_generate=True
        )
    assert torch.equal(found.sequences[:, -20:], torch.stack(expected))
    assert found.statistics.num_accepted_tokens > 0


def test_a_row_alone_needs_fewer_forwards_than_tokens(case, tokenizer):
    attach(case.target, tokenizer)
    arguments = {**GREEDY, "max_new_tokens": 32, **case.arguments, "return_dict_in_generate": True}
    statistics = case.target.generate(PROMPT, **arguments, safespec=POLICY).statistics
    assert statistics.num_target_forwards < 32
    assert statistics.num_accepted_tokens > 0


@pytest.mark.parametrize("num_rows", [1, 3])
def test_forced_flags_are_survived_and_nothing_flagged_comes_back(case, tokenizer, num_rows):
    attach(case.target, tokenizer, build_coin_head(case.target, 0.12, seed=1))
    num_events = 0
    for seed in range(2):
        case.target.safety.head.toss(0.12, seed)
        arguments = {**GREEDY, **case.arguments, "return_dict_in_generate": True}
        policy = SafeSpecConfig(**FIELDS, seed=seed)
        with cheap_drafts():
            output = case.target.generate(IDS[:num_rows], attention_mask=MASK[:num_rows], **arguments, safespec=policy)
        assert not (output.risks >= case.target.safety.risk_threshold).any()
        num_events += sum(map(len, output.events))
    assert num_events > 0


def test_a_heuristic_schedule_drafts_more_after_rounds_that_were_accepted_whole(tokenizer):
    target, arguments = METHODS["an EAGLE-3 checkpoint"]()
    attach(target, tokenizer)
    num_forwards = {}
    for schedule in ("constant", "heuristic", "heuristic_transient"):
        more = {"num_assistant_tokens": 2, "num_assistant_tokens_schedule": schedule, "return_dict_in_generate": True}
        policy = SafeSpecConfig(adaptive_drafts=False, lookup_drafts=False)
        output = target.generate(PROMPT, **{**GREEDY, "max_new_tokens": 40}, **arguments, **more, safespec=policy)
        num_forwards[schedule] = output.statistics.num_target_forwards
    # rounds of 3 tokens, or of 3, 5, 7, 9, 11 and so on where all drafts are accepted, as most of these are
    assert num_forwards["constant"] >= 14
    assert num_forwards["heuristic"] == num_forwards["heuristic_transient"] <= 9


def test_a_schedule_that_is_not_known_is_refused(guarded, draft):
    with pytest.raises(UnsupportedRequestError, match="must be one of"):
        guarded.generate(PROMPT, **GREEDY, assistant_model=draft, num_assistant_tokens_schedule="often", safespec=True)
