"""Segments that the draft draws again because its own head flags them, before the target reads any."""

import dataclasses
import math

import pytest
import torch
from scripted import ScriptedModel, count_after, count_up, probe, tokens_of
from test_segment_mode import GOOD, PROMPT, graded, outcomes
from tiny import CONFIGS, POLICY, build_head, build_model, build_noisy_head, build_tokenizer, perturb

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding.redraws import Redraws
from safespec_hf.decoding.segment_mode import SegmentDecoder

FIELDS = {"verification": "segment", "quality_prompt": PROMPT, "max_segment_tokens": 3, "rollback_segments": 0}
FIELDS |= {"adaptive_drafts": False, "false_alarm_margin": None, "reflection": "pause think", "refusal": "no thanks"}
# After 13 the draft most likely goes off to 20, 21, 22; but it may as well say 14, 15, 16.
ASTRAY = count_after({13: {20: 0.6, 14: 0.4}})
WORSE = {20: 0.9}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(has_digits=True)


def answer(tokenizer, num=8, *, draft=ASTRAY, draft_risks=None, risks=None, grade=lambda text: GOOD, **arguments):
    """One scripted answer in segment mode, with a head on the draft."""
    fields = {name: arguments.pop(name) for name in SafeSpecConfig.__slots__ if name in arguments}
    policy = SafeSpecConfig(**{**FIELDS, "num_draft_segments": num, **fields})
    target, writer = ScriptedModel(graded(grade), risks), ScriptedModel(draft, draft_risks)
    attach_safety_head(target, probe(target), tokenizer=tokenizer, draft=writer, draft_head=probe(writer))
    prompt = arguments.pop("prompt", [[10]])
    arguments = {"max_new_tokens": 9, "do_sample": False, **arguments}
    if "stop_strings" in arguments:
        arguments["tokenizer"] = tokenizer
    output = target.generate(torch.tensor(prompt), safespec=policy, return_dict_in_generate=True, **arguments)
    output.target, output.draft = target, writer
    return output


def test_a_silent_head_of_a_draft_changes_nothing_but_a_forward_of_the_draft_for_each_segment(tokenizer):
    plain, screened = answer(tokenizer, 1), answer(tokenizer)
    assert tokens_of(screened) == tokens_of(plain) == [11, 12, 13, *range(20, 26)]
    assert screened.statistics.num_target_forwards == plain.statistics.num_target_forwards
    assert screened.segments == plain.segments
    assert screened.statistics.num_screened_segments == 0
    assert screened.statistics.num_draft_forwards == plain.statistics.num_draft_forwards + 3
    assert screened.statistics.num_draft_tokens == plain.statistics.num_draft_tokens


def test_a_flagged_segment_is_drawn_again_and_costs_the_target_nothing(tokenizer):
    plain = answer(tokenizer, 1, risks=WORSE, draft_risks=WORSE)
    screened = answer(tokenizer, risks=WORSE, draft_risks=WORSE)
    assert len(plain.events[0]) > 0
    assert "flagged" in outcomes(plain)
    assert screened.events == [[]]
    assert tokens_of(screened) == list(range(11, 20))
    assert outcomes(screened) == ["accepted"] * 3
    assert not any(20 in context for context in screened.target.contexts)
    assert screened.statistics.num_target_forwards == 3 < plain.statistics.num_target_forwards
    counts = screened.statistics
    assert (counts.num_segments, counts.num_screened_segments, counts.num_draft_tokens) == (3, 1, 9)
    assert counts.acceptance_rate == 1


def test_the_draft_goes_on_from_what_was_proposed(tokenizer):
    output = answer(tokenizer, draft_risks=WORSE)
    whole = output.sequences[0].tolist()
    later = [context for context in output.draft.contexts if len(context) > 1 + 6]
    assert later
    assert all(context == whole[: len(context)] for context in later)


