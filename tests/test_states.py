"""Models whose layers keep other states than keys and values are guarded like any other, alone and in batches."""

import pytest
import torch
from architectures import build_architecture
from tiny import FIELDS, build_head, build_noisy_head, perturb, since

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.engine.cache import CACHE_NAME

NAMES = ["qwen3_next", "mamba2", "jamba", "falcon_h1", "lfm2", "minimax", "gemma3n_text", "rwkv", "mpt"]
PROMPTS = [[11, 17, 23, 31, 17, 23], [21, 22, 24], [30]]
SHORT = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CONSTANT = SafeSpecConfig(adaptive_drafts=False)


@pytest.fixture(scope="module")
def built():
    return {name: build_architecture(name) for name in NAMES}


@pytest.fixture
def models(built, tokenizer):
    return {name: attach_safety_head(model, build_head(model), tokenizer=tokenizer) for name, model in built.items()}


def batch():
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    return ids, (torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in PROMPTS])).long()


def drafting(how, model):
    return {
        "alone": {},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "draft": {"assistant_model": perturb(model)},
    }[how]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["alone", "lookup", "draft"])
def test_a_silent_head_gives_plain_greedy_text_alone_and_in_an_uneven_batch(name, how, models):
    model = models[name]
    arguments = {**SHORT, "safespec": CONSTANT, "return_dict_in_generate": True, **drafting(how, model)}
    alone = [model.generate(torch.tensor([prompt]), **SHORT)[0, len(prompt) :] for prompt in PROMPTS]
    one = model.generate(torch.tensor(PROMPTS[:1]), **arguments)
    assert torch.equal(one.sequences[0, len(PROMPTS[0]) :], alone[0])
    ids, mask = batch()
    whole = model.generate(ids, attention_mask=mask, **arguments).sequences[:, ids.shape[1] :]
    assert torch.equal(whole, torch.stack(alone))


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "rwkv"])
def test_a_perfect_draft_costs_no_forward_and_no_token_more(name, models):
    model = models[name]
    policy = SafeSpecConfig(adaptive_drafts=False, num_draft_tokens=3, score_last_token=False)
    arguments = {**SHORT, "safespec": policy, "return_dict_in_generate": True}
    counts = model.generate(torch.tensor(PROMPTS[:1]), **arguments, assistant_model=model).statistics
    assert counts.acceptance_rate == 1.0
    assert (counts.num_target_forwards, counts.num_reread_tokens) == (3, 0)


def test_what_is_read_again_is_counted_and_takes_no_forward_of_its_own(models):
    model = models["qwen3_next"]
    counts = model.generate(
        torch.tensor(PROMPTS[:1]),
        **SHORT,
        safespec=CONSTANT,
        assistant_model=perturb(model, 0.1),
        return_dict_in_generate=True,
    ).statistics
    assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens
    assert counts.num_reread_tokens > 0
    assert counts.num_target_forwards == counts.num_rounds


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "rwkv"])
def test_what_is_sampled_does_not_depend_on_the_drafts(name, models):
    model, answers = models[name], []
    for extra in ({}, {"prompt_lookup_num_tokens": 3}):
        torch.manual_seed(7)
        arguments = {**SHORT, "do_sample": True, "safespec": CONSTANT, **extra}
        answers.append(model.generate(torch.tensor(PROMPTS[:1]), **arguments))
    assert torch.equal(*answers)


@pytest.mark.parametrize("source", ["draft", "target"])
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "jamba", "lfm2", "gemma3n_text", "rwkv", "mpt"])
def test_flags_are_survived_and_nothing_flagged_comes_back(name, source, models, tokenizer):
    model, ids, mask = models[name], *batch()
    attach_safety_head(model, build_noisy_head(model, 0.5), tokenizer=tokenizer)
    policy = SafeSpecConfig(**FIELDS, adaptive_drafts=False, lookup_drafts=False, candidate_source=source)
    arguments = {**SHORT, "max_new_tokens": 16, "safespec": policy, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, assistant_model=perturb(model), **arguments)
    assert any(output.events)
    threshold = model.safety.risk_threshold
    assert not bool((output.risks >= threshold).any())


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_next",
        "jamba",
        "falcon_h1",
        *(since("5.20", "refused there", name) for name in ("roformer", "deepseek_v32")),
    ],
)
def test_the_returned_cache_can_be_continued(name, tokenizer):
    model = build_architecture(name)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    arguments = {**SHORT, "safespec": CONSTANT, "return_dict_in_generate": True, "assistant_model": perturb(model)}
    output = model.generate(torch.tensor(PROMPTS[:1]), **arguments)
    cache, ids = output[CACHE_NAME], output.sequences
    length = cache.get_seq_length()
    assert (0 if name == "roformer" else 1) <= length < ids.shape[1]  # there it may be empty
    with torch.no_grad():
        # by single tokens: some of these models, unlike us, forget a state when they read several
        steps = [model(ids[:, at : at + 1], **{CACHE_NAME: cache}) for at in range(length, ids.shape[1])]
        expected = model(ids, use_cache=False).logits[0, -1]
    torch.testing.assert_close(steps[-1].logits[0, -1], expected, atol=2e-3, rtol=2e-3)  # a scan against steps


