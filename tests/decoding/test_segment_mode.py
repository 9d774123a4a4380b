"""Segment mode on scripted models: what is accepted, what the target writes instead, and in how many forwards."""

import math

import pytest
import torch
from scripted import TURNS, ScriptedModel, answer, count_after, count_up, probe, tokens_of
from tiny import FIRST_DIGIT, NO, THANKS, Recorder, build_draft_head, build_model, build_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from safespec_hf import Provenance, SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding import drafts
from safespec_hf.engine.cache import CACHE_NAME

TARGET, DRAFTED, RECOVERED, REFLECTED, REFUSED = Provenance
ASK = [27, 28]
PROMPT = "w27 w28"
GOOD, BAD = 9, 3
SEGMENTS = SafeSpecConfig(verification="segment", quality_prompt=PROMPT, max_segment_tokens=3)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(has_digits=True)


def graded(grade=lambda text: GOOD, script=count_up):
    """A target that says what `script` says, and after the quality prompt the grade of the text before it."""
    return lambda context: FIRST_DIGIT + grade(context[:-2]) if context[-2:] == ASK else script(context)


def judge(tokenizer, risks=None, *, draft=count_up, grade=lambda text: GOOD, script=count_up, say=None, **arguments):
    """One answer in segment mode; `say` are the chances of what the target says to the quality prompt."""
    fields = {"verification": "segment", "quality_prompt": PROMPT, **arguments}
    target = graded(grade, script)
    told = target if say is None else lambda context: say if context[-2:] == ASK else script(context)
    return answer(tokenizer, risks, draft=draft, script=told, **fields)


def dislike(token):
    """Grades badly what holds this token."""
    return lambda text: BAD if token in text else GOOD


def outcomes(output):
    return [segment.outcome for segment in output.segments[0]]


# The draft goes off after 13: 20 21 22 in the place of 14 15 16.
ASTRAY = {"draft": count_after({13: 20}), "grade": dislike(20)}


def test_good_segments_are_taken_whole_in_one_forward_each(tokenizer):
    output = judge(tokenizer)
    assert tokens_of(output) == list(range(11, 20))
    assert output.provenance.tolist() == [[DRAFTED] * 9]
    assert output.model.num_forwards == output.statistics.num_target_forwards == 3
    assert (output.statistics.num_segments, output.statistics.num_segments_accepted) == (3, 3)
    assert output.statistics.num_segments_by_target == 0
    assert output.statistics.acceptance_rate == 1
    assert [(one.position, one.num_tokens, one.quality) for one in output.segments[0]] == [
        (0, 3, 9),
        (3, 3, 9),
        (6, 3, 9),
    ]


def test_every_token_of_an_accepted_answer_has_its_risk(tokenizer):
    output = judge(tokenizer, {14: 0.3, 19: 0.2})
    assert output.risks[0].tolist() == pytest.approx([0.1] * 3 + [0.3] + [0.1] * 4 + [0.2])
    assert [one.risk for one in output.segments[0]] == pytest.approx([0.1, 0.3, 0.2])


def test_words_of_the_draft_are_taken_even_where_the_target_has_others(tokenizer):
    output = judge(tokenizer, draft=count_after({13: 20}))
    assert tokens_of(output) == [11, 12, 13, *range(20, 26)]
    assert output.model.num_forwards == 3


def test_what_is_not_good_enough_is_written_by_the_target(tokenizer):
    output = judge(tokenizer, **ASTRAY)
    assert tokens_of(output) == list(range(11, 20))
    assert outcomes(output) == ["accepted", "rewritten", "accepted"]
    assert [one.quality for one in output.segments[0]] == [GOOD, BAD, GOOD]
    statistics = output.statistics
    assert (statistics.num_segments, statistics.num_segments_accepted, statistics.num_segments_by_target) == (3, 2, 1)
    # one for each segment; one says that it is 14 and not 20, and one that it is 15 and then 16
    assert output.model.num_forwards == 3 + 2
    assert output.provenance.tolist() == [[DRAFTED] * 3 + [TARGET, DRAFTED, DRAFTED] + [DRAFTED] * 3]


def test_a_draft_as_slow_as_the_target_is_not_asked_for_guesses(tokenizer, monkeypatch):
    monkeypatch.setattr(drafts, "num_read", lambda model: 1)
    output = judge(tokenizer, **ASTRAY, adaptive_drafts=True)
    assert tokens_of(output) == list(range(11, 20))
    assert output.provenance.tolist() == [[DRAFTED] * 3 + [TARGET] * 3 + [DRAFTED] * 3]
    assert output.statistics.num_draft_tokens == 9
    assert output.model.num_forwards == 3 + 3


