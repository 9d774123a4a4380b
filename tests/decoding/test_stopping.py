"""Criteria are asked as plain decoding asks them: about kept tokens, in the shape of the batch, and never twice."""

import threading

import pytest
import torch
from scripted import ScriptedModel, count_after, count_up, probe
from tiny import REFLECTION, REFUSAL, THINK, perturb
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head

PADDED = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
FIELDS = {"reflection": REFLECTION, "refusal": REFUSAL, "max_segment_tokens": 3, "rollback_segments": 1}
FIELDS |= {"false_alarm_margin": None}


class MultiTokenEOS(StoppingCriteria):
    """As evaluation harnesses have it: remembers which rows wrote the sequence, and ends all of them at once."""

    def __init__(self, sequence, tokenizer, num_prompt, num_rows):
        self.sequence, self.tokenizer, self.num_prompt = sequence, tokenizer, num_prompt
        self.done_tracker = [False] * num_rows
        self.lock = threading.Lock()  # can't be copied

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.num_prompt :][:, -3:])
        for row, text in enumerate(texts):
            self.done_tracker[row] = self.done_tracker[row] or self.sequence in text.split()
        return all(self.done_tracker)


class Log(StoppingCriteria):
    """Notes what it is shown, in a list that no rollback can reach, and ends rows by a rule."""

    def __init__(self, seen, ends=lambda ids: torch.zeros(len(ids), dtype=torch.bool)):
        self.seen, self.ends = (seen,), ends

    def __call__(self, input_ids, scores, **kwargs):
        self.seen[0].append(input_ids.tolist())
        return self.ends(input_ids)


def drafting(source, target):
    return {"none": {}, "draft": {"assistant_model": perturb(target)}, "lookup": {"prompt_lookup_num_tokens": 4}}[
        source
    ]


@pytest.mark.parametrize("source", ["none", "draft", "lookup"])
@pytest.mark.parametrize("word", [23, 27, 33])
def test_a_criterion_that_ends_all_rows_at_once_gives_what_it_gives_in_plain_generate(
    guarded, tokenizer, source, word
):
    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 24, "do_sample": False}
    answers, trackers = [], []
    for extra in ({}, {**drafting(source, guarded), "safespec": True}):
        criterion = MultiTokenEOS(f"w{word}", tokenizer, 4, 3)
        criteria = StoppingCriteriaList([criterion])
        answers.append(guarded.generate(PADDED, **arguments, **extra, stopping_criteria=criteria).tolist())
        trackers.append(criterion.done_tracker)
    assert answers[0] == answers[1]
    assert trackers[0] == trackers[1]


@pytest.mark.parametrize("source", ["none", "draft", "lookup"])
@pytest.mark.parametrize("eos", [None, 9])
def test_criteria_see_the_batch_once_for_each_length_as_in_plain_generate(guarded, source, eos):
    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 16, "do_sample": False, "eos_token_id": eos}
    logs = [[], []]
    for log, extra in zip(logs, ({}, {**drafting(source, guarded), "safespec": True}), strict=True):
        guarded.generate(PADDED, **arguments, **extra, stopping_criteria=StoppingCriteriaList([Log(log)]))
    # where the length limit or end tokens end all rows, there is nothing left to ask
    assert logs[1] == logs[0][: len(logs[1])]
    assert len(logs[0]) - len(logs[1]) == 1


@pytest.mark.parametrize("source", ["none", "draft", "lookup"])
def test_rows_that_a_stop_string_ended_are_padded_though_there_is_no_end_token(guarded, tokenizer, source):
    # plain decoding pads where there is an end token; where there is none, it lets such rows run on
    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 12, "do_sample": False}
    arguments |= {"stop_strings": ["w23", "thanks"], "tokenizer": tokenizer}
    padded = guarded.generate(PADDED, **arguments, eos_token_id=2).tolist()
    assert guarded.generate(PADDED, **arguments, eos_token_id=None).tolist() != padded
    for eos in (2, None):
        answers = guarded.generate(
            PADDED, **arguments, **drafting(source, guarded), eos_token_id=eos, safespec=True
        ).tolist()
        assert answers == padded


