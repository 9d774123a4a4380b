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
    attach_safety_head,
)
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
