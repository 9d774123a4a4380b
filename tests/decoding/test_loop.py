"""The loop on a scripted target, token by token: what is rolled back, what is chosen, and what comes back about it."""

import math

import pytest
import torch
from scripted import TURNS, ScriptedModel, answer, count_after, count_up, probe, risks_of, tokens_of
from tiny import NO, PAUSE, REFLECTION, REFUSAL, THANKS, THINK
from transformers import LogitsProcessor, LogitsProcessorList

from safespec_hf import Provenance, SafeSpecConfig, attach_safety_head

TARGET, DRAFTED, RECOVERED, REFLECTED, REFUSED = Provenance
BLANK_LINE = 8
REFUSAL_IDS = [NO, THANKS]


@pytest.mark.parametrize("draft", [None, count_up])
def test_without_risk_the_answer_is_the_targets(tokenizer, draft):
    output = answer(tokenizer, draft=draft)
    assert tokens_of(output) == list(range(11, 20))
    assert output.events == [[]]
    assert output.finish_reasons == ["length"]


def test_every_token_knows_whether_it_was_drafted(tokenizer):
    output = answer(tokenizer, draft=count_up, num_draft_tokens=2, max_new_tokens=6)
    assert output.provenance.tolist() == [[DRAFTED, DRAFTED, TARGET] * 2]
    assert (output.statistics.num_draft_tokens, output.statistics.acceptance_rate) == (4, 1.0)


def test_rejected_drafts_are_counted_but_not_returned(tokenizer):
    output = answer(tokenizer, draft=count_after({12: 30}), num_draft_tokens=3, max_new_tokens=4)
    assert tokens_of(output) == [11, 12, 13, 14]
    assert output.provenance.tolist() == [[DRAFTED, DRAFTED, TARGET, TARGET]]
    assert (output.statistics.num_draft_tokens, output.statistics.num_accepted_tokens) == (3, 2)


@pytest.mark.parametrize("draft", [None, count_up])
@pytest.mark.parametrize(("rollback_segments", "kept"), [(0, 3), (1, 0), (4, 0)])
def test_the_flagged_segment_and_so_many_before_it_are_replaced(tokenizer, draft, rollback_segments, kept):
    output = answer(tokenizer, {15: 0.9}, draft=draft, rollback_segments=rollback_segments, candidate_source="target")
    first = tokens_of(output)[kept]
    assert first in (20, 30)
    assert tokens_of(output) == [*range(11, 11 + kept), *range(first, first + 9 - kept)]
    (event,) = output.events[0]
    assert (event.position, event.rolled_back_to, event.outcome) == (4, kept, "recovered")
    assert event.num_discarded == 6 - kept  # 16 was there already when the risk of 15 came
    assert event.risk == pytest.approx(0.9, abs=1e-6)


def test_no_flagged_token_is_returned_and_all_returned_risks_are_below_the_threshold(tokenizer):
    output = answer(tokenizer, {15: 0.9, 22: 0.7, 33: 0.8}, num_candidates=16, max_new_tokens=12)
    assert not {15, 22, 33} & set(tokens_of(output))
    assert all(risk < 0.5 or math.isnan(risk) for risk in risks_of(output))


@pytest.mark.parametrize("draft", [None, count_after(TURNS)])
def test_the_candidate_of_lowest_risk_is_chosen(tokenizer, draft):
    output = answer(tokenizer, {15: 0.9, 20: 0.3, 30: 0.2}, draft=draft, num_candidates=16)
    (event,) = output.events[0]
    assert {round(risk, 6) for risk in event.candidate_risks} == {0.3, 0.2}
    assert event.chosen == event.candidate_risks.index(min(event.candidate_risks))
    assert tokens_of(output)[:6] == [11, 12, 13, 30, 31, 32]


def test_a_candidate_is_as_risky_as_its_riskiest_token(tokenizer):
    output = answer(tokenizer, {15: 0.9, 20: 0.2, 30: 0.1, 32: 0.4}, num_candidates=16)
    assert {round(risk, 6) for risk in output.events[0][0].candidate_risks} == {0.2, 0.4}
    assert tokens_of(output)[3:6] == [20, 21, 22]


def test_among_equal_risks_the_target_chooses_the_likelier(tokenizer):
    script = count_after({THINK: {20: 0.4, 30: 0.6}})
    output = answer(tokenizer, {15: 0.9}, script=script, num_candidates=16)
    (event,) = output.events[0]
    assert tokens_of(output)[3] == 30
    # log(.6) and log(.4) over three tokens of which the others are sure, to six digits in float32
    expected = {round(math.log(chance) / 3, 5) for chance in (0.4, 0.6)}
    assert {round(value, 5) for value in event.candidate_log_probs} == expected


