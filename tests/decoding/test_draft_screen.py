"""Candidates that a head of the draft sorts out before the target reads them."""

import dataclasses
import math

import pytest
import tiny
import torch
from tiny import POLICY, PROMPT, build_draft_head, build_head, build_noisy_head, perturb

from safespec_hf import (
    HeadMismatchError,
    UnsupportedRequestError,
    attach_safety_head,
    load_truncated_draft,
)
from safespec_hf.decoding import safety_mode
from safespec_hf.decoding.draft_screen import DraftScreen, choose_promising

MANY = dataclasses.replace(POLICY, num_candidates=8, recovery_temperature=2.0, false_alarm_margin=None)
PROMPTS = torch.tensor([[12, 18, 24, 13], [20, 21, 30, 11], [33, 14, 15, 35]])


def answer(target, tokenizer, head, draft, draft_head, policy=MANY, prompts=PROMPT, **kwargs):
    attach_safety_head(target, head, tokenizer=tokenizer, draft=draft, draft_head=draft_head)
    arguments = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    return target.generate(input_ids=prompts, safespec=policy, **arguments)


def test_what_the_draft_s_head_finds_safe_is_verified_and_else_the_safest():
    assert choose_promising([0.1, 0.5, 0.49], 0.5) == [0, 2]
    assert choose_promising([0.9, math.nan, 0.7], 0.5) == [2]
    assert choose_promising([math.nan, math.nan], 0.5) == [0]


def test_a_draft_head_that_finds_everything_safe_changes_nothing(target, tokenizer, noisy, draft):
    plain = answer(target, tokenizer, noisy, draft, None, prompts=PROMPTS)
    screened = answer(target, tokenizer, noisy, draft, build_head(draft), prompts=PROMPTS)
    assert plain.statistics.num_recovery_attempts > 0
    assert torch.equal(screened.sequences, plain.sequences)
    assert screened.events == plain.events
    assert screened.statistics.num_screened_candidates == 0


@pytest.mark.parametrize("quantile", [0.0, 0.4, 0.7])
def test_the_target_reads_what_is_left_and_has_the_last_word(target, tokenizer, noisy, draft, quantile):
    head = build_noisy_head(draft, quantile)
    if quantile == 0.0:
        head.config.risk_threshold = 1e-9  # to it all are unsafe
    output = answer(target, tokenizer, noisy, draft, head, prompts=PROMPTS)
    counts = output.statistics
    assert counts.num_screened_candidates > 0
    read = sum(len(event.candidate_risks) for row in output.events for event in row)
    assert read == counts.num_candidates - counts.num_screened_candidates
    if quantile == 0.0:
        assert read == counts.num_candidate_batches
    threshold = noisy.config.risk_threshold
    assert not (output.risks >= threshold).any()
    for event in (event for row in output.events for event in row if event.outcome == "recovered"):
        assert event.candidate_risks[event.chosen] < threshold


def test_greedy_output_is_the_target_s_own_where_nothing_is_flagged(target, tokenizer, never, draft):
    plain = target.generate(input_ids=PROMPT, max_new_tokens=30, do_sample=False)
    screened = answer(target, tokenizer, never, draft, build_noisy_head(draft))
    assert torch.equal(screened.sequences, plain)
    assert screened.statistics.num_candidates == 0


def test_its_risks_are_those_of_the_draft_s_states_read_afresh(target, tokenizer, noisy, draft, monkeypatch):
    seen, head = [], build_noisy_head(draft, hidden_layers=[1, 2], pooling="mean+last")

    class Kept(DraftScreen):
        def promising(self, segments):
            seen.append(([*self.row.prompt, *self.row.tokens], [list(one) for one in segments], self.risks))
            return super().promising(segments)

    monkeypatch.setattr(safety_mode, "DraftScreen", Kept)
    answer(target, tokenizer, noisy, draft, head)
    assert seen
    for context, segments, risks in seen:
        for tokens, found in zip(segments, risks, strict=True):
            ids = torch.tensor([context + tokens])
            states = draft(ids, output_hidden_states=True).hidden_states
            hidden_TF = torch.cat([states[layer][0, -len(tokens) :] for layer in (1, 2)], dim=-1)
            means_TF = hidden_TF.cumsum(0) / torch.arange(1, len(tokens) + 1)[:, None]
            expected = head.risk(torch.cat([means_TF, hidden_TF], dim=-1)).tolist()
            # float32, and the draft reads a context in blocks that differ from this one
            assert found == pytest.approx(expected, abs=1e-4)


def test_candidates_in_batches_and_a_reflection_aside_are_screened_as_well(target, tokenizer, noisy, draft):
    policy = dataclasses.replace(MANY, candidates_per_batch=3, reflection_scope="recovery")
    output = answer(target, tokenizer, noisy, draft, build_noisy_head(draft), policy)
    assert output.statistics.num_screened_candidates > 0
    assert not (output.risks >= noisy.config.risk_threshold).any()


@pytest.mark.parametrize("scope", ["answer", "recovery"])
def test_a_draft_samples_up_to_its_last_position(tokenizer, scope):
    target = tiny.build_model("gpt2")
    for num_positions in range(8, 18):
        draft = tiny.build_model("gpt2", seed=1, n_positions=num_positions)
        policy = dataclasses.replace(MANY, reflection_scope=scope)
        output = answer(
            target, tokenizer, build_noisy_head(target), draft, build_head(draft), policy, max_new_tokens=8
        )
        assert output.statistics.num_candidates > 0


def test_candidates_by_which_a_flag_is_tested_are_all_read(target, tokenizer, noisy, draft):
    head = build_noisy_head(draft)
    head.config.risk_threshold = 1e-9
    output = answer(target, tokenizer, noisy, draft, head, dataclasses.replace(MANY, false_alarm_margin=0.5))
    tested, *later = output.events[0]
    assert tested.outcome in ("confirmed", "dismissed")
    assert len(tested.candidate_risks) == 8
    assert {len(event.candidate_risks) for event in later if event.outcome in ("retried", "recovered")} <= {1}


@pytest.mark.parametrize("other", ["assistant_model", "prompt_lookup_num_tokens", "target"])
def test_where_another_one_samples_it_has_no_part(target, tokenizer, noisy, draft, other):
    policy = dataclasses.replace(MANY, candidate_source="target") if other == "target" else MANY
    arguments = {"assistant_model": perturb(target, seed=2), "prompt_lookup_num_tokens": 3}
    kwargs = {other: arguments[other]} if other in arguments else {}
    output = answer(target, tokenizer, noisy, draft, build_noisy_head(draft), policy, **kwargs)
    assert output.statistics.num_candidates > 0
    assert output.statistics.num_screened_candidates == 0


def test_what_a_draft_head_can_t_read_is_refused_by_name(target, tokenizer, noisy, draft):
    def refuse(error, said, draft, head):
        with pytest.raises(error, match=said):
            attach_safety_head(target, noisy, tokenizer=tokenizer, draft=draft, draft_head=head)

    head = build_head(draft)
    refuse(UnsupportedRequestError, "the draft is none", None, head)
    refuse(UnsupportedRequestError, "the draft is a draft head", build_draft_head(target), head)
    refuse(UnsupportedRequestError, "span='segment'", draft, build_head(draft, span="answer"))
    wide = tiny.build_model(hidden_size=64)
    refuse(HeadMismatchError, "hidden_size", draft, build_head(wide))
    refuse(HeadMismatchError, "num_layers", load_truncated_draft(target, 1), head)
