"""Segment mode on tiny random models: one forward says what separate ones say, in batches and under flags."""

import random
from dataclasses import replace

import pytest
import torch
from architectures import build_architecture
from segments import recorded_segments, separate_grades, separate_risks
from tiny import (
    CONFIGS,
    POLICY,
    Recorder,
    attach,
    build_coin_head,
    build_head,
    build_model,
    build_noisy_head,
    build_tokenizer,
    perturb,
)
from transformers import StoppingCriteria, StoppingCriteriaList

from safespec_hf import Provenance, SafeSpecConfig
from safespec_hf.decoding.call import GuardedCall
from safespec_hf.decoding.loop import Decoder
from safespec_hf.decoding.segment_mode import SegmentDecoder
from safespec_hf.engine.cache import CACHE_NAME

ASK = "pause w12 w13"
SEGMENTS = replace(POLICY, verification="segment", quality_prompt=ASK, quality_threshold=4)
PROMPTS = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
ROUNDING = 1e-4  # float32 logits and risks of blocks of different widths


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(has_digits=True)


def ask(model, draft, policy=SEGMENTS, ids=PROMPTS, **arguments):
    arguments = {"max_new_tokens": 40, "do_sample": False, **arguments}
    mask = (ids != 0).long()
    return model.generate(
        ids, attention_mask=mask, assistant_model=draft, safespec=policy, return_dict_in_generate=True, **arguments
    )


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("reading", ["argmax", "expected"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_risks_and_grades_are_those_of_separate_passes(tokenizer, kind, reading, pooling):
    model = build_model(kind)
    head = build_noisy_head(model, 0.8, pooling=pooling)
    draft = perturb(model, 0.03)
    attach(model, tokenizer, head)
    with recorded_segments() as judged:
        policy = replace(SEGMENTS, quality_reading=reading, max_recoveries=20, false_alarm_margin=None)
        ask(model, draft, policy)
    assert {segment.outcome for segment in judged} == {"accepted", "rewritten", "flagged"}
    for segment in judged:
        assert segment.risks == pytest.approx(separate_risks(model, head, segment), abs=ROUNDING)
        grades = separate_grades(model, tokenizer, segment, ASK)
        assert segment.quality == pytest.approx(grades[reading], abs=ROUNDING)
        is_safe, is_good = max(segment.risks) < head.config.risk_threshold, segment.quality >= 4
        assert segment.outcome == ("flagged" if not is_safe else "accepted" if is_good else "rewritten")


def count_turns(monkeypatch):
    """Of each round how many rows are judged, wait, and are being written; filled as it goes."""
    judge, turns = SegmentDecoder._judge, list[tuple[int, int, int]]()

    def noted(decoder, of_rows):
        num_judged, num_waiting = (sum(getattr(turn, name) for turn in of_rows) for name in ("is_judged", "waits"))
        turns.append((num_judged, num_waiting, len(of_rows) - num_judged - num_waiting))
        return judge(decoder, of_rows)

    monkeypatch.setattr(SegmentDecoder, "_judge", noted)
    return turns


@pytest.mark.parametrize("kind", CONFIGS)
def test_few_rows_wait_to_be_judged_while_most_are_being_written(tokenizer, kind, monkeypatch):
    """A forward is as wide as its widest row: one with the quality prompt should be so for many rows."""
    model, turns = build_model(kind), count_turns(monkeypatch)
    attach(model, tokenizer, build_noisy_head(model, 0.8))
    draft = perturb(model, 0.03)
    batch = ask(model, draft, replace(SEGMENTS, quality_threshold=9), ids=PROMPTS.repeat(2, 1), max_new_tokens=60)
    assert any(num_waiting for _, num_waiting, _ in turns)
    for num_judged, num_waiting, num_writing in turns:
        assert num_judged == 0 or num_waiting == 0
        assert num_waiting == 0 or num_waiting < num_writing
        assert num_judged == 0 or num_judged >= num_writing
    assert batch.statistics.num_rounds == len(turns)


@pytest.mark.parametrize("name", ["bamba", "lfm2", "bloom"])
def test_what_waits_loses_nothing_where_states_have_no_columns(tokenizer, name, monkeypatch):
    """Recurrent layers, convolutions, and rows that are read one by one: a last token is read again and again."""
    model, turns = build_architecture(name), count_turns(monkeypatch)
    draft, ids = perturb(model, 0.03), PROMPTS.repeat(2, 1)
    attach(model, tokenizer, build_noisy_head(model, 0.8))
    batch = ask(model, draft, ids=ids, max_new_tokens=30)
    assert any(batch.events)
    assert any(num_waiting for _, num_waiting, _ in turns)
    for row, prompt in enumerate(PROMPTS):
        single = ask(model, draft, ids=prompt[prompt != 0][None], max_new_tokens=30)
        answer = single.sequences[0, int((prompt != 0).sum()) :].tolist()
        assert batch.sequences[row, 4 : 4 + len(answer)].tolist() == answer


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_in_a_batch_is_what_it_is_alone(tokenizer, kind, forced):
    model = build_model(kind)
    draft = perturb(model, 0.03)
    attach(model, tokenizer, build_noisy_head(model, 0.9) if forced else None)
    arguments = {"max_new_tokens": 30, "eos_token_id": None if forced else 33}
    batch = ask(model, draft, **arguments)
    assert any(batch.events) is forced
    for row, ids in enumerate(PROMPTS):
        single = ask(model, draft, ids=ids[ids != 0][None], **arguments)
        answer = single.sequences[0, int((ids != 0).sum()) :].tolist()
        assert batch.sequences[row, 4 : 4 + len(answer)].tolist() == answer
        assert batch.provenance[row, : len(answer)].tolist() == single.provenance[0].tolist()
        assert batch.finish_reasons[row] == single.finish_reasons[0]
        assert outcomes(batch, row) == outcomes(single, 0)


def outcomes(output, row):
    return [(one.position, one.num_tokens, one.quality, one.outcome) for one in output.segments[row]]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_where_no_grade_is_good_enough_the_text_is_the_targets(tokenizer, kind, settings):
    model = build_model(kind)
    expected = model.generate(PROMPTS, attention_mask=(PROMPTS != 0).long(), max_new_tokens=30, **settings)
    policy = replace(SEGMENTS, quality_reading="expected", quality_threshold=9)
    output = ask(attach(model, tokenizer), perturb(model, 0.03), policy, max_new_tokens=30, **settings)
    assert output.sequences.tolist() == expected.tolist()
    assert output.statistics.num_segments_accepted == 0


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}])
def test_where_every_grade_is_good_enough_the_text_is_the_drafts(target, tokenizer, settings):
    draft = build_model(seed=3)
    expected = draft.generate(PROMPTS, attention_mask=(PROMPTS != 0).long(), max_new_tokens=30, **settings)
    output = ask(
        attach(target, tokenizer), draft, replace(SEGMENTS, quality_threshold=0), max_new_tokens=30, **settings
    )
    assert output.sequences.tolist() == expected.tolist()
    assert set(output.provenance.flatten().tolist()) == {Provenance.DRAFTED}
    assert output.statistics.num_target_forwards == max(map(len, output.segments))