SHAPES = {
    "rows": lambda is_end: is_end,
    "column": lambda is_end: is_end[:, None],
    "one for all": lambda is_end: is_end.any(),
    "the same, in a list's shape": lambda is_end: is_end.any()[None],
    "python's": lambda is_end: bool(is_end.any()),
    "numpy's": lambda is_end: is_end.numpy(),
    "whole numbers": lambda is_end: is_end.long(),
}


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_criterion_may_give_a_value_for_each_row_in_any_shape_that_says_so(guarded, shape, num_rows):
    def is_end(ids, scores):
        return SHAPES[shape]((ids[:, -1] == 27) | (ids[:, -1] == 23))

    ids = PADDED[-num_rows:]
    arguments = {"attention_mask": (ids != 0).long(), "max_new_tokens": 16, "do_sample": False, "eos_token_id": 39}
    rows = "rows" if shape in ("rows", "column", "numpy's", "whole numbers") else "one for all"
    plain = [lambda ids, scores: SHAPES[rows]((ids[:, -1] == 27) | (ids[:, -1] == 23))]
    expected = guarded.generate(ids, **arguments, stopping_criteria=plain)
    assert expected.tolist() != guarded.generate(ids, **arguments).tolist()
    assert guarded.generate(ids, **arguments, stopping_criteria=[is_end], safespec=True).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "value", [None, "yes", [True], torch.zeros(2), torch.zeros(1, 3), torch.zeros(3, 2), torch.zeros(1, 1)], ids=str
)
def test_a_criterion_that_gives_anything_else_is_named(guarded, value):
    def odd_one(ids, scores):
        return value

    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(UnsupportedRequestError, match="The stopping criterion odd_one gave"):
        guarded.generate(PADDED, **arguments, stopping_criteria=[odd_one], safespec=True)


@pytest.mark.parametrize("source", ["none", "draft"])
def test_a_row_that_a_criterion_ends_keeps_what_it_has_when_others_go_on(guarded, source):
    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 16, "do_sample": False, "eos_token_id": 39}
    expected, answers = (
        guarded.generate(
            PADDED,
            **arguments,
            **extra,
            stopping_criteria=StoppingCriteriaList([Log([], lambda ids: ids[:, -1] == 27)]),
        ).tolist()
        for extra in ({}, {**drafting(source, guarded), "safespec": True})
    )
    assert answers == expected


@pytest.mark.parametrize("policy", ["recover", "observe"])
def test_a_row_that_is_far_ahead_of_the_others_can_be_ended_where_nothing_is_revocable(tokenizer, policy):
    def draft(context):  # knows what the first row says
        return count_up(context) if context[0] == 10 else 38

    fields = {"rollback_segments": 0, "max_segment_tokens": 1, "policy": policy, "max_new_tokens": 18}
    criterion = Log([], lambda ids: torch.full((len(ids),), ids.shape[1] > 6))
    tokens = answer(tokenizer, {}, [criterion], draft=draft, prompts=((10,), (20,)), **fields)
    assert tokens == [list(range(11, 17)), list(range(21, 27))]


def answer(tokenizer, risks, criteria, *, draft=None, prompts=((10,),), **arguments):
    model = ScriptedModel(count_after({THINK: 20}), risks)
    attach_safety_head(model, probe(model), tokenizer=tokenizer)
    fields = {"max_new_tokens": 12, "do_sample": False, "assistant_model": draft and ScriptedModel(draft), **arguments}
    own = {name: fields.pop(name) for name in SafeSpecConfig.__slots__ if name in fields}
    policy = SafeSpecConfig(
        **FIELDS | own, num_draft_tokens=5, adaptive_drafts=False, lookup_drafts=False, candidate_source="target"
    )
    output = model.generate(
        torch.tensor(prompts),
        safespec=policy,
        stopping_criteria=StoppingCriteriaList(criteria),
        return_dict_in_generate=True,
        **fields,
    )
    return output.sequences[:, len(prompts[0]) :].tolist()