def test_the_target_accepts_of_a_bad_segment_what_it_would_have_written(tokenizer):
    output = judge(tokenizer, draft=count_after({14: 20}), grade=dislike(20))
    assert tokens_of(output) == list(range(11, 20))
    assert output.provenance.tolist() == [[DRAFTED] * 4 + [TARGET] + [DRAFTED] * 4]


def test_a_bad_segment_that_the_target_would_have_written_as_well_stands(tokenizer):
    output = judge(tokenizer, grade=lambda text: BAD)
    assert tokens_of(output) == list(range(11, 20))
    assert outcomes(output) == ["rewritten"] * 3
    assert output.model.num_forwards == 6
    assert not output.risks.isnan().any()


def test_the_quality_prompt_is_read_right_after_a_segment_and_forgotten(tokenizer):
    output = judge(tokenizer, **ASTRAY)
    asked = [context for context in output.model.contexts if context[-2:] == ASK]
    assert asked == [[*text, *ASK] for text in ([10, 11, 12, 13], [10, 11, 12, 13, 20, 21, 22], range(10, 20))]
    others = [context for context in output.model.contexts if context not in asked]
    assert not any(set(ASK) & set(context) for context in others)
    cache = output[CACHE_NAME]
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == list(range(10, 19))


@pytest.mark.parametrize(("threshold", "num_accepted"), [(0, 3), (7.2, 3), (7.21, 0), (9, 0)])
def test_an_expected_grade_may_be_a_fraction(tokenizer, threshold, num_accepted):
    arguments = {"quality_reading": "expected", "quality_threshold": threshold}
    output = judge(tokenizer, say={FIRST_DIGIT + 9: 0.6, FIRST_DIGIT: 0.15, 11: 0.25}, **arguments)
    assert output.statistics.num_segments_accepted == num_accepted
    assert [one.quality for one in output.segments[0]] == pytest.approx([7.2] * 3)


def test_a_grade_that_is_no_number_is_not_good_enough(tokenizer):
    output = judge(tokenizer, say={FIRST_DIGIT: math.nan}, quality_threshold=0)
    assert outcomes(output) == ["rewritten"] * 3
    assert tokens_of(output) == list(range(11, 20))


@pytest.mark.parametrize("grade", [GOOD, BAD])
def test_safety_comes_first_whatever_the_grade(tokenizer, grade):
    output = judge(tokenizer, {15: 0.9}, grade=lambda text: grade if 15 in text else GOOD, script=count_after(TURNS))
    assert outcomes(output)[:2] == ["accepted", "flagged"]
    (event,) = output.events[0]
    assert (event.position, event.rolled_back_to, event.num_discarded) == (4, 3, 3)
    assert event.outcome == "recovered"
    assert 15 not in tokens_of(output)
    assert len(tokens_of(output)) == 9


def test_after_a_recovery_the_draft_has_the_word_again(tokenizer):
    output = judge(tokenizer, {15: 0.9}, draft=count_after(TURNS), script=count_after(TURNS))
    assert output.provenance[0].tolist() == [DRAFTED] * 3 + [RECOVERED] * 3 + [DRAFTED] * 3
    assert outcomes(output) == ["accepted", "flagged", "accepted"]
    assert output.statistics.num_target_forwards == 3 + 1


@pytest.mark.parametrize("token", [14, 15])
def test_what_the_target_writes_is_scored_as_well(tokenizer, token):
    output = judge(tokenizer, {token: 0.9}, **ASTRAY, max_recoveries=0)
    assert outcomes(output) == ["accepted", "rewritten"]
    assert output.events[0][0].position == token - 11
    assert tokens_of(output) == [11, 12, 13, 8, NO, THANKS]


def test_the_last_token_of_what_the_target_wrote_is_scored_with_the_next_segment(tokenizer):
    # 14, 25, 16: the target's own words throughout
    draft, script = count_after({13: 20}), count_after({14: 25, 25: 16})
    output = judge(tokenizer, {16: 0.9}, draft=draft, script=script, grade=dislike(20), max_recoveries=0)
    assert outcomes(output) == ["accepted", "rewritten", "dropped"]
    assert (output.events[0][0].position, output.segments[0][2].position) == (5, 6)
    assert tokens_of(output) == [11, 12, 13, 8, NO, THANKS]