def test_a_recovered_segment_is_marked_and_decoding_goes_on_after_it(tokenizer):
    output = answer(tokenizer, {15: 0.9}, draft=count_after(TURNS), num_draft_tokens=1)
    origins = output.provenance[0].tolist()
    assert origins[3:6] == [RECOVERED] * 3
    assert set(origins[:3] + origins[6:]) == {DRAFTED, TARGET}


def test_the_target_reads_the_reflection_that_the_caller_does_not_see(tokenizer):
    output = answer(tokenizer, {15: 0.9})
    assert not {PAUSE, THINK} & set(tokens_of(output))
    assert output.model.contexts[-1][:7] == [10, 11, 12, 13, PAUSE, THINK, tokens_of(output)[3]]


@pytest.mark.parametrize("draft", [None, count_after(TURNS)], ids=["target", "draft"])
def test_candidates_may_follow_a_reflection_that_is_gone_when_the_answer_goes_on(tokenizer, draft):
    output = answer(tokenizer, {15: 0.9}, draft=draft, reflection_scope="recovery")
    assert not {PAUSE, THINK} & set(tokens_of(output))
    # 20 and 30 come after a reflection only
    assert tokens_of(output)[3] in {20, 30}
    assert output.model.contexts[-1] == [10, *tokens_of(output)[: len(output.model.contexts[-1]) - 1]]


def test_among_equal_risks_the_one_is_chosen_that_is_likelier_where_it_will_stand(tokenizer):
    script = count_after({THINK: {20: 0.6, 30: 0.4}, 13: {14: 0.5, 20: 0.2, 30: 0.3}})
    output = answer(tokenizer, {15: 0.9}, script=script, num_candidates=16, reflection_scope="recovery")
    (event,) = output.events[0]
    assert tokens_of(output)[3] == 30
    # over three tokens of which the others are sure, in float32
    expected = {round(math.log(chance) / 3, 5) for chance in (0.2, 0.3)}
    assert {round(value, 5) for value in event.candidate_log_probs} == expected


def test_a_candidate_that_is_unsafe_without_the_reflection_is_not_returned(tokenizer):
    # after the reflection 20 is as safe as 30; where it will stand it is not
    risks = {15: 0.9, 20: lambda context: 0.1 if THINK in context else 0.9}
    output = answer(tokenizer, risks, num_candidates=16, reflection_scope="recovery")
    assert tokens_of(output)[3] == 30
    assert max(output.events[0][0].candidate_risks) > 0.5


def test_a_kept_reflection_is_returned_without_risk_and_takes_room(tokenizer):
    output = answer(tokenizer, {15: 0.9}, keep_reflection=True)
    assert len(tokens_of(output)) == 9
    assert tokens_of(output)[:5] == [11, 12, 13, PAUSE, THINK]
    assert output.provenance[0, 3:5].tolist() == [REFLECTED] * 2
    assert output.risks[0].isnan().tolist() == [False] * 3 + [True] * 2 + [False] * 4


def test_without_a_reflection_candidates_continue_what_was_kept(tokenizer):
    script = count_after({13: {14: 0.6, 30: 0.4}})
    output = answer(tokenizer, {15: 0.9}, script=script, reflection="", num_candidates=16)
    assert tokens_of(output)[:6] == [11, 12, 13, 30, 31, 32]


@pytest.mark.parametrize("span", ["segment", "answer"])
@pytest.mark.parametrize("pooling", ["last", "mean", "ewma"])
def test_a_reflection_is_never_scored(tokenizer, span, pooling):
    script = count_after({THINK: 20})
    risks = {15: 0.9999999, PAUSE: 0.9999, THINK: 0.9999}
    output = answer(tokenizer, risks, script=script, head={"span": span, "pooling": pooling, "ewma_decay": 0.1})
    assert len(output.events[0]) == 1
    assert tokens_of(output) == [11, 12, 13, *range(20, 26)]
    # every token that is left has the same hidden state, and so has any mean of them
    assert risks_of(output)[:-1] == [0.1] * 8