def test_where_all_draws_are_flagged_the_target_gets_the_safest_and_decides(tokenizer):
    output = answer(tokenizer, draft_risks={20: 0.9, 14: 0.8})
    assert tokens_of(output) == list(range(11, 20))
    assert output.statistics.num_screened_segments == 1
    flagged = answer(tokenizer, draft_risks={20: 0.9, 14: 0.8}, risks={14: 0.7, 20: 0.7}, policy="refuse")
    assert outcomes(flagged) == ["accepted", "flagged"]
    assert tokens_of(flagged)[:3] == [11, 12, 13]
    assert not {14, 20} & set(tokens_of(flagged))


def test_what_the_draft_s_head_takes_for_safe_is_flagged_by_the_target_s_all_the_same(tokenizer):
    output = answer(tokenizer, draft_risks=WORSE, risks={14: 0.9}, policy="stop")
    assert outcomes(output) == ["accepted", "flagged"]
    assert tokens_of(output) == [11, 12, 13]


def test_a_risk_that_is_no_number_counts_as_the_highest(tokenizer):
    output = answer(tokenizer, draft_risks={20: math.nan, 14: 0.8})
    assert tokens_of(output) == list(range(11, 20))


@pytest.mark.parametrize(("limit", "num_screened"), [(None, 0), (0.1, 1), (0.2, 0)])
def test_a_draft_that_is_not_sure_draws_again_though_nothing_is_flagged(tokenizer, limit, num_screened):
    # of the second segment: 1 - (0.6 + 1 + 1) / 3 = 0.13
    output = answer(tokenizer, draft_uncertainty=limit, draft_risks={20: 0.3})
    assert output.statistics.num_screened_segments == num_screened
    assert tokens_of(output)[3] == (14 if num_screened else 20)


def test_of_equal_draws_the_first_stays(tokenizer):
    output = answer(tokenizer, draft_uncertainty=0.1)
    assert output.statistics.num_screened_segments == 1
    assert tokens_of(output)[3] == 20


def test_a_segment_that_the_target_has_to_write_is_not_screened(tokenizer):
    output = answer(tokenizer, draft_risks={11: 0.9, 20: 0.9}, num_target_segments=3)
    assert output.statistics.num_screened_segments == output.statistics.num_segments == 0


def test_what_comes_after_the_end_of_an_answer_is_no_reason(tokenizer):
    output = answer(tokenizer, draft_risks=WORSE, stop_strings=["w13"], max_segment_tokens=9)
    assert tokens_of(output) == [11, 12, 13]
    assert output.statistics.num_screened_segments == 0


def test_draws_end_where_segments_do(tokenizer):
    script = count_after({10: {20: 0.6, 11: 0.4}, 12: 7, 7: 14})
    fields = {"min_segment_tokens": 2, "max_segment_tokens": 5}
    output = answer(tokenizer, draft=script, draft_risks=WORSE, **fields, max_new_tokens=8)
    assert tokens_of(output) == [11, 12, 7, 14, 15, 16, 17, 18]
    assert [one.num_tokens for one in output.segments[0]] == [3, 5]
    assert output.statistics.num_screened_segments == 1


def test_a_greedy_call_is_reproducible_and_a_row_is_as_it_is_alone(tokenizer):
    arguments = {"draft": count_after({13: {20: 0.5, 25: 0.3, 14: 0.2}}), "draft_risks": {20: 0.9, 25: 0.2}}
    first, second = answer(tokenizer, 2, **arguments), answer(tokenizer, 2, **arguments)
    both = answer(tokenizer, 2, **arguments, prompt=[[10], [13]], pad_token_id=0)
    assert first.statistics.num_screened_segments > 0
    assert tokens_of(first) == tokens_of(second) == tokens_of(both)
    assert tokens_of(both, 1) == tokens_of(answer(tokenizer, 2, **arguments, prompt=[[13]]))