def test_forwards_are_one_for_each_segment_and_those_in_which_the_target_wrote(target, tokenizer, monkeypatch):
    rounds, judge = [], SegmentDecoder._judge

    def record(decoder, turns):
        rounds.append([turn.is_judged for turn in turns])
        return judge(decoder, turns)

    monkeypatch.setattr(SegmentDecoder, "_judge", record)
    output = ask(attach(target, tokenizer), perturb(target, 0.03), ids=PROMPTS[2:])
    statistics = output.statistics
    assert sum(is_judged for (is_judged,) in rounds) == statistics.num_segments
    num_written = sum(not is_judged for (is_judged,) in rounds)
    assert statistics.num_target_forwards == statistics.num_segments + num_written
    assert (
        0
        < num_written
        <= sum(origin != Provenance.DRAFTED for origin in output.provenance[0].tolist())
        + 2 * (statistics.num_segments_by_target)
    )
    assert 0 < statistics.num_segments_accepted < statistics.num_segments


@pytest.mark.parametrize("num_rows", [1, 3])
def test_safety_adds_no_forward(target, tokenizer, num_rows):
    draft, counts = perturb(target, 0.03), []
    attach(target, tokenizer)
    for is_monitored in (True, False):
        call = GuardedCall(replace(SEGMENTS, score_last_token=False), draft, is_monitored=is_monitored)
        ids = PROMPTS[-num_rows:]
        output = target.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=40,
            do_sample=False,
            custom_generate=call,
            return_dict_in_generate=True,
        )
        counts.append((output.statistics.num_target_forwards, output.sequences.tolist()))
    assert counts[0] == counts[1]