@pytest.mark.parametrize("draft", [None, count_up])
@pytest.mark.parametrize("word", [13, 14, 15])
def test_a_word_that_was_rolled_back_is_forgotten(tokenizer, draft, word):
    # the second row never writes the word, so the first one goes on until 15 is flagged, and all from 11 on goes
    criterion = MultiTokenEOS(f"w{word}", tokenizer, 1, 2)
    tokens = answer(tokenizer, {15: 0.9}, [criterion], draft=draft, prompts=((10,), (24,)))
    assert tokens == [list(range(20, 32)), list(range(25, 37))]
    assert criterion.done_tracker == [False, False]


@pytest.mark.parametrize("draft", [None, count_up])
@pytest.mark.parametrize("word", [13, 14, 15, 17])
def test_one_that_was_put_back_is_not(tokenizer, draft, word):
    # instead of 15 comes 0, and it counts from there; 20 follows 5
    criterion = MultiTokenEOS(f"w{word}", tokenizer, 1, 2)
    fields = {"draft": draft, "prompts": ((10,), (24,)), "false_alarm_margin": 0.5}
    tokens = answer(tokenizer, {15: 0.9}, [criterion], **fields)
    assert tokens == [[11, 12, 13, 14, *range(6), 20, 21], list(range(25, 37))]
    assert criterion.done_tracker == [word < 15, False]


@pytest.mark.parametrize("draft", [None, count_up])
def test_criteria_never_see_a_flagged_token_or_a_reflection(tokenizer, draft):
    seen = []
    answer(tokenizer, {15: 0.9, 23: 0.8}, [Log(seen)], draft=draft, prompts=((10,), (24,)))
    assert seen
    assert not {15, 4, 5} & {token for batch in seen for row in batch for token in row}
    assert all(len(batch) == 2 for batch in seen)


@pytest.mark.parametrize("draft", [None, count_up])
def test_what_comes_after_a_stop_is_no_part_of_the_answer_however_risky(tokenizer, draft):
    assert answer(tokenizer, {15: 0.9}, [Log([], lambda ids: ids[:, -1] == 14)], draft=draft) == [[11, 12, 13, 14]]


@pytest.mark.parametrize("draft", [None, count_up])
def test_a_criterion_that_counts_is_not_thrown_off_by_a_rollback(tokenizer, draft):
    class Count(StoppingCriteria):
        num_seen = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.num_seen += 1
            return torch.full((len(input_ids),), self.num_seen >= 8)

    criterion = Count()
    criterion.num_seen = 0
    assert len(answer(tokenizer, {15: 0.9}, [criterion], draft=draft)[0]) == 8


def test_a_stop_inside_of_a_recovered_segment_ends_the_answer(tokenizer):
    assert answer(tokenizer, {15: 0.9}, [Log([], lambda ids: ids[:, -1] == 21)]) == [[20, 21]]


def test_a_batch_under_flags_ends_each_row_where_its_own_stop_string_is(tokenizer):
    criterion = StopStringCriteria(tokenizer, ["w22"])
    tokens = answer(tokenizer, {15: 0.9}, [criterion], prompts=((10,), (18,)))
    assert tokens == [[20, 21, 22, 0], [19, 20, 21, 22]]


def test_what_a_criterion_or_a_processor_keeps_is_not_rewritten_after_a_rollback(flagging):
    kept, copies = [], []

    def keep(ids, scores):
        kept.append(ids)
        copies.append(ids.tolist())
        return False

    def keep_too(ids, scores):
        keep(ids, scores)
        return scores

    fields = {"max_recoveries": 50, "num_candidates": 8, "candidate_source": "target"}
    arguments = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True}
    policy = SafeSpecConfig(**{**FIELDS, **fields})
    callers = {"stopping_criteria": [keep], "logits_processor": [keep_too]}
    output = flagging.generate(PADDED[-1:], **arguments, **callers, safespec=policy)
    assert len(output.events[0]) > 1
    assert [ids.tolist() for ids in kept] == copies
