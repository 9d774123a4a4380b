"""One guarded answer, driven by an engine on paper."""

import math

import pytest
import tiny
import torch
from fake_engine import END, MAX_LEN, RESERVED, FakeEngine, drive, make_guard, record

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.answer.recovery import choose
from safespec_hf.decoding import commit, safety_mode
from safespec_hf.decoding.safety_mode import SafetyMode
from safespec_hf.outputs import Provenance
from safespec_hf.vllm import request
from safespec_hf.vllm.request import GuardedRequest
from safespec_hf.vllm.spec import ARGUMENT, GuardOrder

GREEDY = {"temperature": 0.0, "max_tokens": 30}
POLICY = {"max_segment_tokens": 5, "num_candidates": 3, "max_recoveries": 4, "seed": 0}
POLICY |= {"candidate_choice": "safest", "recovery_temperature": 1.0, "false_alarm_margin": None}


def prompts(num, length=6):
    return torch.randint(10, 39, (num, length), generator=torch.Generator().manual_seed(9)).tolist()


@pytest.fixture
def head(target, tokenizer):
    """One that flags now and then, at every place of an answer."""
    head = tiny.build_head(target, pooling="mean+ewma", span="answer", hidden_layers=[1, 2])
    risks = [risk for result in answer_all(target, head, tokenizer, prompts(12)) for risk in result.risks]
    head.config.risk_threshold = float(torch.tensor(risks).nanquantile(0.9))
    return head


def answer_all(target, head, tokenizer, given, params=GREEDY, on_feed=None, engine=None, **policy):
    guard = make_guard(head, tokenizer, **POLICY | policy)
    engine = engine or FakeEngine(target, head, tokenizer)
    return drive(engine, [guard.request(f"a{i}", one, params) for i, one in enumerate(given)], on_feed)


def watch_and_read(mode, index, row, scores, segments):
    """What our own decoding finds in candidates: as they were sampled, after the reflection, and then without it."""
    aside = mode.plan.reflection_ids
    scorer, nums = mode.target.fork(index, len(segments)), [len(tokens) for tokens in segments]
    waiting = row.context(scorer.lengths[0])
    output = scorer.forward([[*waiting, *aside, *tokens] for tokens in segments], 1 + max(nums), num_drafts=nums)
    hidden = torch.zeros_like(output.hidden_BTF)  # with the reflection's cut out
    for k, num in enumerate(nums):
        end = hidden.shape[1] - num
        kept = [output.hidden_BTF[k, end - len(aside) - len(waiting) : end - len(aside)], output.hidden_BTF[k, end:]]
        hidden[k, -len(waiting) - num :] = torch.cat(kept)
    scores.read(segments, len(waiting), output._replace(hidden_BTF=hidden))
    scorer = mode.target.fork(index, len(segments))
    output = scorer.forward([[*waiting, *tokens] for tokens in segments], 1 + max(nums), num_drafts=nums)
    scores.read(segments, len(waiting), output)
    return scorer


def choose_roughly(risks, log_probs, *args):
    return choose([round(risk, 5) for risk in risks], [round(value, 3) for value in log_probs], *args)


def read_once(mode, index, row, scores, segments):
    """The same where the reflection stays: candidates are read where they were sampled."""
    scorer, nums = mode.target.fork(index, len(segments)), [len(tokens) for tokens in segments]
    waiting = row.context(scorer.lengths[0])
    output = scorer.forward([[*waiting, *tokens] for tokens in segments], 1 + max(nums), num_drafts=nums)
    scores.read(segments, len(waiting), output)
    return scorer