def test_pooling_starts_again_with_each_segment(tokenizer):
    output = answer(tokenizer, {11: 0.4, 12: 0.3, 14: 0.2}, head={"pooling": "mean"}, max_new_tokens=6)
    logit = {
        token: math.log(risk / (1 - risk)) for token, risk in {11: 0.4, 12: 0.3, 13: 0.1, 14: 0.2, 15: 0.1}.items()
    }
    means = [logit[11], (logit[11] + logit[12]) / 2, (logit[11] + logit[12] + logit[13]) / 3]
    means += [logit[14], (logit[14] + logit[15]) / 2]
    assert risks_of(output)[:5] == pytest.approx([1 / (1 + math.exp(-mean)) for mean in means], abs=1e-5)  # float32


def test_when_no_candidate_is_safe_it_is_tried_again_and_then_refused(tokenizer):
    output = answer(tokenizer, {15: 0.9, 20: 0.6, 30: 0.7}, max_recoveries=3, num_candidates=4)
    assert [event.outcome for event in output.events[0]] == ["retried"] * 3 + ["refused"]
    assert [len(event.candidate_risks) for event in output.events[0]] == [4, 4, 4, 0]
    assert [event.chosen for event in output.events[0]] == [None] * 4
    assert tokens_of(output) == [11, 12, 13, BLANK_LINE, *REFUSAL_IDS]
    assert output.provenance[0].tolist() == [TARGET] * 3 + [REFUSED] * 3
    assert output.finish_reasons == ["safety_refusal"]
    assert output.statistics.num_recovery_attempts == 3


def test_no_recoveries_is_a_hard_refusal(tokenizer):
    output = answer(tokenizer, {15: 0.9}, max_recoveries=0)
    assert tokens_of(output) == [11, 12, 13, BLANK_LINE, *REFUSAL_IDS]
    assert [event.outcome for event in output.events[0]] == ["refused"]


def test_a_refusal_of_the_whole_answer_has_no_blank_line_before_it(tokenizer):
    assert tokens_of(answer(tokenizer, {11: 0.9}, max_recoveries=0)) == REFUSAL_IDS


def test_a_refusal_ends_with_the_end_token_if_there_is_one(tokenizer):
    assert tokens_of(answer(tokenizer, {11: 0.9}, max_recoveries=0, eos_token_id=39)) == [*REFUSAL_IDS, 39]


def test_a_refusal_never_exceeds_max_length(tokenizer):
    output = answer(tokenizer, {14: 0.9}, max_recoveries=0, max_new_tokens=5)
    assert tokens_of(output) == [11, 12, 13, BLANK_LINE, NO]


@pytest.mark.parametrize("keep_reflection", [False, True])
def test_a_refusal_leaves_no_reflection_behind(tokenizer, keep_reflection):
    output = answer(tokenizer, {15: 0.9, 20: 0.9, 30: 0.9}, keep_reflection=keep_reflection)
    assert not {PAUSE, THINK} & set(tokens_of(output))


@pytest.mark.parametrize(("penalty", "first_tokens"), [(0.0, 20), (math.inf, 30)])
def test_a_second_attempt_is_steered_away_from_what_was_just_flagged(tokenizer, penalty, first_tokens):
    script = count_after({THINK: {20: 0.99999, 30: 0.00001}})
    arguments = {"flagged_token_penalty": penalty, "max_recoveries": 2, "num_candidates": 1}
    output = answer(tokenizer, {15: 0.9, 20: 0.9}, script=script, **arguments)
    assert output.events[0][0].outcome == "retried"
    assert (tokens_of(output)[3] == first_tokens) is (first_tokens == 30)
    assert output.finish_reasons == ["length" if first_tokens == 30 else "safety_refusal"]


def test_recoveries_are_counted_over_the_whole_answer(tokenizer):
    # 23 is flagged after the first recovery, and there is no second one
    output = answer(tokenizer, {15: 0.9, 23: 0.9}, script=count_after({THINK: 20}), max_recoveries=1)
    assert [event.outcome for event in output.events[0]] == ["recovered", "refused"]
    assert tokens_of(output) == [11, 12, 13, 20, 21, 22, BLANK_LINE, *REFUSAL_IDS]


def test_a_second_flag_can_take_back_a_recovered_segment_and_its_reflection(tokenizer):
    arguments = {"script": count_after({THINK: 20}), "rollback_segments": 1, "max_recoveries": 2}
    output = answer(tokenizer, {15: 0.9, 23: 0.9}, **arguments)
    assert [event.outcome for event in output.events[0]] == ["recovered", "recovered", "refused"]
    assert [event.rolled_back_to for event in output.events[0]] == [0, 0, 0]
    assert max(context.count(PAUSE) for context in output.model.contexts) == 1
    assert tokens_of(output) == REFUSAL_IDS