def test_the_first_segments_can_be_the_targets(tokenizer):
    output = judge(tokenizer, draft=count_after({11: 20}), num_target_segments=2)
    assert tokens_of(output) == list(range(11, 20))
    assert [one.position for one in output.segments[0]] == [6]
    assert (output.statistics.num_segments, output.statistics.num_segments_by_target) == (1, 2)


def test_a_segment_ends_at_a_newline(tokenizer):
    output = judge(tokenizer, draft=count_after({12: 7, 7: 14}), min_segment_tokens=2, max_segment_tokens=5)
    assert tokens_of(output) == [11, 12, 7, 14, 15, 16, 17, 18, 19]
    assert [one.num_tokens for one in output.segments[0]] == [3, 5, 1]


@pytest.mark.parametrize("wish", [None, True, False])
def test_an_end_token_ends_segment_and_answer(tokenizer, wish):
    output = judge(tokenizer, eos_token_id=15, score_last_token=wish)
    assert tokens_of(output) == [11, 12, 13, 14, 15]
    assert output.finish_reasons == ["eos"]
    assert output.model.num_forwards == 2
    assert output.model.contexts[-1][-3:] == [15, *ASK]


def test_an_end_token_of_the_target_ends_the_answer(tokenizer):
    output = judge(tokenizer, **ASTRAY, eos_token_id=15)
    assert tokens_of(output) == [11, 12, 13, 14, 15]
    assert (outcomes(output), output.finish_reasons) == (["accepted", "rewritten"], ["eos"])


@pytest.mark.parametrize("token", [14, 15, 16])
def test_a_segment_is_judged_up_to_a_stop_string(tokenizer, token):
    output = judge(tokenizer, {token + 1: 0.9}, stop_strings=[f"w{token}"])
    assert tokens_of(output) == list(range(11, token + 1))
    assert output.finish_reasons == ["stop"]
    assert output.model.contexts[-1][-3:] == [token, *ASK]


class EndsAt(StoppingCriteria):
    """Stops after a token, and remembers all that it saw."""

    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(int(input_ids[0, -1]))
        return input_ids[:, -1] == self.token


def test_a_criterion_of_the_callers_own_hears_of_what_is_kept_and_cuts_a_segment(tokenizer):
    criterion = EndsAt(17)
    output = judge(tokenizer, **ASTRAY, stopping_criteria=StoppingCriteriaList([criterion]))
    assert tokens_of(output) == list(range(11, 18))
    assert criterion.seen == list(range(11, 18))
    assert output.finish_reasons == ["stop"]


@pytest.mark.parametrize("most", range(1, 12))
@pytest.mark.parametrize("case", [{}, ASTRAY, {"grade": lambda text: BAD}])
def test_an_answer_has_as_many_tokens_as_it_may(tokenizer, case, most):
    output = judge(tokenizer, **case, max_new_tokens=most)
    assert tokens_of(output) == list(range(11, 11 + most))
    assert output.finish_reasons == ["length"]
    assert not output.risks.isnan().any()


@pytest.mark.parametrize(
    ("whose", "positions"),
    [("target", num) for num in (8, 13, 14, 17, 19)] + [("draft", num) for num in (6, 8, 13, 16)],
)
def test_where_there_is_no_room_for_a_segment_the_target_goes_on(tokenizer, whose, positions):
    models = {name: ScriptedModel(graded(), max_position_embeddings=512) for name in ("target", "draft")}
    models[whose].config.max_position_embeddings = positions
    attach_safety_head(models["target"], probe(models["target"]), tokenizer=tokenizer)
    output = models["target"].generate(
        torch.arange(5, 11)[None],
        assistant_model=models["draft"],
        max_new_tokens=12,
        do_sample=False,
        safespec=SEGMENTS,
        return_dict_in_generate=True,
    )
    assert output.sequences[0].tolist() == list(range(5, 23))
    assert output.statistics.num_segments_by_target > 0
    # the target may write beyond its context, as in plain decoding, but nothing else is read there
    asked = [context for context in models["target"].contexts if context[-2:] == ASK]
    assert max(map(len, asked), default=0) <= models["target"].config.max_position_embeddings


class Shift(LogitsProcessor):
    """What everyone says is one more."""

    def __call__(self, input_ids, scores):
        return torch.roll(scores, 1, dims=-1)


def test_the_draft_writes_with_the_calls_processors_and_the_grade_is_read_without(tokenizer):
    output = judge(tokenizer, logits_processor=LogitsProcessorList([Shift()]))
    assert tokens_of(output) == list(range(12, 29, 2))
    assert [one.quality for one in output.segments[0]] == [GOOD] * 3


