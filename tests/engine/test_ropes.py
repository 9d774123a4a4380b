"""Rotary positions that change with the length of the text: before, after and across that, as in plain `generate`."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from architectures import build_architecture
from segments import recorded_segments, separate_risks
from tiny import (
    ADAPTIVE,
    CONFIGS,
    DRAFTING,
    POLICY,
    attach,
    build_model,
    build_noisy_head,
    build_tokenizer,
    cheap_drafts,
    drafting,
    is_before,
    perturb,
    since,
)
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from safespec_hf import Provenance
from safespec_hf.engine.cache import CACHE_NAME, CachedModel
from safespec_hf.engine.ropes import RowRopes, can_cross, changes_of, rereads

CHANGE = 16
LONG = {"rope_type": "longrope", "original_max_position_embeddings": CHANGE, "rope_theta": 10000.0}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 2.0, 2.0], "partial_rotary_factor": 1.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0}
SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PHI = {**SIZES, "rope_parameters": LONG, "original_max_position_embeddings": CHANGE, "max_position_embeddings": 128}
NESTED = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LONG}
GIVEN = {
    "goes on": ("llama", {"rope_parameters": LONG, "max_position_embeddings": 128}),
    "rereads": ("phi3", PHI),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": CHANGE}),
    "windows": ("sliding", {"rope_parameters": LONG, "max_position_embeddings": 128}),
    "rereads windows": ("phi3", {**PHI, "sliding_window": 8}),
    "one kind of layer": ("alternating", {"rope_parameters": NESTED, "max_position_embeddings": 128}),
}
WHY = "before, transformers itself loses the text at that length, or its frequencies"
KINDS = [since("5.24", WHY, kind) if "rereads" in kind or "one kind" in kind else kind for kind in GIVEN]
reads_again = pytest.mark.skipif(is_before("5.24"), reason=WHY)


@functools.cache
def built(kind):
    name, config = GIVEN[kind]
    if name == "phi3":
        return build_architecture(name, **config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](**config), dtype=torch.float32).eval()


def build(kind):
    return copy.deepcopy(built(kind))


def build_guarded(kind, tokenizer):
    return attach(build(kind), tokenizer)


@functools.cache
def plain(kind, start, end, num_new):
    """What plain `generate` makes of a piece of the text."""
    return build(kind).generate(TEXT[:, start:end], max_new_tokens=num_new, do_sample=False)


TEXT = torch.randint(10, 40, (1, 60), generator=torch.Generator().manual_seed(2))


class Forced(LogitsProcessor):
    """Leaves only the next token of a text."""

    def __call__(self, input_ids, scores):
        return scores.new_full(scores.shape, -torch.inf).index_fill_(1, TEXT[0, input_ids.shape[1]][None], 0.0)


@functools.cache
def plain_logits(kind, num_prompt):
    """Of plain `generate`, after each token of the text from the prompt's last one on."""
    model = build(kind)
    output = model.generate(
        TEXT[:, :num_prompt],
        max_new_tokens=40 - num_prompt,
        do_sample=False,
        logits_processor=LogitsProcessorList([Forced()]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_positions_of_these_models_change_what_they_say(kind):
    crossed, long = plain_logits(kind, 4)[17], plain_logits(kind, 20)[1]
    assert torch.allclose(crossed, long, atol=1e-4) == ("rereads" in kind)
    with torch.no_grad():
        naive = build(kind)(TEXT[:, :39]).logits[0, 3:CHANGE]
    assert (naive - plain_logits(kind, 4)[: CHANGE - 3]).abs().max() > 0.01


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("num_tokens", [6, 16, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_plain_ones_on_both_sides_and_across(kind, num_tokens, source, tokenizer):
    model, prompt = build_guarded(kind, tokenizer), TEXT[:, :num_tokens]
    arguments = {"max_new_tokens": 24, "do_sample": False}
    for policy in (POLICY, ADAPTIVE) if source in ("draft", "head") else (POLICY,):
        with cheap_drafts():
            guarded = model.generate(prompt, **arguments, **drafting(source, model), safespec=policy)
        assert torch.equal(guarded, plain(kind, 0, num_tokens, 24))


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_cross_each_by_itself(kind, source, tokenizer):
    model, lengths = build_guarded(kind, tokenizer), [4, 20, 14, 16]
    prompts = torch.stack([torch.cat([torch.zeros(20 - num).long(), TEXT[0, :num]]) for num in lengths])
    mask = torch.stack([torch.arange(20) >= 20 - num for num in lengths]).long()
    arguments = {"max_new_tokens": 24, "do_sample": False}
    batch = model.generate(
        prompts, attention_mask=mask, pad_token_id=0, **arguments, **drafting(source, model), safespec=POLICY
    )
    for row, num in enumerate(lengths):
        assert torch.equal(batch[row, 20 - num :], plain(kind, 0, num, 24)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_go_back_and_forth_are_read_as_plain_decoding_reads_them(kind):
    numbers, nums = np.random.default_rng(0), [4, 15, 18]
    cached, lengths = CachedModel(build(kind), 3), list(nums)
    for step in range(40):
        # all but the last token of each text are kept, and then some drafts, of which some are right
        cached.keep([length - 1 for length in lengths])
        for row, length in enumerate(lengths):
            cached.reach(row, length)
        drafts = [min(int(numbers.integers(5)), 38 - length, cached.before_change(length)) for length in lengths]
        triples = list(zip(cached.lengths, lengths, drafts, strict=True))
        with torch.no_grad():
            output = cached.forward(
                [TEXT[0, start : length + num].tolist() for start, length, num in triples],
                1 + max(drafts),
                num_drafts=drafts,
            )
        for row, (prompt, length, num) in enumerate(zip(nums, lengths, drafts, strict=True)):
            expected = plain_logits(kind, prompt)[length - prompt : length - prompt + num + 1]
            assert torch.allclose(output.logits_BTV[row, -1 - num :], expected, atol=1e-4), (step, row, length)
        back = numbers.integers(12, size=3) if step % 4 == 3 else [0, 0, 0]
        lengths = [
            max(min(length + num + 1, 36) - int(less), prompt)
            for length, num, less, prompt in zip(lengths, drafts, back, nums, strict=True)
        ]


@reads_again
def test_what_is_read_again_is_counted(tokenizer):
    arguments = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "safespec": POLICY}
    counted = {kind: build_guarded(kind, tokenizer).generate(TEXT[:, :4], **arguments).statistics for kind in GIVEN}
    assert {kind: statistics.num_reread_tokens for kind, statistics in counted.items() if "windows" not in kind} == {
        "goes on": 0,
        "rereads": CHANGE,
        "dynamic": 0,
        "one kind of layer": 0,
    }
    assert len({statistics.num_target_forwards for statistics in counted.values()}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_of_the_model_itself_are_all_accepted(kind, tokenizer):
    model = build_guarded(kind, tokenizer)
    arguments = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    statistics = model.generate(TEXT[:, :6], **arguments, assistant_model=build(kind), safespec=POLICY).statistics
    assert statistics.num_accepted_tokens == statistics.num_draft_tokens > 15


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_drafts(kind, tokenizer):
    model = build_guarded(kind, tokenizer)
    answers = []
    for arguments in ({}, {"prompt_lookup_num_tokens": 4}):
        torch.manual_seed(0)
        answers.append(
            model.generate(TEXT[:, :6], max_new_tokens=30, do_sample=True, top_k=3, **arguments, safespec=POLICY)
        )
    assert torch.equal(*answers)


UNREFLECTED = [{"reflection": ""}, {"reflection": "", "candidate_source": "draft"}, {"reflection_scope": "recovery"}]


@reads_again
@pytest.mark.parametrize("policy", UNREFLECTED)
def test_after_recoveries_answers_go_on_as_plain_ones(policy, tokenizer):
    model = attach(build("rereads"), tokenizer, build_noisy_head(build("rereads"), 0.9))
    num_crossing = num_compared = 0
    for start in range(10):
        output = model.generate(
            TEXT[:, start : start + 8],
            max_new_tokens=30,
            do_sample=False,
            return_dict_in_generate=True,
            assistant_model=perturb(model),
            # plain answers may loop
            safespec=dataclasses.replace(POLICY, **policy, max_recoveries=20, break_loops=False),
        )
        places = [at + 8 for at, each in enumerate(output.provenance[0].tolist()) if each == Provenance.RECOVERED]
        num_crossing += {CHANGE - 1, CHANGE} <= {*places}
        if output.finish_reasons[0] == "length" and places and places[-1] < 37:
            begun = output.sequences[:, : places[-1] + 1]
            arguments = {"attention_mask": torch.ones_like(begun), "do_sample": False}  # 0 is a word as well
            rest = build("rereads").generate(begun, max_new_tokens=37 - places[-1], **arguments)
            assert torch.equal(output.sequences, rest)
            num_compared += 1
    assert num_crossing > 0
    assert num_compared > 0


@reads_again
def test_segments_are_judged_as_the_texts_that_they_would_make():
    model, head = build("rereads"), build_noisy_head(build("rereads"), 0.9)
    attach(model, build_tokenizer(has_digits=True), head)
    policy = dataclasses.replace(POLICY, verification="segment", quality_prompt="pause w12 w13", quality_threshold=4)
    with recorded_segments() as judged:
        model.generate(
            TEXT[:, :6], max_new_tokens=30, do_sample=False, assistant_model=perturb(model, 0.03), safespec=policy
        )
    assert any(len(each.context) <= CHANGE < len(each.context + each.tokens) for each in judged)
    for each in judged:
        assert each.risks == pytest.approx(separate_risks(model, head, each), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_caches_go_on_across(kind, tokenizer):
    model, arguments = build_guarded(kind, tokenizer), {"do_sample": False, "return_dict_in_generate": True}
    ids, cache = TEXT[:, :6], None
    for num_new in (8, 16, 6):
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": num_new, **arguments}
        plainly = build(kind).generate(ids, **given, **{CACHE_NAME: copy.deepcopy(cache)}).sequences
        output = model.generate(ids, **given, **{CACHE_NAME: cache}, safespec=POLICY)
        assert torch.equal(output.sequences, plainly)
        ids, cache = torch.cat([output.sequences, TEXT[:, :2]], dim=1), output[CACHE_NAME]


@pytest.mark.parametrize("kind", ["goes on", since("5.24", WHY, "rereads")])
def test_caches_of_batches_go_on_as_each_row_would(kind, tokenizer):
    model, lengths = build_guarded(kind, tokenizer), [6, 12]
    ids = torch.stack([torch.cat([torch.zeros(12 - num).long(), TEXT[0, :num]]) for num in lengths])
    mask = torch.stack([torch.arange(12) >= 12 - num for num in lengths]).long()
    cache = None
    for num_new in (3, 12):
        given = {"attention_mask": mask, "max_new_tokens": num_new, "do_sample": False, CACHE_NAME: cache}
        output = model.generate(ids, **given, pad_token_id=0, return_dict_in_generate=True, safespec=POLICY)
        cache, ids = output[CACHE_NAME], output.sequences
        mask = torch.nn.functional.pad(mask, (0, num_new), value=1)
    for row, num in enumerate(lengths):
        assert torch.equal(ids[row, 12 - num :], plain(kind, 0, num, 15)[0])


@reads_again
def test_a_cache_that_ends_on_the_other_side_is_not_given_back():
    for end, left in ((12, 10), (20, 0)):
        cached = CachedModel(build("rereads"), 1)
        cached.reach(0, end)
        with torch.no_grad():
            cached.forward([TEXT[0, : end - 1].tolist()], 1)
        cached.keep([10])
        cached.trim_cache(10)
        assert cached.cache.get_seq_length() == left


@reads_again
def test_without_a_cache_a_model_that_reads_again_does_so_always(tokenizer):
    model = build_guarded("rereads", tokenizer)
    arguments = {"max_new_tokens": 24, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(TEXT[:, :6], **arguments, safespec=POLICY), plain("rereads", 0, 6, 24))


def test_frequencies_that_never_change_cost_nothing():
    assert RowRopes.of(build_model(), 1) is None
    assert changes_of(build_model()) is None


@reads_again
def test_models_say_themselves_whether_they_read_again():
    assert [rereads(built(kind)) for kind in GIVEN] == ["rereads" in kind for kind in GIVEN]
    assert all(can_cross(built(kind)) for kind in GIVEN)