def test_final_tokens_are_never_taken_back(tokenizer):
    output = answer(tokenizer, {21: 0.9}, rollback_segments=1, max_new_tokens=15, max_recoveries=0)
    assert output.events[0][0].rolled_back_to == 6  # 21 is in the fourth segment of three


def test_risk_of_a_rejected_draft_is_nobodys(tokenizer):
    output = answer(tokenizer, {30: 0.9}, draft=count_after({12: 30}), num_draft_tokens=4)
    assert output.events == [[]]
    assert tokens_of(output) == list(range(11, 20))


@pytest.mark.parametrize("end", [{"eos_token_id": 14}, {"max_new_tokens": 4}])
def test_risk_after_the_end_of_an_answer_does_not_count(tokenizer, end):
    output = answer(tokenizer, {15: 0.9, 16: 0.9}, draft=count_up, num_draft_tokens=8, **end)
    assert output.events == [[]]
    assert tokens_of(output) == [11, 12, 13, 14]


def test_an_answer_whose_end_token_is_flagged_does_not_end_there(tokenizer):
    output = answer(tokenizer, {14: 0.9}, draft=count_up, eos_token_id=14, candidate_source="target")
    assert output.events[0][0].outcome == "recovered"
    assert tokens_of(output)[:3] == [11, 12, 13]
    assert 14 not in tokens_of(output)


def test_an_end_token_inside_a_candidate_ends_the_answer(tokenizer):
    output = answer(tokenizer, {15: 0.9}, script=count_after({THINK: 20}), eos_token_id=23)
    assert tokens_of(output) == [11, 12, 13, 20, 21, 22, 23]
    assert output.finish_reasons == ["eos"]


def test_a_candidate_never_exceeds_max_length(tokenizer):
    output = answer(tokenizer, {15: 0.9}, max_new_tokens=5)
    assert len(tokens_of(output)) == 5
    assert output.finish_reasons == ["length"]


@pytest.mark.parametrize("keep_reflection", [False, True])
def test_context_that_a_reflection_takes_up_is_not_used_again(tokenizer, keep_reflection):
    model = ScriptedModel(count_after({THINK: 20}), {15: 0.9}, max_position_embeddings=16)
    attach_safety_head(model, probe(model), tokenizer=tokenizer)
    policy = SafeSpecConfig(
        max_segment_tokens=3, reflection=REFLECTION, refusal=REFUSAL, keep_reflection=keep_reflection
    )
    output = model.generate(torch.tensor([[10]]), max_new_tokens=15, safespec=policy, return_dict_in_generate=True)
    assert output.finish_reasons == ["length"]
    assert max(map(len, model.contexts)) <= 16


def test_an_unknown_risk_counts_as_unsafe(tokenizer):
    output = answer(tokenizer, {15: math.nan})
    assert math.isnan(output.events[0][0].risk)
    assert 15 not in tokens_of(output)


def test_a_candidate_of_unknown_risk_is_not_taken(tokenizer):
    output = answer(tokenizer, {15: 0.9, 20: math.nan}, num_candidates=16)
    assert tokens_of(output)[3] == 30
    assert any(math.isnan(risk) for risk in output.events[0][0].candidate_risks)


@pytest.mark.parametrize("threshold", [None, 0.05])
def test_the_policys_threshold_overrides_the_heads(tokenizer, threshold):
    output = answer(tokenizer, risk_threshold=threshold, max_recoveries=0)
    assert len(output.events[0]) == (0 if threshold is None else 1)


def test_a_risk_that_equals_the_threshold_is_unsafe(tokenizer):
    # sigmoid(0) is exactly one half
    output = answer(tokenizer, {15: 0.5}, max_recoveries=0)
    assert output.finish_reasons == ["safety_refusal"]


@pytest.mark.parametrize("source", ["auto", "draft", "target"])
def test_candidates_come_from_where_the_policy_says(tokenizer, source):
    draft = count_after({THINK: 30})
    output = answer(tokenizer, {15: 0.9}, script=count_after({THINK: 20}), draft=draft, candidate_source=source)
    assert tokens_of(output)[3] == (20 if source == "target" else 30)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_seed_fixes_the_candidates(tokenizer, seed):
    script = count_after({THINK: dict.fromkeys(range(20, 40), 0.05)})
    outputs = [answer(tokenizer, {15: 0.9}, script=script, seed=seed) for _ in range(2)]
    other = answer(tokenizer, {15: 0.9}, script=script, seed=seed + 10)
    assert tokens_of(outputs[0]) == tokens_of(outputs[1])
    assert outputs[0].events == outputs[1].events
    assert tokens_of(outputs[0]) != tokens_of(other)


