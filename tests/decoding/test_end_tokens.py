"""What a config names as end token may be none: -1 says so in some, and others name one that the target can't say."""

import pytest
import torch
from tiny import NO, THANKS, Recorder

from safespec_hf import SafeSpecConfig

PROMPT = torch.tensor([[12, 18, 24, 13]])
ARGUMENTS = {"max_new_tokens": 12, "do_sample": False}
REFUSING = SafeSpecConfig(max_recoveries=0, refusal="no thanks", risk_threshold=1e-9)


@pytest.mark.parametrize(("eos", "ends"), [(-1, []), (99, []), ([-1, 99], []), ([99, 2], [2]), ([-1, 2, 3], [2])])
def test_a_refusal_ends_with_the_first_end_token_that_is_one(flagging, eos, ends):
    streamer = Recorder()
    answer = flagging.generate(PROMPT, **ARGUMENTS, eos_token_id=eos, streamer=streamer, safespec=REFUSING)
    assert answer[0, 4:].tolist() == [NO, THANKS, *ends]
    assert streamer.tokens == answer[0].tolist()


@pytest.mark.parametrize("eos", [-1, 99, [-1, 99]])
def test_an_end_token_that_is_none_ends_nothing_and_bans_nothing(guarded, eos):
    expected = guarded.generate(PROMPT, **ARGUMENTS)
    assert guarded.generate(PROMPT, **ARGUMENTS, eos_token_id=eos, safespec=True).tolist() == expected.tolist()


@pytest.mark.parametrize("eos", [-1, 99])
def test_recoveries_go_on_without_it(flagging, eos):
    policy = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no thanks")
    events = [
        flagging.generate(
            PROMPT, **ARGUMENTS, eos_token_id=token, safespec=policy, return_dict_in_generate=True
        ).events
        for token in (eos, None)
    ]
    assert events[0] == events[1]
    assert any(event.candidate_risks for event in events[0][0])