class Spoiled(LogitsProcessor):
    """Scores after 12 are no numbers the first time, which is the draft's."""

    def __init__(self):
        self.num_calls = 0

    def __call__(self, input_ids, scores):
        if input_ids[0, -1] != 12:
            return scores
        self.num_calls += 1
        return torch.full_like(scores, math.nan) if self.num_calls == 1 else scores


def test_a_token_without_a_score_is_not_proposed(tokenizer):
    script = count_after({12: 30, 30: 13})
    output = judge(tokenizer, draft=count_up, script=script, logits_processor=LogitsProcessorList([Spoiled()]))
    assert outcomes(output)[0] == "accepted"
    assert output.segments[0][0].num_tokens == 2


def test_the_stream_is_the_answer(tokenizer):
    recorder = Recorder()
    output = judge(tokenizer, {15: 0.9}, script=count_after(TURNS), streamer=recorder, rollback_segments=1)
    assert recorder.tokens == output.sequences[0].tolist()
    assert recorder.num_ends == 1


def test_without_segment_mode_there_are_no_segments(tokenizer):
    output = answer(tokenizer, draft=count_up)
    assert output.segments is None
    assert output.statistics.num_segments == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "the draft is none"),
        ({"prompt_lookup_num_tokens": 3}, "the draft is prompt lookup"),
        ({"assistant_model": "head"}, "the draft is a draft head"),
        ({"assistant_model": "model", "prompt_lookup_num_tokens": 3}, "the draft is prompt lookup"),
    ],
)
def test_a_draft_that_cant_write_segments_is_refused(target, never, tokenizer, arguments, named):
    attach_safety_head(target, never, tokenizer=tokenizer)
    drafts = {"head": build_draft_head, "model": lambda _: build_model()}
    if "assistant_model" in arguments:
        arguments = {**arguments, "assistant_model": drafts[arguments["assistant_model"]](target)}
    with pytest.raises(UnsupportedRequestError, match=named):
        target.generate(torch.tensor([[11, 12]]), max_new_tokens=4, safespec=SEGMENTS, **arguments)


def test_a_tokenizer_without_digits_is_refused(target, draft, never):
    attach_safety_head(target, never, tokenizer=build_tokenizer())
    with pytest.raises(UnsupportedRequestError, match=r"no token for \[0, 1, 2"):
        target.generate(torch.tensor([[11, 12]]), max_new_tokens=4, safespec=SEGMENTS, assistant_model=draft)


def test_observing_takes_segments_as_they_are_and_reports_their_flags(tokenizer):
    output = judge(tokenizer, {12: 0.9, 17: 0.8}, policy="observe")
    assert tokens_of(output) == list(range(11, 20))
    assert outcomes(output) == ["accepted"] * 3
    assert [(event.position, event.outcome) for event in output.events[0]] == [(1, "observed"), (6, "observed")]


@pytest.mark.parametrize("policy", ["refuse", "stop"])
def test_a_flagged_segment_ends_the_answer_where_that_is_the_policy(tokenizer, policy):
    output = judge(tokenizer, {15: 0.9}, policy=policy, rollback_segments=0)
    assert 15 not in tokens_of(output)
    assert tokens_of(output)[:3] == [11, 12, 13]
    assert outcomes(output) == ["accepted", "flagged"]


def test_an_unsafe_prompt_is_flagged_before_its_first_segment(tokenizer):
    script = count_after(TURNS)
    output = judge(tokenizer, {10: 0.9}, head={"prompt_threshold": 0.5}, script=script, draft=script)
    event = output.events[0][0]
    assert (event.outcome, event.is_prompt, event.rolled_back_to) == ("recovered", True, 0)
    assert outcomes(output)[0] == "dropped"
    assert tokens_of(output)[0] in (20, 30)
    fields = {"head": {"prompt_threshold": 0.5}, "false_alarm_margin": 0.5}
    dismissed, silent = judge(tokenizer, {10: 0.9}, **fields), judge(tokenizer)
    assert [event.outcome for event in dismissed.events[0]] == ["dismissed"]
    assert tokens_of(dismissed) == tokens_of(silent)


def test_after_a_false_alarm_the_likeliest_candidate_is_taken_and_not_the_drafts_own_words_again(tokenizer):
    script = count_after({13: {14: 0.9, 30: 0.1}})
    fields = {"script": script, "false_alarm_margin": 0.5, "flagged_token_penalty": math.inf}
    output = judge(tokenizer, {15: 0.9}, **fields)
    (event,) = output.events[0]
    assert event.outcome == "dismissed"
    assert event.chosen is not None
    assert tokens_of(output)[:6] == [11, 12, 13, 30, 31, 32]
