"""With `num_return_sequences` there are more rows than prompts: what holds something of each prompt finds its own."""

import pytest
import torch
from tiny import is_before
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from safespec_hf import UnsupportedRequestError
from safespec_hf.decoding.request import row_processors

PROMPTS = torch.tensor([[0, 12, 13, 14], [21, 22, 23, 24]])
# the likeliest token is drawn: greedy decoding takes one sequence for each prompt only
ARGUMENTS = {"attention_mask": (PROMPTS != 0).long(), "do_sample": True, "top_k": 1, "max_new_tokens": 6}
ARGUMENTS |= {"num_return_sequences": 3}
OF_PROMPTS = {
    "no repeats": ({"encoder_no_repeat_ngram_size": 1}, []),
    "own no repeats": ({}, [EncoderNoRepeatNGramLogitsProcessor(1, PROMPTS)]),
}


@pytest.mark.parametrize("name", OF_PROMPTS)
def test_processors_that_hold_prompts_do_as_in_plain_generate(guarded, name):
    more, own = OF_PROMPTS[name]
    arguments = {**ARGUMENTS, **more, "logits_processor": LogitsProcessorList(own)}
    expected = guarded.generate(PROMPTS, **arguments)
    assert expected.tolist() != guarded.generate(PROMPTS, **ARGUMENTS).tolist()
    assert guarded.generate(PROMPTS, **arguments, safespec=True).tolist() == expected.tolist()


@pytest.mark.parametrize("make", [None, EncoderRepetitionPenaltyLogitsProcessor])
def test_a_penalty_on_prompts_reaches_each_of_their_sequences(guarded, make):
    more = {"logits_processor": LogitsProcessorList([make(3.0, PROMPTS)])} if make else {}
    arguments = {**ARGUMENTS, **(more or {"encoder_repetition_penalty": 3.0})}
    answers = guarded.generate(PROMPTS, **arguments, safespec=True).tolist()
    if not is_before("5.24"):  # older releases penalize the first ones only
        assert answers == guarded.generate(PROMPTS, **arguments).tolist()
    assert answers[::3] == answers[1::3] == answers[2::3] != guarded.generate(PROMPTS, **ARGUMENTS)[::3].tolist()


@pytest.mark.parametrize("source", [{}, {"prompt_lookup_num_tokens": 3}])
def test_prefix_functions_are_told_the_numbers_that_plain_generate_tells(guarded, source):
    numbers, words = [set(), set()], [20, 30, 31, 32, 33, 34]
    answers = [
        guarded.generate(
            PROMPTS,
            **ARGUMENTS,
            **more,
            prefix_allowed_tokens_fn=lambda number, ids, told=told: told.add(number) or [words[number]],
        ).tolist()
        for told, more in zip(numbers, ({}, {**source, "safespec": True}), strict=True)
    ]
    assert answers[0] == answers[1]
    assert numbers[0] == numbers[1]


def test_a_derived_prefix_processor_stays_what_it_is():
    class Kept(PrefixConstrainedLogitsProcessor):
        def __call__(self, input_ids, scores):
            return super().__call__(input_ids, scores) + 1

    processors = LogitsProcessorList([Kept(lambda number, ids: [number], 2)])
    own = row_processors(processors, 3, 4)
    scores = own(torch.tensor([[1], [2], [3]]), torch.zeros(3, 4))
    assert scores.tolist() == [[-torch.inf, 1.0, -torch.inf, -torch.inf]] * 3


@pytest.mark.parametrize(
    "processor",
    [EncoderRepetitionPenaltyLogitsProcessor(2.0, PROMPTS), EncoderNoRepeatNGramLogitsProcessor(2, PROMPTS)],
)
def test_prompts_of_another_batch_are_refused(guarded, processor):
    guarded.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    arguments = {"max_new_tokens": 4, "logits_processor": LogitsProcessorList([processor])}
    with pytest.raises(UnsupportedRequestError, match=r"holds 2 prompts, .* a batch of 1 rows"):
        guarded.generate(PROMPTS[1:], **arguments, safespec=True)


@pytest.mark.skipif(is_before("5.23"), reason="one length for all rows only")
@pytest.mark.parametrize("lengths", [[4], [4, 2], [4] * 7])
def test_lengths_of_another_number_of_rows_are_refused(guarded, lengths):
    guarded.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    own = RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=torch.tensor(lengths))
    with pytest.raises(UnsupportedRequestError, match=r"`prompt_ignore_length` .* but the batch has 6 rows"):
        guarded.generate(PROMPTS, **ARGUMENTS, logits_processor=LogitsProcessorList([own]), safespec=True)