def test_a_call_can_go_on_with_the_cache_of_another(target, tokenizer):
    draft = perturb(target, 0.03)
    attach(target, tokenizer, build_noisy_head(target, 0.9))
    first = ask(target, draft, replace(SEGMENTS, reflection="", max_recoveries=20), ids=PROMPTS[2:])
    cache = first[CACHE_NAME]
    length = cache.get_seq_length()
    assert length == first.sequences.shape[1] - 1
    with torch.no_grad():
        fresh = target(first.sequences).logits[0, -1]
        kept = target(first.sequences[:, length:], **{CACHE_NAME: cache}).logits[0, -1]
    assert torch.allclose(fresh, kept, atol=ROUNDING)


@pytest.mark.parametrize("kind", CONFIGS)
def test_after_every_round_the_caches_hold_what_reading_the_text_afresh_would_give(tokenizer, monkeypatch, kind):
    model, seen, end_of_round = build_model(kind), [], Decoder._drop_finished
    draft = perturb(model, 0.03)

    @torch.no_grad()
    def compare(decoder):
        for index, row in enumerate(decoder.live if decoder.statistics.num_rounds % 3 == 0 else []):
            for cached in (decoder.target, decoder.drafter.model.cached):
                fork = cached.fork(index, 1)
                kept = fork.forward([row.context(fork.lengths[0])], 1).logits_BTV[0, -1]
                fresh = cached.model(torch.tensor([row.context(0)])).logits[0, -1]
                assert torch.allclose(kept, fresh, atol=ROUNDING)
                seen.append(decoder.statistics.num_flags)
        end_of_round(decoder)

    monkeypatch.setattr(Decoder, "_drop_finished", compare)
    attach(model, tokenizer, build_coin_head(model, 0.03, seed=1))
    ask(model, draft, replace(SEGMENTS, max_recoveries=20))
    assert len(seen) > 10
    assert max(seen) > 0


class Count(StoppingCriteria):
    """Ends a row at a token, and counts its calls."""

    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == 31


def random_policy(choose):
    return SafeSpecConfig(
        verification="segment",
        quality_prompt=ASK,
        quality_threshold=choose.choice([0, 3, 4.5, 9]),
        quality_reading=choose.choice(["argmax", "expected"]),
        num_target_segments=choose.choice([0, 0, 1, 3]),
        num_draft_tokens=choose.randint(1, 4),
        max_segment_tokens=choose.randint(1, 6),
        min_segment_tokens=choose.randint(1, 3),
        rollback_segments=choose.randint(0, 2),
        num_candidates=choose.randint(1, 3),
        max_recoveries=choose.randint(0, 4),
        **choose.choice([{}, {"keep_reflection": True}, {"reflection_scope": "recovery"}]),
        score_last_token=choose.choice([None, True, False]),
        candidate_source=choose.choice(["auto", "target"]),
        reflection=choose.choice(["pause think", ""]),
        refusal="no thanks",
    )


