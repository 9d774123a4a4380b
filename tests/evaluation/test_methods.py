import dataclasses
import json

import pytest
import tiny
import torch
from evaluated import POLICY, WordGuard

from safespec_hf.decoding import commit, safety_mode
from safespec_hf.evaluation.engine import Engine, Reply
from safespec_hf.evaluation.methods import REMINDER_AFTER, REMINDER_BEFORE, Turn, remind, seeded
from safespec_hf.evaluation.specs import parse_method

CHATS = [[{"role": "user", "content": f"w{10 + i} think w{12 + i}"}] for i in range(4)]


def turn(engine=None, seed=3):
    return Turn(CHATS, ["w10"] * len(CHATS), seed, engine.plain(CHATS) if engine else [])


def forward_log_probs(engine, chat, tokens):
    """One token at a time, without anything of the engine's."""
    prompt = engine.encode([chat])[0]
    values = []
    for index, token in enumerate(tokens):
        logits = engine.model(torch.tensor([prompt + tokens[:index]])).logits[0, -1]
        values.append(logits.log_softmax(-1)[token].item())
    return values


def test_the_target_alone_is_generate_and_its_log_probability_that_of_its_tokens(engine):
    for chat, reply in zip(CHATS, engine.plain(CHATS), strict=True):
        ids = torch.tensor(engine.encode([chat]))
        expected = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert reply.tokens == expected[0, ids.shape[1] :].tolist()
        assert reply.log_prob == pytest.approx(sum(forward_log_probs(engine, chat, reply.tokens)) / 12, abs=1e-4)


def test_an_answer_ends_with_its_end_token_which_is_not_in_the_text(engine):
    end = engine.plain(CHATS)[0].tokens[4]
    engine.model.generation_config.eos_token_id = end
    for reply in (
        engine.plain(CHATS)[0],
        engine.guarded(CHATS, parse_method("assisted").policy, is_monitored=False)[0],
    ):
        assert reply.tokens.index(end) == len(reply.tokens) - 1
        assert reply.finish_reason == "eos"
        assert f"w{end}" not in reply.text.split()


def test_what_was_recovered_is_counted_and_as_probable_as_the_plain_target_finds_it(engine):
    replies = parse_method(f"safespec:{POLICY}").answer(engine, turn())
    recovered = [(chat, reply) for chat, reply in zip(CHATS, replies, strict=True) if reply.num_recovered]
    assert recovered
    for chat, reply in recovered:
        lowest, highest = (pick(forward_log_probs(engine, chat, reply.tokens)) for pick in (min, max))
        assert lowest - 1e-4 <= reply.recovered_log_prob <= highest + 1e-4
        assert any(event["outcome"] == "recovered" for event in reply.events)


def test_nothing_that_is_returned_was_flagged(engine):
    for reply in parse_method(f"safespec:{POLICY}").answer(engine, turn()):
        assert reply.risk_max is None or reply.risk_max < reply.risk_threshold


def test_statistics_of_a_batch_are_counted_once(engine):
    replies = parse_method(f"safespec:{POLICY}").answer(engine, turn())
    assert [reply.statistics is None for reply in replies] == [False, True, True, True]
    assert replies[0].statistics["num_new_tokens"] == sum(len(reply.tokens) for reply in replies)


def test_a_hard_refusal_samples_nothing(engine):
    replies = parse_method('refuse:{"refusal": "no thanks", "reflection": "pause think"}').answer(engine, turn())
    flagged = [reply for reply in replies if reply.events]
    assert flagged
    assert {reply.finish_reason for reply in flagged} == {"safety_refusal"}
    assert all(reply.text.endswith("no thanks") for reply in flagged)
    assert not any(event["candidate_risks"] for reply in flagged for event in reply.events)


def test_the_reminder_stands_around_the_last_question_only():
    chat = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    (reminded,) = remind([chat])
    assert reminded[:2] == chat[:2]
    assert reminded[2]["content"] == f"{REMINDER_BEFORE}\n\nuser\n\n{REMINDER_AFTER}"


def test_a_reminded_target_is_asked_otherwise(engine, monkeypatch):
    asked = []
    monkeypatch.setattr(Engine, "plain", lambda _, chats: asked.append(chats) or [])
    monkeypatch.setattr(Engine, "guarded", lambda _, chats, *__, **___: asked.append(chats) or [])
    for name in ("self_reminder", "safespec+self_reminder"):
        parse_method(name).answer(engine, turn())
    assert asked == [remind(CHATS)] * 2


def test_a_seed_of_a_policy_changes_that_of_the_prompts():
    policies = [parse_method(spec).policy for spec in ("safespec", "safespec:seed=0", "safespec:seed=1")]
    assert [seeded(policy, 5).seed for policy in policies] == [5, 5, 6]


