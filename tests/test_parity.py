"""A silent head changes nothing: greedy text is plain greedy text, samples are the target's, and forwards are as many.

On tiny random models, against plain `generate` of transformers.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import (
    ADAPTIVE,
    CONFIGS,
    DRAFTING,
    POLICY,
    PROMPT,
    attach,
    build_draft_head,
    build_head,
    build_model,
    build_noisy_head,
    drafting,
    perturb,
)
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from safespec_hf import SafeSpecConfig, SafetyHead
from safespec_hf.decoding.assistant import Draft
from safespec_hf.decoding.drafts import make_drafting
from safespec_hf.decoding.loop import Decoder
from safespec_hf.decoding.monitor import RiskMonitor
from safespec_hf.decoding.plan import Plan
from safespec_hf.decoding.request import make_rows
from safespec_hf.engine.cache import CachedModel
from safespec_hf.heads.head_config import SafetyHeadConfig


class PreferEven(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + torch.arange(scores.shape[-1]).remainder(2).eq(input_ids.shape[1] % 2)


class EndsWith(StoppingCriteria):
    """Stops after a token, once there are enough tokens."""

    def __init__(self, token, least):
        self.token, self.least = token, least

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] == self.token) & (input_ids.shape[1] >= self.least)


SETTINGS = {
    "plain": {},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [27, 36]},
    "min_length": {"min_length": 12, "eos_token_id": [27, 36]},
    "suppress_tokens": {"suppress_tokens": [27, 36, 21]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [4]},
    "bad_words": {"bad_words_ids": [[27], [21, 23]]},
    "sequence_bias": {"sequence_bias": [[[11], 4.0], [[12, 13], -3.0]]},
    "forced_eos": {"forced_eos_token_id": 39},
    "length_penalty": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 27},
    "custom_processor": {"logits_processor": LogitsProcessorList([PreferEven()])},
    "prefix_function": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10 + len(ids) % 3, 40, 2))},
    "custom_criterion": {"stopping_criteria": StoppingCriteriaList([EndsWith(11, 11)])},
    "max_length": {"max_length": 15, "max_new_tokens": None},
    "one_token": {"max_new_tokens": 1},
    "renormalized": {"renormalize_logits": True, "repetition_penalty": 1.4},
}


def test_the_perturbed_draft_is_accepted_sometimes_but_not_always(target, draft, tokenizer):
    output = attach(target, tokenizer).generate(
        PROMPT,
        max_new_tokens=60,
        do_sample=False,
        assistant_model=draft,
        safespec=POLICY,
        return_dict_in_generate=True,
    )
    assert 0.3 < output.statistics.acceptance_rate < 0.9


@pytest.mark.parametrize("policy", [POLICY, ADAPTIVE], ids=["constant", "adaptive"])
@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("cheap_drafts")
def test_greedy_text_is_that_of_plain_generate(target, tokenizer, name, source, policy):
    arguments = {"max_new_tokens": 14, "do_sample": False, **SETTINGS[name]}
    expected = target.generate(PROMPT, **arguments)
    free = target.generate(PROMPT, max_new_tokens=14, do_sample=False)
    assert (expected.tolist() == free.tolist()) is (name == "plain")  # or else the setting does nothing here
    guarded = attach(target, tokenizer).generate(PROMPT, **arguments, **drafting(source, target), safespec=policy)
    assert guarded.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "llama"])
@pytest.mark.parametrize("source", DRAFTING)
def test_greedy_text_of_every_kind_of_model_is_that_of_plain_generate(tokenizer, kind, source):
    model = build_model(kind)
    arguments = {"max_new_tokens": 30, "do_sample": False, "repetition_penalty": 1.2}
    expected = model.generate(PROMPT, **arguments)
    guarded = attach(model, tokenizer).generate(PROMPT, **arguments, **drafting(source, model), safespec=POLICY)
    assert guarded.tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("source", ["draft", "head"])
@pytest.mark.usefixtures("cheap_drafts")
def test_trees_of_drafts_leave_greedy_text_as_it_is(tokenizer, monkeypatch, attention, kind, source):
    model, trees, forward = build_model(kind, attn_implementation=attention), [], CachedModel.forward

    def record(*args, parents=None, **kwargs):
        trees.append(parents)
        return forward(*args, parents=parents, **kwargs)

    monkeypatch.setattr(CachedModel, "forward", record)
    ids = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
    arguments = {"attention_mask": (ids != 0).long(), "max_new_tokens": 40, "do_sample": False}
    expected = model.generate(ids, **arguments)
    # a draft that is often wrong, so that its other guesses are accepted
    extra = {"assistant_model": perturb(model, 0.03)} if source == "draft" else drafting(source, model)
    output = attach(model, tokenizer).generate(
        ids, **arguments, **extra, safespec=ADAPTIVE, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected.tolist()
    assert any(trees) is (kind in ("llama", "gpt2"))  # sliding windows are not for trees


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("at", range(1, 8))
def test_an_end_token_anywhere_in_an_accepted_block_ends_the_answer(target, tokenizer, source, at):
    free = target.generate(PROMPT, max_new_tokens=8, do_sample=False)[0, 4:].tolist()
    arguments = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": free[at]}
    expected = target.generate(PROMPT, **arguments)
    # the target as its own draft: everything is accepted
    extra = {"assistant_model": build_model()} if source == "draft" else drafting(source, target)
    output = attach(target, tokenizer).generate(
        PROMPT, **arguments, **extra, safespec=replace(POLICY, num_draft_tokens=7), return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected.tolist()
    assert output.finish_reasons == ["eos"]


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("at", [2, 5])
def test_a_stop_string_inside_an_accepted_block_ends_the_answer(target, tokenizer, source, at):
    free = target.generate(PROMPT, max_new_tokens=8, do_sample=False)[0, 4:].tolist()
    stop = tokenizer.convert_ids_to_tokens(free[at])
    arguments = {"max_new_tokens": 16, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    expected = target.generate(PROMPT, **arguments)
    assert expected.shape[1] < 20
    output = attach(target, tokenizer).generate(
        PROMPT, **arguments, **drafting(source, target), safespec=POLICY, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected.tolist()
    assert output.finish_reasons == ["stop"]


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("kind", CONFIGS)
def test_left_padded_rows_of_a_batch_give_what_plain_generate_gives_for_the_batch(tokenizer, kind, source):
    model = build_model(kind)
    ids = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
    arguments = {"attention_mask": (ids != 0).long(), "max_new_tokens": 20, "do_sample": False, "eos_token_id": 33}
    expected = model.generate(ids, **arguments)
    guarded = attach(model, tokenizer).generate(ids, **arguments, **drafting(source, model), safespec=POLICY)
    assert guarded.tolist() == expected.tolist()


def alone(model, ids, policy, **arguments):
    return [
        model.generate(row[row != 0][None], safespec=policy, return_dict_in_generate=True, **arguments) for row in ids
    ]


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("forced", [False, True])
def test_a_row_in_a_batch_is_what_it_is_alone(tokenizer, kind, source, forced):
    model = build_model(kind)
    ids = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
    attach(model, tokenizer, build_noisy_head(model, 0.8) if forced else None)
    eos = None if forced else 33  # early ends are for the other half: here they would leave few tokens to flag
    arguments = {"max_new_tokens": 18, "do_sample": False, "eos_token_id": eos, **drafting(source, model)}
    batch = model.generate(
        ids, attention_mask=(ids != 0).long(), safespec=POLICY, return_dict_in_generate=True, **arguments
    )
    singles = alone(model, ids, POLICY, **arguments)
    assert any(batch.events) is forced
    for row, single in enumerate(singles):
        answer = single.sequences[0, int((ids[row] != 0).sum()) :].tolist()
        assert batch.sequences[row, 4 : 4 + len(answer)].tolist() == answer
        assert batch.provenance[row, : len(answer)].tolist() == single.provenance[0].tolist()
        assert batch.finish_reasons[row] == single.finish_reasons[0]


def decode(model, with_head, source, num_rows=2, policy=POLICY):
    """The loop itself, with or without a head."""
    draft = {"draft": build_model(), "head": build_draft_head(model)}.get(source)
    prompts = PROMPT.expand(num_rows, -1)
    config = model.generation_config
    config.prompt_lookup_num_tokens = 4 if source == "lookup" else None
    rows = make_rows(
        prompts,
        torch.ones_like(prompts).bool(),
        max_length=24,
        policy=policy,
        newline_ids=frozenset({7, 8}),
        processors=LogitsProcessorList(),
    )
    candidates = make_drafting(model, Draft(draft), config, policy, num_rows)
    plan = Plan(
        policy=policy,
        monitor=RiskMonitor(build_head(model)) if with_head else None,
        risk_threshold=1.0,
        num_draft_tokens=5,
        do_sample=False,
        eos_ids=frozenset(),
        criteria=StoppingCriteriaList(),
        reflection_ids=[4, 5],
        refusal_ids=[6, 9],
        separator_ids=[8],
        max_context=512,
        seeds=[0],
    )
    decoder = Decoder(model, rows, candidates, plan)
    decoder.run()
    return decoder.output(prompts, 0)


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_head_costs_no_forward_but_the_one_that_reads_the_last_token(kind, source):
    counts = {}
    for with_head, wish in ((False, None), (True, False), (True, None)):
        model, calls = build_model(kind), []
        model.get_output_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        output = decode(model, with_head, source, policy=replace(POLICY, score_last_token=wish))
        counts[with_head, wish] = len(calls)
        assert output.statistics.num_target_forwards == output.statistics.num_rounds == len(calls)
    assert counts[True, False] == counts[False, None]
    assert counts[False, None] <= counts[True, None] <= counts[False, None] + 1


@pytest.mark.parametrize("source", DRAFTING)
def test_a_silent_head_changes_no_token(target, source):
    assert decode(target, True, source).sequences.tolist() == decode(target, False, source).sequences.tolist()


def test_work_per_round_does_not_grow_with_the_answer(target, tokenizer, monkeypatch):
    attach(target, tokenizer, build_head(target, pooling="mean", span="answer"))
    read, risk = [], SafetyHead.risk
    monkeypatch.setattr(SafetyHead, "risk", lambda head, features: read.append(len(features)) or risk(head, features))
    target.generate(PROMPT, max_new_tokens=120, do_sample=False, assistant_model=perturb(target), safespec=POLICY)
    assert max(read) <= 6  # five drafts and a token that waited


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma", "mean+ewma+last"])
@pytest.mark.parametrize("span", ["segment", "answer"])
@pytest.mark.parametrize("layers", [[2], [1, 2]])
def test_returned_risks_are_those_of_scoring_the_whole_answer_at_once(target, tokenizer, pooling, span, layers):
    head = build_head(target, pooling=pooling, span=span, hidden_layers=layers)
    arguments = {"max_new_tokens": 30, "do_sample": False, "assistant_model": perturb(target)}
    output = attach(target, tokenizer, head).generate(
        PROMPT, safespec=POLICY, return_dict_in_generate=True, **arguments
    )
    answer = output.sequences[0, 4:].tolist()
    states = target(output.sequences, output_hidden_states=True).hidden_states
    hidden_TF = torch.cat([states[layer][0, 4:] for layer in layers], dim=-1).detach()
    pooled = pool_by_definition(hidden_TF, answer, head.config)
    # the same float32 sums in another order; risks are slopes of at most a quarter of it
    torch.testing.assert_close(output.risks[0, :-1], head.risk(pooled)[:-1].detach(), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("pooling", ["mean", "mean+ewma"])
def test_risks_after_recoveries_are_those_of_what_was_kept(target, tokenizer, source, pooling):
    head = build_head(target, pooling=pooling, span="answer", hidden_layers=[1, 2])
    attach(target, tokenizer, head)
    arguments = {"max_new_tokens": 30, "do_sample": False, "return_dict_in_generate": True, **drafting(source, target)}
    silent = target.generate(PROMPT, safespec=POLICY, **arguments)
    threshold = float(silent.risks[0].nanquantile(0.9))
    policy = replace(POLICY, reflection="", max_recoveries=50, risk_threshold=threshold)
    output = target.generate(PROMPT, safespec=policy, **arguments)
    assert output.statistics.num_flags > 0
    answer = output.sequences[0, 4:].tolist()
    states = target(output.sequences, output_hidden_states=True).hidden_states
    hidden_TF = torch.cat([states[layer][0, 4:] for layer in (1, 2)], dim=-1).detach()
    expected = head.risk(pool_by_definition(hidden_TF, answer, head.config)).detach()
    is_known = ~output.risks[0].isnan()
    assert is_known.sum() > 8
    torch.testing.assert_close(output.risks[0][is_known], expected[is_known], atol=1e-4, rtol=0.0)


def pool_by_definition(hidden_TF, answer, config: SafetyHeadConfig):
    """One token at a time: where its span starts, and the mean over it."""
    if "+" in config.pooling:
        parts = [SimpleNamespace(**config.to_dict() | {"pooling": way}) for way in config.pooling.split("+")]
        return torch.cat([pool_by_definition(hidden_TF, answer, part) for part in parts], dim=-1)
    pooled, start = [], 0
    for index, token in enumerate(answer):
        span = hidden_TF[start : index + 1]
        if config.pooling == "ewma":
            state = span[0]
            for hidden_F in span[1:]:
                state = config.ewma_decay * state + (1 - config.ewma_decay) * hidden_F
            pooled.append(state)
        else:
            pooled.append(span[-1] if config.pooling == "last" else span.mean(dim=0))
        length = index + 1 - start
        if config.span == "segment" and (length >= 6 or (token in (7, 8) and length >= 2)):
            start = index + 1
    return torch.stack(pooled)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("source", DRAFTING)
def test_after_recoveries_risks_are_still_those_of_the_context_that_was_read(tokenizer, kind, source):
    model = build_model(kind)
    head = build_noisy_head(model, 0.8, pooling="last")
    arguments = {"max_new_tokens": 30, "do_sample": False, **drafting(source, model)}
    policy = SafeSpecConfig(max_segment_tokens=6, reflection="pause think", refusal="no thanks", keep_reflection=True)
    output = attach(model, tokenizer, head).generate(
        PROMPT, safespec=policy, return_dict_in_generate=True, **arguments
    )
    assert output.events[0]
    states = model(output.sequences, output_hidden_states=True).hidden_states
    expected = head.risk(states[-1][0, 4:]).detach()
    is_scored = ~output.risks[0].isnan()
    torch.testing.assert_close(output.risks[0, is_scored], expected[is_scored], atol=1e-4, rtol=0.0)  # as above
