"""Processors are not asked about drafts that they leave no chance: plain decoding never comes to such a text."""

import pytest
import torch
from drafting_methods import shuffled_tokenizer
from tiny import DRAFTING, POLICY, attach, build_model, drafting, make_row
from transformers import LogitsProcessor, LogitsProcessorList, TopKLogitsWarper

from safespec_hf import SafeSpecConfig
from safespec_hf.answer.logits import process_drafts, process_guesses

WORDS = range(10, 40)
PROMPT = torch.tensor([[12, 18, 24, 13, 12, 18, 24, 13]])
NUM = PROMPT.shape[1]
ARGUMENTS = {"max_new_tokens": 24, "do_sample": False}


def in_turns(row, ids):
    """Even and odd words in turns; after any other text nothing may follow."""
    ids = ids[NUM:].tolist()
    is_known = all(token % 2 == index % 2 for index, token in enumerate(ids))
    return [word for word in WORDS if word % 2 == len(ids) % 2] if is_known else []


class Grammar(LogitsProcessor):
    """The same, of somebody else's; it bars words with `bar` and writes in place."""

    def __init__(self, bar=-torch.inf):
        self.bar = bar

    def __call__(self, input_ids, scores):
        for ids, scores_V in zip(input_ids, scores, strict=True):
            allowed = in_turns(0, ids)
            scores_V[[word for word in range(len(scores_V)) if word not in allowed]] = self.bar
            if not allowed:
                raise KeyError("no such state")
        return scores


PROCESSORS = {
    "function": {"prefix_allowed_tokens_fn": in_turns},
    "function, other values": {"prefix_allowed_tokens_fn": in_turns, "remove_invalid_values": True},
    "function, then a penalty": {"prefix_allowed_tokens_fn": in_turns, "suppress_tokens": [20], "top_k": 4},
    "grammar": {"logits_processor": LogitsProcessorList([Grammar()])},
    "grammar, finite": {"logits_processor": LogitsProcessorList([Grammar(torch.finfo(torch.float32).min)])},
}


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.usefixtures("cheap_drafts")
def test_answers_are_those_of_plain_generate(tokenizer, name, source):
    target = build_model()
    expected = target.generate(PROMPT, **ARGUMENTS, **PROCESSORS[name])
    guarded = attach(target, tokenizer)
    for policy in (POLICY, SafeSpecConfig(), SafeSpecConfig(adaptive_drafts=False)):
        arguments = {**PROCESSORS[name], **drafting(source, target), "safespec": policy}
        assert guarded.generate(PROMPT, **ARGUMENTS, **arguments).tolist() == expected.tolist()


@pytest.mark.parametrize("source", [*DRAFTING, "foreign"])
@pytest.mark.usefixtures("cheap_drafts")
def test_samples_keep_to_the_grammar(tokenizer, source):
    target = build_model()
    draft = drafting(source, target) if source != "foreign" else {"assistant_model": build_model(seed=1)}
    draft |= {"assistant_tokenizer": shuffled_tokenizer()} if source == "foreign" else {}
    guarded, arguments = attach(target, tokenizer), {"max_new_tokens": 24, "do_sample": True, "top_k": 0}
    answer = guarded.generate(
        PROMPT, **arguments, **draft, prefix_allowed_tokens_fn=in_turns, safespec=SafeSpecConfig()
    )
    assert [token % 2 for token in answer[0, NUM:].tolist()] == [0, 1] * 12


@pytest.mark.parametrize("looks", [True, False])
def test_what_comes_after_an_impossible_draft_keeps_its_raw_logits(monkeypatch, looks):
    if not looks:  # as on an accelerator, where it looks only once a processor has raised
        monkeypatch.setattr("safespec_hf.answer.logits.looks_ahead", lambda _: False)
    row = make_row(PROMPT[0].tolist(), processors=LogitsProcessorList([Grammar()]))
    drafts, parents, raw_TV = [10, 11, 14, 13, 13], [-1, 0, 0, 2, -1], torch.zeros(6, 40)
    ids = [row.visible_ids(path) for path in ([], [10], [10, 11], [10, 14], [10, 14, 13], [13])]
    scores_TV = process_drafts(row, ids, drafts, parents, raw_TV)
    assert [bool((scores_V == 0).all()) for scores_V in scores_TV] == [False, False, False, True, True, True]
    assert raw_TV.eq(0).all()


def test_where_nothing_is_possible_every_draft_is_asked_about(monkeypatch):
    seen = []

    class Nothing(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.shape[1])
            return torch.full_like(scores, -torch.inf)

    row = make_row([11, 12], processors=LogitsProcessorList([Nothing(), TopKLogitsWarper(2)]))
    ids = [row.visible_ids([0] * num) for num in range(3)]
    process_drafts(row, ids, [0, 0], [-1, 0], torch.zeros(3, 40))
    assert seen == [2, 3, 4]


class Failing(LogitsProcessor):
    def __init__(self, error=KeyError):
        self.error = error

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 2:
            raise self.error("a fault")
        return scores


@pytest.mark.parametrize("source", DRAFTING)
def test_what_a_processor_raises_at_a_text_that_is_possible_is_the_callers(guarded, source):
    processors = LogitsProcessorList([Failing()])
    with pytest.raises(KeyError, match="a fault"):
        guarded.generate(
            PROMPT[:, :2], **ARGUMENTS, logits_processor=processors, **drafting(source, guarded), safespec=True
        )


def test_a_guess_goes_without_processors_that_raise():
    row = make_row([11, 12], processors=LogitsProcessorList([Failing()]))
    assert process_guesses([row], [row.visible_ids([13])], torch.ones(1, 40)).tolist() == [[1.0] * 40]


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_running_out_of_memory_at_a_guess_is_told(error):
    row = make_row([11, 12], processors=LogitsProcessorList([Failing(error)]))
    with pytest.raises(error):
        process_guesses([row], [row.visible_ids([13])], torch.ones(1, 40))