def test_a_forced_head_fires_once_and_what_follows_goes_on(engine, never):
    engine.model.safety.head.config.risk_threshold = 1.0
    engine.max_new_tokens = 40
    fields = json.loads(POLICY) | {"false_alarm_margin": None}
    policy = parse_method(f"forced:{json.dumps(fields)}")
    head = engine.model.safety.head
    replies = policy.answer(engine, turn())
    assert [len(reply.events) for reply in replies] == [1] * len(CHATS)
    assert {reply.events[0]["outcome"] for reply in replies} == {"recovered"}
    assert engine.model.safety.head is head


def test_what_stands_in_the_place_of_a_token_that_was_flagged_in_error_counts_as_recovered(engine, never, monkeypatch):
    monkeypatch.setattr(safety_mode, "is_harmless", lambda *_: True)
    monkeypatch.setattr(commit, "is_harmless", lambda *_: True)
    engine.model.safety.head.config.risk_threshold = 1.0
    engine.max_new_tokens = 40
    fields = json.loads(POLICY) | {"false_alarm_margin": 0.0, "max_segment_tokens": 6}
    replies = parse_method(f"forced:{json.dumps(fields)}").answer(engine, turn())
    assert {(reply.events[0]["outcome"], reply.events[0]["chosen"]) for reply in replies} == {("dismissed", None)}
    for chat, reply in zip(CHATS, replies, strict=True):
        place = slice(reply.events[0]["rolled_back_to"], reply.events[0]["rolled_back_to"] + 6)
        log_probs = forward_log_probs(engine, chat, reply.tokens)[place]
        assert reply.num_recovered == len(log_probs) > 0
        assert reply.recovered_log_prob == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-4)


def reply_of(words, seconds=1.0):
    return Reply(
        text=" ".join(words), tokens=[int(word[1:]) for word in words], finish_reason="length", seconds=seconds
    )


UNDEFENDED = [reply_of([f"w{n}" for n in numbers]) for numbers in ([10, 11, 12, 13, 14, 15], [10, 20], [20] * 6, [11])]


class CountingGuard(WordGuard):
    def __init__(self, *words):
        super().__init__(*words)
        self.seen = []

    def judge(self, requests, answers):
        self.seen.append(list(answers))
        return super().judge(requests, answers)


def test_a_guard_of_finished_answers_reads_each_once_and_replaces_what_is_harmful(engine):
    guard = CountingGuard("w20")
    replies = parse_method("guard_finished", guard).answer(engine, turn()._replace(undefended=UNDEFENDED))
    assert guard.seen == [[reply.text for reply in UNDEFENDED]]
    assert [reply.finish_reason for reply in replies] == ["length", "safety_refusal", "safety_refusal", "length"]
    assert [replies[0].text, replies[3].text] == [UNDEFENDED[0].text, UNDEFENDED[3].text]
    # all of the target's time, and the guard's on top
    assert all(reply.seconds == pytest.approx(1 + reply.guard_seconds) for reply in replies)


def test_a_streaming_guard_reads_prefixes_until_it_stops_an_answer(engine):
    guard = CountingGuard("w20")
    replies = parse_method("guard_every_n:every=4", guard).answer(engine, turn()._replace(undefended=UNDEFENDED))
    first = ["w10 w11 w12 w13", "w10 w20", "w20 w20 w20 w20", "w11"]
    assert guard.seen == [first, [UNDEFENDED[0].text]]
    assert [reply.finish_reason for reply in replies] == ["length", "safety_refusal", "safety_refusal", "length"]
    # the third was stopped after 4 of its 6 tokens
    assert replies[2].seconds == pytest.approx(4 / 6 + replies[2].guard_seconds)
    assert replies[1].seconds == pytest.approx(1 + replies[1].guard_seconds)


def test_a_guard_has_the_target_answer_if_nobody_has_yet(engine):
    replies = parse_method("guard_finished", WordGuard("nothing")).answer(engine, turn())
    assert [reply.text for reply in replies] == [reply.text for reply in engine.plain(CHATS)]


def test_an_empty_answer_is_read_as_well(engine):
    empty = [dataclasses.replace(reply, text="", tokens=[]) for reply in UNDEFENDED]
    replies = parse_method("guard_every_n", WordGuard()).answer(engine, turn()._replace(undefended=empty))
    assert [reply.text for reply in replies] == [""] * 4


def test_speculation_alone_drafts_by_lookup_too(engine):
    lookup = dataclasses.replace(engine, draft=None, lookup_tokens=3)
    replies = parse_method(f"assisted:{POLICY}").answer(lookup, turn())
    assert [reply.text for reply in replies] == [reply.text for reply in engine.plain(CHATS)]
    assert max(token for reply in replies for token in reply.tokens) < tiny.VOCAB_SIZE