@pytest.mark.parametrize(
    ("scope", "caches"), [("recovery", True), ("recovery", False), ("answer", True)], ids=["", "not cached", "stays"]
)
@pytest.mark.parametrize("choice", ["likeliest_safe", "safest"])
def test_recoveries_end_as_our_own_decoding_with_the_same_candidates(
    target, head, tokenizer, monkeypatch, choice, scope, caches
):
    is_read_again = scope == "recovery" or choice == "likeliest_safe"
    tried, name = {}, "_score" if is_read_again else "_judge"
    known = getattr(GuardedRequest, name)

    def note(answer, recovery, *args, is_reread=False, **kwargs):
        if not is_reread:
            tried.setdefault(answer.key, []).append([list(one) for one in recovery.tried[-1].segments])
        return known(answer, recovery, *args, **kwargs | ({"is_reread": True} if is_reread else {}))

    monkeypatch.setattr(GuardedRequest, name, note)
    engine = FakeEngine(target, head, tokenizer, caches=caches)
    # risks of a tiny head lie close together: no margin, or nothing would be safe enough
    chosen = {"max_recoveries": 1, "candidate_choice": choice, "num_candidates": 4, "safe_margin": 0.0}
    chosen["reflection_scope"] = scope
    # forwards of other shapes round otherwise, and candidates that begin alike are often as risky as each other
    for module in (safety_mode, request):
        monkeypatch.setattr(module, "choose", choose_roughly)
    read = watch_and_read if scope == "recovery" else read_once
    given = prompts(12)
    results = answer_all(target, head, tokenizer, given, engine=engine, **chosen)
    events = [event for result in results for event in result.events]
    recovered = [event for event in events if event.outcome == "recovered"]
    assert len(recovered) >= 5
    assert any(event.outcome == "refused" for event in events)
    # so that the two choices are told apart
    is_safest = [event.candidate_risks[event.chosen] == min(event.candidate_risks) for event in recovered]
    assert all(is_safest) == (choice == "safest")

    monkeypatch.setattr(
        SafetyMode,
        "_sample",
        lambda mode, index, row, flag, max_tokens, scores, num, **_: read(mode, index, row, scores, left.pop(0)),
    )
    target.generation_config.eos_token_id = END
    model = attach_safety_head(target, head, tokenizer=tokenizer)
    policy = SafeSpecConfig(reflection="pause think", refusal="no thanks", **POLICY | chosen)
    for index, (prompt, result) in enumerate(zip(given, results, strict=True)):
        left = tried.get(f"a{index}", [])
        output = model.generate(
            torch.tensor([prompt]),
            safespec=policy,
            max_new_tokens=30,
            suppress_tokens=[RESERVED],
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert result.token_ids == output.sequences[0, len(prompt) :].tolist()
        assert result.finish_reason == output.finish_reasons[0]
        assert left == []
        for event, own in zip(result.events, output.events[0], strict=True):
            assert (event.outcome, event.chosen) == (own.outcome, own.chosen)
            assert event.candidate_risks == pytest.approx(own.candidate_risks, abs=1e-5)
            if is_read_again:
                assert event.candidate_log_probs == pytest.approx(own.candidate_log_probs, abs=1e-4)


@pytest.mark.parametrize("is_spike", [True, False])
def test_flags_are_tested_as_by_our_own_decoding_with_the_same_candidates(
    target, head, tokenizer, monkeypatch, is_spike
):
    tried, known = {}, GuardedRequest._judge
    if not is_spike:  # as if what was taken back before the flagged token were risky as well
        monkeypatch.setattr(commit, "is_harmless", lambda *_: False)

    def note(answer, recovery, *args):
        if not recovery.is_scoring:
            tried.setdefault(answer.key, []).append([list(one) for one in recovery.tried[-1].segments])
        return known(answer, recovery, *args)

    monkeypatch.setattr(GuardedRequest, "_judge", note)
    for module in (safety_mode, request):
        monkeypatch.setattr(module, "choose", choose_roughly)
    # a margin of nearly nothing: risks of a tiny head lie close together
    chosen, given = {"false_alarm_margin": 1e-4, "num_candidates": 3}, prompts(12)
    results = answer_all(target, head, tokenizer, given, **chosen)
    firsts = [result.events[0].outcome for result in results if result.events]
    assert firsts.count("dismissed") >= 2
    assert firsts.count("confirmed") >= 2
    assert set(firsts) == {"dismissed", "confirmed"}
    dismissed = [result.events[0] for result in results if result.events and result.events[0].outcome == "dismissed"]
    assert {event.chosen is None for event in dismissed} == {is_spike}

    def read(mode, index, row, flag, max_tokens, scores, num, **_):
        return read_once(mode, index, row, scores, left.pop(0))

    monkeypatch.setattr(SafetyMode, "_sample", read)
    target.generation_config.eos_token_id = END
    model = attach_safety_head(target, head, tokenizer=tokenizer)
    policy = SafeSpecConfig(reflection="pause think", refusal="no thanks", **POLICY | chosen)
    arguments = {"max_new_tokens": 30, "suppress_tokens": [RESERVED], "do_sample": False}
    for index, (prompt, result) in enumerate(zip(given, results, strict=True)):
        left = tried.get(f"a{index}", [])
        output = model.generate(torch.tensor([prompt]), safespec=policy, return_dict_in_generate=True, **arguments)
        assert result.token_ids == output.sequences[0, len(prompt) :].tolist()
        own = output.events[0]
        assert [(event.outcome, event.chosen) for event in result.events] == [(one.outcome, one.chosen) for one in own]
        assert left == []


def test_a_candidate_that_was_flagged_while_it_was_sampled_is_not_chosen(head, tokenizer):
    policy = POLICY | {"num_candidates": 2, "candidate_choice": "likeliest_safe", "reflection_scope": "recovery"}
    guard = make_guard(head, tokenizer, **policy)
    answer = guard.request("a", prompts(1)[0], GREEDY)
    (first,) = answer.begin()
    answer.feed(first.key, [11, RESERVED])
    sampled = answer.advance({first.key: record([11], [0.99])})
    for one in sampled:
        answer.feed(one.key, [12, 13, RESERVED], [-1.0, -1.0, 0.0])
    num = len(sampled[0].prompt_ids) - 6
    found = [[0.01, 0.99], [0.02, 0.02]]
    read = answer.advance(
        {
            one.key: record([14] * num + [12, 13], [math.nan] * num + of_one)
            for one, of_one in zip(sampled, found, strict=True)
        }
    )
    for one, log_prob in zip(read, [-0.1, -5.0], strict=True):
        answer.feed(one.key, [20], [math.nan] * 6 + [log_prob] * 2)
    answer.advance({one.key: record([12, 13], [0.01, 0.01]) for one in read})
    (event,) = answer.row.events
    assert (event.chosen, event.candidate_log_probs) == (1, (-0.1, -5.0))
    assert event.candidate_risks == (0.99, 0.02)


@pytest.mark.parametrize("options", [{}, {"num_drafts": 3}, {"preempts": True, "chunk": 4}], ids=str)
def test_nothing_flagged_is_shown_and_what_is_shown_is_the_answer(target, head, tokenizer, options):
    shown = {}

    def show(answer):
        shown.setdefault(answer.key, []).extend(answer.take_final())

    engine = FakeEngine(target, head, tokenizer, **options)
    guard = make_guard(head, tokenizer, **POLICY)
    answers = [guard.request(f"a{i}", prompt, GREEDY) for i, prompt in enumerate(prompts(12))]
    results = drive(engine, answers, show)
    assert any(result.events for result in results)
    for answer, result in zip(answers, results, strict=True):
        show(answer)
        assert shown[answer.key] == result.token_ids
        scored = [r for r, o in zip(result.risks, result.provenance, strict=True) if o is not Provenance.REFUSAL]
        unknown = [risk for risk in scored if math.isnan(risk)]
        assert all(risk < head.config.risk_threshold for risk in scored if not math.isnan(risk))
        assert len(unknown) <= (result.finish_reason == "eos")
        assert RESERVED not in result.token_ids
    assert engine.states.report()["num_entries"] == engine.states.report()["num_running"] == 0


@pytest.mark.parametrize("breaks_loops", [True, False])
def test_once_an_answer_was_recovered_its_loops_are_to_be_stopped(target, head, tokenizer, monkeypatch, breaks_loops):
    asked = []

    def note(engine, key, prompt_ids, params):
        order = GuardOrder.from_text(params["extra_args"][ARGUMENT])
        known = [one for one in asked if one[0] == order.group]
        asked.append((order.group, bool(known) and order.candidate is None, order.breaks_loops))
        return add(engine, key, prompt_ids, params)

    add = FakeEngine.add
    monkeypatch.setattr(FakeEngine, "add", note)
    answer_all(target, head, tokenizer, prompts(12), break_loops=breaks_loops)
    assert {(goes_on, breaks) for _, goes_on, breaks in asked} == {(False, False), (True, breaks_loops)}


def test_recoveries_read_the_prefix_cache(target, head, tokenizer):
    engine = FakeEngine(target, head, tokenizer)
    results = answer_all(target, head, tokenizer, prompts(8), engine=engine)
    assert any(result.events for result in results)
    assert engine.num_hits > 0


@pytest.mark.parametrize(("policy", "reason"), [("refuse", "safety_refusal"), ("stop", "safety_stop")])
def test_policies_without_recovery_end_the_answer(target, head, tokenizer, policy, reason):
    results = answer_all(target, head, tokenizer, prompts(8), policy=policy, max_recoveries=6)
    flagged = [result for result in results if result.events]
    assert flagged
    assert {result.finish_reason for result in flagged} == {reason}
    assert all(result.statistics.num_candidates == 0 for result in results)


def test_observing_reports_flags_and_changes_nothing(target, head, never, tokenizer):
    silent = answer_all(target, never, tokenizer, prompts(8))
    observed = answer_all(target, head, tokenizer, prompts(8), policy="observe", max_recoveries=6)
    assert [result.token_ids for result in observed] == [result.token_ids for result in silent]
    assert any(event.outcome == "observed" for result in observed for event in result.events)


def test_an_answer_ends_with_the_length_it_was_given_and_every_token_is_scored(target, never, tokenizer):
    for num in (1, 2, 9):
        (result,) = answer_all(target, never, tokenizer, prompts(1), GREEDY | {"max_tokens": num})
        assert (len(result.token_ids), result.finish_reason) == (num, "length")
        assert not any(math.isnan(risk) for risk in result.risks)


def test_an_answer_without_a_limit_ends_one_place_before_the_context(target, never, tokenizer):
    (result,) = answer_all(target, never, tokenizer, prompts(1), {"temperature": 0.0})
    assert len(result.token_ids) == MAX_LEN - 1 - 6 or result.finish_reason == "eos"
    assert not any(math.isnan(risk) for risk in result.risks[:-1])


@pytest.mark.parametrize("scope", ["recovery", "answer"])
def test_the_context_may_end_anywhere_in_a_recovery(target, head, tokenizer, scope):
    engine, wanted = FakeEngine(target, head, tokenizer), []
    add = engine.add

    def note(key, prompt_ids, params):
        wanted.append(len(prompt_ids) + params["max_tokens"])
        add(key, prompt_ids, params)

    engine.add = note
    given = [prompts(1, MAX_LEN - 2 - left)[0] for left in range(40)]
    head.config.risk_threshold *= 0.9  # so that many are flagged, and some have no safe candidate
    results = answer_all(
        target, head, tokenizer, given, {"temperature": 0.0}, engine=engine, reflection_scope=scope, max_recoveries=2
    )
    outcomes = {event.outcome for result in results for event in result.events}
    assert {"recovered", "refused"} <= outcomes
    assert max(wanted) <= MAX_LEN
    assert all(result.failure is None for result in results)
    threshold = head.config.risk_threshold
    assert not any(risk >= threshold for result in results for risk in result.risks)
    # the refusal alone may go beyond: nobody reads on after it
    spoken = [
        len(prompt) + sum(origin is not Provenance.REFUSAL for origin in result.provenance)
        for prompt, result in zip(given, results, strict=True)
    ]
    assert max(spoken) <= MAX_LEN - 1
    assert engine.states.report()["num_entries"] == 0


def seeds_of(head, tokenizer, seed, policy_seed=None):
    """Of a recovery's candidates, and of what follows."""
    guard = make_guard(head, tokenizer, **POLICY | {"seed": policy_seed, "reflection_scope": "answer"})
    answer = guard.request("a", prompts(1)[0], {"max_tokens": 30, "temperature": 1.0, "seed": seed})
    (first,) = answer.begin()
    answer.feed(first.key, [11, RESERVED])
    sampled = answer.advance({first.key: record([11], [0.99])})
    return [first.params.get("seed"), *(one.params["seed"] for one in sampled)]


def test_what_follows_a_flag_is_drawn_from_the_seed_of_the_request_unless_the_policy_has_one(head, tokenizer):
    assert seeds_of(head, tokenizer, 7) == seeds_of(head, tokenizer, 7) == [7, 8, 9, 10]
    assert seeds_of(head, tokenizer, 7, policy_seed=100) == [7, 101, 102, 103]
    assert seeds_of(head, tokenizer, None) != seeds_of(head, tokenizer, None)


def test_a_policy_that_the_engine_cant_sample_is_refused(head, tokenizer):
    with pytest.raises(UnsupportedRequestError, match="recovery_temperature"):
        make_guard(head, tokenizer, recovery_temperature=2.5).request("a", prompts(1)[0], GREEDY)


def test_an_empty_stop_text_is_refused(head, tokenizer):
    with pytest.raises(UnsupportedRequestError, match="`stop`"):
        make_guard(head, tokenizer).request("a", prompts(1)[0], GREEDY | {"stop": ["w10", ""]})


def test_a_stop_string_ends_the_answer_after_the_token_that_completes_it(target, never, tokenizer):
    (plain,) = answer_all(target, never, tokenizer, prompts(1))
    word = tokenizer.decode([plain.token_ids[2]])  # no special one, which has no words
    first = next(i for i in range(30) if word in tokenizer.decode(plain.token_ids[: i + 1]))
    (result,) = answer_all(target, never, tokenizer, prompts(1), GREEDY | {"stop": word})
    assert (result.token_ids, result.finish_reason) == (plain.token_ids[: first + 1], "stop")
    assert not any(math.isnan(risk) for risk in result.risks)


def test_a_token_of_the_callers_ends_the_answer(target, never, tokenizer):
    (plain,) = answer_all(target, never, tokenizer, prompts(1))
    token = plain.token_ids[4]
    (result,) = answer_all(target, never, tokenizer, prompts(1), GREEDY | {"stop_token_ids": [token]})
    assert result.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
