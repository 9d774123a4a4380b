"""What the worker of an engine can't vouch for is never returned."""

import pytest
from fake_engine import END, MAX_LEN, RESERVED, make_guard, record

from safespec_hf import UnsupportedRequestError
from safespec_hf.vllm.spec import LOST_STATE

PROMPT, GREEDY = [11, 12, 13, 14, 15, 16], {"temperature": 0.0, "max_tokens": 30}


def begin(never, tokenizer, **policy):
    answer = make_guard(never, tokenizer, **policy).request("a", PROMPT, GREEDY)
    (submission,) = answer.begin()
    return answer, submission.key


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([11, 12, 13], {}),
        ([11, 12, RESERVED], {}),
        ([11, 12, RESERVED], {"a-0": record([11, 12], [0.1, 0.1])}),
        ([RESERVED], {"a-0": record([], [], "its key is that of another request")}),
        ([11, 12, 13, END], {"a-0": record([11, 12, 15], [0.1, 0.1, 0.1])}),
        ([11, 12, 13], {"a-0": record([11, 12, 13], [0.1, 0.1, 0.1])}),
    ],
    ids=["nothing", "nothing and stopped", "stopped without a flag", "refused", "another token", "broken off"],
)
def test_what_the_worker_cant_vouch_for_is_refused(never, tokenizer, tokens, found):
    answer, key = begin(never, tokenizer)
    answer.feed(key, tokens)
    assert answer.advance(found) == []
    result = answer.result()
    assert result.failure
    assert result.finish_reason == "safety_refusal"
    assert tokenizer.decode(result.token_ids[-2:]) in ("no thanks", "thanks </s>")


def test_a_flag_that_only_the_record_knows_of_is_believed(never, tokenizer):
    answer, key = begin(never, tokenizer, policy="refuse", risk_threshold=0.5)
    answer.feed(key, [11, 12, 13, END])
    assert answer.advance({key: record([11, 12, 13], [0.1, 0.9, 0.1])}) == []
    assert 12 not in answer.result().token_ids
    assert answer.result().events[0].position == 1


def test_lost_state_is_read_again_without_the_cache_but_not_for_ever(never, tokenizer):
    answer, key = begin(never, tokenizer)
    answer.feed(key, [11, 12])
    for _ in range(2):
        answer.feed(key, [RESERVED])
        (again,) = answer.advance({key: record([11], [0.1], LOST_STATE)})
        assert again.params["skip_reading_prefix_cache"]
        assert again.prompt_ids[-2:] == [11, 12]
        key = again.key
    answer.feed(key, [RESERVED])
    assert answer.advance({key: record([], [], LOST_STATE)}) == []
    assert answer.result().failure == LOST_STATE


def test_an_abandoned_answer_ends_with_the_refusal(never, tokenizer):
    answer, key = begin(never, tokenizer)
    answer.feed(key, [11, 12])
    answer.abandon("the engine is gone")
    assert answer.result().finish_reason == "safety_refusal"
    assert 11 not in answer.result().token_ids


@pytest.mark.parametrize("prompt", [[], [11] * MAX_LEN, [11] * (MAX_LEN - 1)])
def test_a_prompt_that_does_not_fit_is_refused(never, tokenizer, prompt):
    with pytest.raises(UnsupportedRequestError, match="prompt"):
        make_guard(never, tokenizer).request("a", prompt, GREEDY)