@pytest.mark.parametrize("part", range(8))
def test_under_random_flags_nothing_flagged_is_returned_or_streamed(tokenizer, part):
    model = build_model(hidden_size=16, num_hidden_layers=1)
    draft, num_flags = perturb(model, 0.05), 0
    for seed in range(part * 25, part * 25 + 25):
        choose = random.Random(seed)
        attach(model, tokenizer, build_coin_head(model, choose.choice([0.02, 0.1, 0.3]), seed))
        torch.manual_seed(seed)
        num_rows, recorder = choose.choice([1, 1, 3]), Recorder()
        arguments = {"streamer": recorder} if num_rows == 1 else {}
        if choose.random() < 0.3:
            arguments["stopping_criteria"] = StoppingCriteriaList([Count()])
        output = ask(
            model,
            draft,
            random_policy(choose),
            ids=PROMPTS[-num_rows:],
            max_new_tokens=choose.randint(1, 24),
            do_sample=choose.random() < 0.5,
            eos_token_id=choose.sample(range(20, 40), 2),
            **arguments,
        )
        assert bool(((output.risks < 0.5) | output.risks.isnan()).all()), seed
        if num_rows == 1:
            assert recorder.tokens == output.sequences[0].tolist(), seed
            assert recorder.num_ends == 1
        known = (Provenance.DRAFTED, Provenance.RECOVERED)
        is_known = sum(output.provenance == origin for origin in known).bool()
        assert not bool(output.risks[is_known].isnan().any()), seed
        statistics = output.statistics
        records = [one.outcome for row in output.segments for one in row]
        assert statistics.num_segments == len(records)
        assert statistics.num_segments_accepted == records.count("accepted")
        assert statistics.num_accepted_tokens <= statistics.num_draft_tokens
        num_flags += statistics.num_flags
    assert num_flags > 10  # or else this would have shown nothing


def test_samples_of_an_always_good_draft_are_the_drafts(tokenizer):
    target, draft = build_model(vocab_size=40), build_model(seed=3)
    attach(target, tokenizer)
    prompt, num = torch.tensor([[11, 17]]).expand(1200, -1), 1200
    policy = replace(SEGMENTS, quality_threshold=0, max_segment_tokens=2)
    output = ask(target, draft, policy, prompt, max_new_tokens=1, do_sample=True, top_k=0)
    counts = torch.bincount(output.sequences[:, 2], minlength=40).double()
    expected = draft(prompt[:1]).logits[0, -1].double().softmax(-1) * num
    assert is_fit(counts, expected)


def test_samples_of_a_target_that_writes_all_itself_are_the_targets(tokenizer):
    target = build_model()
    draft, num = perturb(target, 0.1), 1200
    attach(target, tokenizer)
    prompt = torch.tensor([[11, 17]]).expand(num, -1)
    policy = replace(SEGMENTS, quality_threshold=9, quality_reading="expected", max_segment_tokens=2)
    output = ask(target, draft, policy, prompt, max_new_tokens=2, do_sample=True, top_k=0)
    first = torch.bincount(output.sequences[:, 2], minlength=40).double()
    probs = target(prompt[:1]).logits[0, -1].double().softmax(-1)
    assert is_fit(first, probs * num)
    likeliest = int(probs.argmax())
    after = output.sequences[output.sequences[:, 2] == likeliest, 3]
    second = target(torch.tensor([[11, 17, likeliest]])).logits[0, -1].double().softmax(-1)
    assert is_fit(torch.bincount(after, minlength=40).double(), second * len(after))


def is_fit(counts, expected):
    """Chi-square, with what is expected fewer than five times as one class: p > .001, on a fixed seed."""
    scipy_stats = pytest.importorskip("scipy.stats")
    is_rare = expected < 5
    counts, expected = (torch.cat([part[~is_rare], part[is_rare].sum()[None]]) for part in (counts, expected))
    return (
        scipy_stats.chisquare(counts.numpy(), (expected * counts.sum() / expected.sum()).detach().numpy()).pvalue
        > 1e-3
    )


def test_a_silent_head_never_changes_what_is_accepted(target, tokenizer):
    draft = perturb(target, 0.03)
    attach(target, tokenizer, build_head(target))
    once, again = (ask(target, draft) for _ in range(2))
    assert once.sequences.tolist() == again.sequences.tolist()
    assert once.segments == again.segments