def test_a_greedy_call_is_reproducible_without_a_seed(tokenizer):
    script = count_after({THINK: dict.fromkeys(range(20, 40), 0.05)})
    first = tokens_of(answer(tokenizer, {15: 0.9}, script=script))
    torch.manual_seed(1234)
    assert tokens_of(answer(tokenizer, {15: 0.9}, script=script)) == first


@pytest.mark.parametrize(("scope", "num_more"), [("answer", 4), ("recovery", 5)])
def test_statistics_add_up(tokenizer, scope, num_more):
    statistics = answer(tokenizer, {15: 0.9}, num_candidates=4, reflection_scope=scope).statistics
    # nine rounds without a draft, one of them in vain; sampling three tokens and scoring them takes four more;
    # without the reflection they are read once more
    assert (statistics.num_flags, statistics.num_recovery_attempts, statistics.num_discarded_tokens) == (1, 1, 3)
    assert statistics.num_target_forwards == statistics.num_rounds + num_more
    assert (statistics.num_new_tokens, statistics.num_draft_forwards) == (9, 0)
    assert math.isnan(statistics.acceptance_rate)


def test_counted_forwards_are_the_forwards_that_happened(tokenizer):
    output = answer(tokenizer, {15: 0.9, 23: 0.8})
    assert output.statistics.num_target_forwards == output.model.num_forwards


class BanAll(LogitsProcessor):
    """Leaves one token, and at the place of the recovery the one that was flagged."""

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, (input_ids[0, -1:] + 1) % scores.shape[1], 0.0)


def test_banning_the_last_possible_token_ends_in_a_refusal(tokenizer):
    arguments = {"flagged_token_penalty": math.inf, "logits_processor": LogitsProcessorList([BanAll()])}
    output = answer(tokenizer, {14: 0.9}, **arguments)
    assert output.finish_reasons == ["safety_refusal"]
    assert tokens_of(output) == [11, 12, 13, BLANK_LINE, *REFUSAL_IDS]


class Spoil(LogitsProcessor):
    """After a recovery's first token no other one is possible."""

    def __init__(self, value, tokens=(20,)):
        self.value, self.tokens = value, torch.tensor(tokens)

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, self.value) if torch.isin(input_ids[0, -1], self.tokens) else scores


@pytest.mark.parametrize("draft", [None, count_after(TURNS)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_an_attempt_in_which_no_token_is_possible_has_failed_and_the_others_count(tokenizer, draft, value):
    processors = LogitsProcessorList([Spoil(value, (13, 20, 30))])
    arguments = {"logits_processor": processors, "num_candidates": 3, "max_recoveries": 2}
    output = answer(tokenizer, {14: 0.9, 0: 0.9}, draft=draft, **arguments)
    assert [event.outcome for event in output.events[0]] == ["retried", "retried", "refused"]
    assert all(math.isnan(risk) for event in output.events[0][:2] for risk in event.candidate_risks)
    assert tokens_of(output) == [11, 12, 13, BLANK_LINE, *REFUSAL_IDS]


@pytest.mark.parametrize("draft", [None, count_after(TURNS)])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_failed_candidate_does_not_stand_in_the_way_of_others(tokenizer, draft, value):
    class SpoilSome(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.where(input_ids[:, -1:] == 20, value, scores)

    output = answer(
        tokenizer, {15: 0.9}, draft=draft, num_candidates=16, logits_processor=LogitsProcessorList([SpoilSome()])
    )
    assert tokens_of(output)[:6] == [11, 12, 13, 30, 31, 32]
    assert any(math.isnan(risk) for risk in output.events[0][0].candidate_risks)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_greedy_decoding_without_a_possible_token_says_what_plain_generate_says(target, never, tokenizer, value):
    arguments = {
        "max_new_tokens": 4,
        "do_sample": False,
        "logits_processor": LogitsProcessorList([Spoil(value, range(40))]),
    }
    expected = target.generate(torch.tensor([[11, 12]]), **arguments)
    attach_safety_head(target, never, tokenizer=tokenizer)
    assert target.generate(torch.tensor([[11, 12]]), **arguments, safespec=True).tolist() == expected.tolist()
