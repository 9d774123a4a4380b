"""What guarded decoding leaves in a cache, its own or the caller's, and in tensors that come back."""

import copy

import pytest
import torch
from tiny import build_head, build_model, build_noisy_head, perturb
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from safespec_hf import (
    SafeSpecConfig,
    UnsupportedRequestError,
    attach_safety_head,
)
from safespec_hf.engine import growing
from safespec_hf.engine.cache import CACHE_NAME

PROMPT = torch.tensor([[11, 17, 23]])
SHORT = {"max_new_tokens": 8, "do_sample": False}
POLICY = SafeSpecConfig(max_segment_tokens=4, reflection="pause think", refusal="no thanks")


def fill(model, num_tokens, prompt=PROMPT):
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt[:, :num_tokens], **{CACHE_NAME: cache})
    return cache


def check_cache(model, cache, sequence):
    """The cache holds the beginning of what the caller sees: the next logits agree with those of no cache."""
    length = cache.get_seq_length()
    assert all(layer.get_seq_length() == length for layer in cache.layers)
    assert 0 < length < sequence.shape[1]
    with torch.no_grad():
        logits = model(sequence[:, length:], **{CACHE_NAME: copy.deepcopy(cache)}).logits[0, -1]
        expected = model(sequence).logits[0, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)  # the same float32 sums in another order


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("num_cached", [1, 2])
@pytest.mark.parametrize("quantile", [0.5, 0.8, None])
def test_a_users_cache_is_continued_and_left_consistent(target, tokenizer, with_draft, num_cached, quantile):
    head = build_head(target) if quantile is None else build_noisy_head(target, quantile)
    model = attach_safety_head(target, head, tokenizer=tokenizer)
    draft = {"assistant_model": perturb(build_model())} if with_draft else {}
    cache = fill(model, num_cached)
    arguments = {"max_new_tokens": 24, "do_sample": False, "safespec": POLICY, "return_dict_in_generate": True}
    output = model.generate(PROMPT, **{CACHE_NAME: cache}, **arguments, **draft)
    assert bool(output.events[0]) is (quantile is not None)
    assert torch.equal(output.sequences, model.generate(PROMPT, **arguments, **draft).sequences)
    assert output[CACHE_NAME] is cache
    check_cache(model, cache, output.sequences)


@pytest.mark.parametrize("quantile", [0.5, 0.8, None])
@pytest.mark.parametrize("keep_reflection", [False, True])
def test_the_returned_cache_holds_the_beginning_of_the_returned_tokens(target, tokenizer, quantile, keep_reflection):
    head = build_head(target) if quantile is None else build_noisy_head(target, quantile)
    model = attach_safety_head(target, head, tokenizer=tokenizer)
    policy = SafeSpecConfig(
        max_segment_tokens=4, reflection="pause think", refusal="no thanks", keep_reflection=keep_reflection
    )
    output = model.generate(PROMPT, max_new_tokens=24, do_sample=False, safespec=policy, return_dict_in_generate=True)
    check_cache(model, output[CACHE_NAME], output.sequences)


def test_a_silent_head_leaves_as_much_in_the_cache_as_plain_generate(guarded):
    caches = [DynamicCache(), DynamicCache()]
    guarded.generate(PROMPT, **{CACHE_NAME: caches[0]}, **SHORT)
    guarded.generate(PROMPT, **{CACHE_NAME: caches[1]}, **SHORT, safespec=True)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 3 + 8 - 1


@pytest.mark.parametrize("is_user_defined", [False, True])
def test_autograd_can_go_on_with_what_comes_back(target, tokenizer, is_user_defined):
    model = attach_safety_head(target, build_head(target), tokenizer=tokenizer)
    given = {CACHE_NAME: fill(model, 1)} if is_user_defined else {}
    output = model.generate(PROMPT, **given, **SHORT, safespec=True, return_dict_in_generate=True)
    last = output.sequences[:, output[CACHE_NAME].get_seq_length() :]
    model(last, **{CACHE_NAME: output[CACHE_NAME]}).logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("pack_weights", [False, True])
def test_a_model_made_for_inference_only_is_guarded_too(tokenizer, pack_weights):
    with torch.inference_mode():
        model = build_model()
        attach_safety_head(model, build_head(model), tokenizer=tokenizer)
        policy = SafeSpecConfig(risk_threshold=1.0, pack_weights=pack_weights)
        assert torch.equal(model.generate(PROMPT, **SHORT, safespec=policy), model.generate(PROMPT, **SHORT))


class Interrupt(StoppingCriteria):
    def __init__(self, after):
        self.after = after

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.after:
            raise KeyboardInterrupt
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("after", [5, 9, 14])
@pytest.mark.parametrize("quantile", [0.9, None])
def test_an_exception_leaves_a_cache_that_can_be_continued(target, tokenizer, after, quantile):
    head = build_head(target) if quantile is None else build_noisy_head(target, quantile)
    model, cache = attach_safety_head(target, head, tokenizer=tokenizer), fill(target, 2)
    arguments = {
        "max_new_tokens": 24,
        "do_sample": False,
        "safespec": POLICY,
        "assistant_model": perturb(build_model()),
    }
    whole = model.generate(PROMPT, **arguments)
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            PROMPT, **{CACHE_NAME: cache}, stopping_criteria=StoppingCriteriaList([Interrupt(after)]), **arguments
        )
    assert cache.get_seq_length() >= 2
    # what it holds is the prompt at least, and so the whole prompt can be continued from its beginning
    kept = min(cache.get_seq_length(), 2)
    cache.crop(kept - cache.get_seq_length())
    assert torch.equal(model.generate(PROMPT, **{CACHE_NAME: cache}, **arguments), whole)