def all_states(cache, is_real):
    """Of every layer what it keeps, but for what it keeps of padding."""
    states = []
    for layer in cache.layers:
        for kind in ("keys", "values", "conv_states", "recurrent_states"):
            kept = getattr(layer, kind, None)
            kept = [*kept.values()] if isinstance(kept, dict) else [kept]
            for state in (each for each in kept if each is not None):
                is_real_L = torch.nn.functional.pad(is_real, (0, state.shape[2] - is_real.shape[1]), value=1)
                states.append(state * is_real_L[:, None, :, None] if kind in ("keys", "values") else state)
    return states


CACHED = ["qwen3_next", "mamba2", "jamba", "falcon_h1", "lfm2", since("5.20", "refused there", "roformer")]
"""Of these jamba reads single tokens, mamba2 has no columns, and RoFormer is read row by row."""


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", CACHED)
def test_the_cache_that_comes_back_has_the_states_of_a_plain_call(name, implementation, tokenizer):
    model, (ids, mask) = build_architecture(name), batch()
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    arguments = {**SHORT, "cache_implementation": implementation, "return_dict_in_generate": True}
    guarding = {"safespec": CONSTANT, "prompt_lookup_num_tokens": 3}
    for prompts, is_real in ((ids[:1], mask[:1]), (ids[:1].flip(1).repeat(2, 1), mask[:1].repeat(2, 1)), (ids, mask)):
        plain = model.generate(prompts, attention_mask=is_real, **arguments)
        output = model.generate(prompts, attention_mask=is_real, **arguments, **guarding)
        if name == "roformer" and not bool(is_real.all()):  # to which padding is tokens: a plain call says other ones
            assert output.get(CACHE_NAME) is None
            continue
        assert torch.equal(output.sequences, plain.sequences)
        if len(prompts) == 1 and implementation is None:
            continue  # this one may end earlier
        theirs, ours = (all_states(each[CACHE_NAME], is_real) for each in (plain, output))
        assert type(output[CACHE_NAME]) is type(plain[CACHE_NAME])
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)  # a scan against steps


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "falcon_h1"])
def test_plain_generate_goes_on_with_the_cache_of_a_batch(name, implementation, models):
    model, (ids, mask) = models[name], batch()
    arguments = {**SHORT, "cache_implementation": implementation, "return_dict_in_generate": True}
    arguments |= {} if implementation is None else {"max_cache_len": 40}
    texts = []
    for guarding in ({}, {"safespec": CONSTANT, "prompt_lookup_num_tokens": 3}):
        output = model.generate(ids, attention_mask=mask, **arguments, **guarding)
        is_real = torch.nn.functional.pad(mask, (0, 12), value=1)
        given = {"attention_mask": is_real, CACHE_NAME: output[CACHE_NAME]}
        texts.append(model.generate(output.sequences, **given, **SHORT))
    assert torch.equal(*texts)


def test_a_static_cache_of_recurrent_layers_is_read_for_those_who_get_it(models):
    ids, mask = batch()
    arguments = {**SHORT, "cache_implementation": "static", "safespec": CONSTANT, "return_dict_in_generate": True}
    nums = []
    for use_cache in (False, True):
        output = models["qwen3_next"].generate(ids, attention_mask=mask, use_cache=use_cache, **arguments)
        assert (output.get(CACHE_NAME) is not None) is use_cache
        nums.append(output.statistics.num_target_forwards)
    assert nums[1] == nums[0] + 1


def test_a_batchs_states_end_with_its_shortest_answer(models):
    model, (ids, mask) = models["qwen3_next"], batch()
    end = int(model.generate(ids, attention_mask=mask, **SHORT)[0, ids.shape[1] + 4])
    arguments = {**SHORT, "eos_token_id": end, "safespec": CONSTANT, "return_dict_in_generate": True}
    output = model.generate(ids, attention_mask=mask, **arguments)
    cache, shortest = output[CACHE_NAME], int((output.provenance >= 0).sum(dim=1).min())
    assert 0 < shortest < output.risks.shape[1]
    assert int(cache.get_seq_length()) == ids.shape[1] + shortest - 1


def test_recurrent_layers_can_not_be_compiled(models):
    with pytest.raises(UnsupportedRequestError, match="Qwen3NextForCausalLM is read in parts, or row by row"):
        models["qwen3_next"].generate(torch.tensor(PROMPTS[:1]), **SHORT, safespec=SafeSpecConfig(compile=True))