@pytest.mark.parametrize(("kind", "do_sample"), [*((kind, False) for kind in CONFIGS), ("llama", True)])
def test_risks_are_those_of_the_draft_s_states_read_afresh_and_nothing_flagged_is_returned(
    tokenizer, kind, do_sample, monkeypatch
):
    target = build_model(kind)
    draft, head, seen = perturb(target, 0.03), build_noisy_head(target, 0.8), []
    draft_head = build_noisy_head(draft, 0.6, pooling="mean+last")

    def look(self, index, row, segment, max_tokens):
        risks = Redraws._look(self, index, row, segment, max_tokens)
        seen.append((row.context(0), segment, risks))
        return risks

    def draw(self, index, row, *args):
        segments, risks = Redraws._draw(self, index, row, *args)
        seen.extend((row.context(0), *pair) for pair in zip(segments, risks, strict=True))
        return segments, risks

    spied = type("Spied", (Redraws,), {"_look": look, "_draw": draw})
    monkeypatch.setattr("safespec_hf.decoding.segment_mode.Redraws", spied)
    attach_safety_head(target, head, tokenizer=tokenizer, draft=draft, draft_head=draft_head)
    policy = dataclasses.replace(
        POLICY, verification="segment", quality_prompt="pause w12 w13", quality_threshold=4, num_draft_segments=4
    )
    ids = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
    output = target.generate(
        ids,
        attention_mask=(ids != 0).long(),
        safespec=policy,
        return_dict_in_generate=True,
        max_new_tokens=30,
        do_sample=do_sample,
        pad_token_id=0,
    )
    assert output.statistics.num_screened_segments > 0
    assert not (output.risks >= head.config.risk_threshold).any()
    (layer,) = draft_head.config.hidden_layers
    for context, segment, risks in seen:
        if risks is not None:
            ids = torch.tensor([context + segment])
            hidden_TF = draft(ids, output_hidden_states=True).hidden_states[layer][0, -len(segment) :]
            means_TF = hidden_TF.cumsum(0) / torch.arange(1, len(segment) + 1)[:, None]
            # float32, and the draft reads a context in blocks that differ from this one
            expected = draft_head.risk(torch.cat([means_TF, hidden_TF], dim=-1)).tolist()
            assert risks == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_positions", [7, 12, 19])
def test_a_draft_without_room_for_it_is_not_screened(tokenizer, num_positions):
    target = build_model("gpt2")
    draft = build_model("gpt2", seed=1, n_positions=num_positions)
    head = build_head(draft)
    head.config.risk_threshold = 1e-9
    attach_safety_head(target, build_head(target), tokenizer=tokenizer, draft=draft, draft_head=head)
    policy = SafeSpecConfig(**{**FIELDS, "quality_threshold": 0, "num_draft_segments": 3})
    arguments = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True}
    output = target.generate(torch.tensor([[12, 18, 24, 13]]), safespec=policy, **arguments)
    assert output.sequences.shape[1] == 20
    assert output.statistics.num_screened_segments < output.statistics.num_segments


@pytest.mark.parametrize("missing", ["draft_head", "other"])
def test_draws_without_a_head_to_choose_by_are_refused_before_the_first_forward(tokenizer, missing):
    target, draft = ScriptedModel(graded()), ScriptedModel(count_up)
    draft_head = None if missing == "draft_head" else probe(draft)
    attach_safety_head(target, probe(target), tokenizer=tokenizer, draft=draft, draft_head=draft_head)
    target.num_forwards = 0
    assistant = ScriptedModel(count_up) if missing == "other" else None
    policy = SafeSpecConfig(**FIELDS, num_draft_segments=3)
    with pytest.raises(UnsupportedRequestError, match="`num_draft_segments=3` needs a safety head of the draft"):
        target.generate(torch.tensor([[10]]), safespec=policy, assistant_model=assistant, max_new_tokens=4)
    assert target.num_forwards == 0


def test_the_rest_of_a_segment_that_has_begun_is_not_screened(tokenizer, monkeypatch):
    num_drafts = SegmentDecoder._num_drafts
    monkeypatch.setattr(SegmentDecoder, "_num_drafts", lambda *args: min(num_drafts(*args), 2))
    output = answer(tokenizer, draft=count_up, draft_risks={13: 0.9, 15: 0.9})
    assert [one.num_tokens for one in output.segments[0]] == [2, 1, 2, 1, 2, 1]
    assert output.statistics.num_screened_segments == 1