@pytest.mark.parametrize("call", [3, 5, 8])
def test_an_exception_inside_a_forward_leaves_layers_of_equal_length(guarded, call):
    cache, calls = fill(guarded, 2), []

    def fail_late(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    guarded.model.layers[1].register_forward_pre_hook(fail_late)
    with pytest.raises(KeyboardInterrupt):
        guarded.generate(PROMPT, **{CACHE_NAME: cache}, max_new_tokens=24, do_sample=False, safespec=POLICY)
    assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    assert cache.get_seq_length() == call + 1


BATCH = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
MASK = (BATCH != 0).long()
KINDS = ["llama", "sliding", "alternating", "gpt2"]


def continued(model, output, mask, **arguments):
    """The answers to a second turn, from the cache of the first."""
    ids = torch.cat([output.sequences, torch.tensor([[15, 16]]).expand(len(output.sequences), -1)], dim=1)
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    cache = copy.deepcopy(output[CACHE_NAME]) if arguments.pop("with_cache") else None
    given = {} if cache is None else {CACHE_NAME: cache}
    return model.generate(ids, attention_mask=mask, **given, max_new_tokens=12, do_sample=False, **arguments)


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("num_new", [2, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_can_be_continued_from_the_cache_that_came_back(kind, num_new, implementation, tokenizer):
    model = build_model(kind)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    arguments = {"attention_mask": MASK, "do_sample": False, "return_dict_in_generate": True}
    arguments |= {"cache_implementation": implementation, "max_new_tokens": num_new}
    arguments |= {} if implementation is None else {"max_cache_len": 40}
    plain = model.generate(BATCH, **arguments)
    output = model.generate(BATCH, **arguments, prompt_lookup_num_tokens=3, safespec=True)
    assert [type(layer) for layer in output[CACHE_NAME].layers] == [type(layer) for layer in plain[CACHE_NAME].layers]
    assert int(output[CACHE_NAME].get_seq_length()) == int(plain[CACHE_NAME].get_seq_length()) == 4 + num_new - 1
    expected = continued(model, output, MASK, with_cache=False).tolist()
    assert continued(model, output, MASK, with_cache=True).tolist() == expected
    assert continued(model, output, MASK, with_cache=True, safespec=True).tolist() == expected


@pytest.mark.parametrize("kind", ["llama", "alternating"])
def test_a_batchs_cache_ends_with_its_shortest_answer(kind, tokenizer, monkeypatch):
    monkeypatch.setattr(growing, "MARGIN", 2)  # the others leave the windows of the shortest far behind
    model = build_model(kind)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    arguments = {"attention_mask": MASK, "max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True}
    end = int(model.generate(BATCH, **arguments).sequences[0, 4 + 4])
    output = model.generate(BATCH, **arguments, eos_token_id=end, safespec=True)
    assert output.finish_reasons[0] == "eos"
    length = int(output[CACHE_NAME].get_seq_length())
    assert length < output.sequences.shape[1] - 1
    sequences = output.sequences[:, : length + 1]
    mask = torch.cat([MASK, MASK.new_ones(3, length + 1 - 4)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            sequences[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **{CACHE_NAME: output[CACHE_NAME]}
        ).logits[:, -1]
        expected = model(sequences, attention_mask=mask, position_ids=positions).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_windows_cache_is_not_continued_after_padding_between_tokens(tokenizer):
    model, mask = build_model("sliding"), torch.tensor([[1, 1, 0, 1]])
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    cache = fill(model, 3, BATCH[:1])
    with pytest.raises(UnsupportedRequestError, match="padding between tokens"):
        model.generate(BATCH[:1], attention_mask=mask, **{CACHE_NAME: cache}, **SHORT, safespec=True)


@pytest.mark.parametrize("quantile", [0.6, 0.9])
def test_after_recoveries_a_batchs_cache_holds_what_the_caller_sees(target, tokenizer, quantile):
    model = attach_safety_head(target, build_noisy_head(target, quantile), tokenizer=tokenizer)
    arguments = {"attention_mask": MASK, "max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(BATCH, **arguments, safespec=POLICY)
    assert any(output.events)
    cache = output[CACHE_NAME]
    length = cache.get_seq_length()
    # a row that ends with a refusal at its beginning has not read the last token of its prompt
    mask = torch.cat([MASK, MASK.new_ones(3, 24)], dim=1)[:, :length]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = model(output.sequences[:, :length], attention_mask=mask, position_ids=positions)[CACHE_NAME]
    for ours, theirs in zip(cache.layers, states.layers, strict=True):
        for row, num_padding in enumerate((2, 1, 0)):
            torch.testing.assert_close(
                ours.keys[row, :, num_padding:], theirs.keys[row, :, num_padding:], atol=1e-4, rtol=1e-4
            )
