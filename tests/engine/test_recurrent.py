"""Whatever happens to states that have no columns, the next logits are those of a fresh prefill of the tokens kept."""

import random
import threading

import pytest
import torch
from architectures import build_architecture
from histories import TOLERANCE, History, prefill, read
from tiny import VOCAB_SIZE, is_before, since
from transformers.cache_utils import LinearAttentionLayer

from safespec_hf import UnsupportedRequestError
from safespec_hf.engine.cache import CACHE_NAME, CachedModel
from safespec_hf.engine.mixers import mixers_of
from safespec_hf.engine.recurrent import SPAN, Copy, thin

# one of each kind of state: linear attention, state spaces that go on from a state and such that don't, with and
# without attention beside them or in the same layer, convolutions, shared keys and values, an indexer's keys
KINDS = ["qwen3_next", "mamba2", "jamba", "falcon_h1", "lfm2", "minimax", "zaya", "gemma3n_text", "deepseek_v32"]
READS_WRONGLY = "it reads blocks after a cache wrongly there, and is refused"


@pytest.fixture(scope="module")
def models():
    return {name: build_architecture(name, 0.1) for name in KINDS}


@pytest.mark.parametrize("name", [*KINDS[:-1], since("5.20", READS_WRONGLY, "deepseek_v32")])
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_any_history_leaves_what_a_prefill_gives(name, num_rows, models):
    history = History(models[name], num_rows, random.Random(f"{name}{num_rows}"))
    history.play(10)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "falcon_h1"])
@torch.no_grad()
def test_nothing_is_read_again_unless_a_draft_is_rejected(name, models):
    cached = CachedModel(models[name], 1)
    read(cached, [11, 12, 13], 0)
    for token in range(14, 34, 4):
        read(cached, [token, token + 1, token + 2, token + 3], 3)
        cached.keep([cached.lengths[0]])
    assert cached.usage.num_reread_tokens == 0
    assert cached.lengths == [23]
    # the first token of a block is the target's own and stands; of three drafts one is accepted
    read(cached, [34, 35, 36, 37], 3)
    cached.keep([25])
    assert cached.lengths == [23]
    read(cached, [34, 35, 38, 39, 10], 2)
    assert cached.usage.num_reread_tokens == 2
    # a copy was made where the tokens that stand end, so no more than what was accepted is ever read again
    cached.keep([27])
    assert cached.lengths == [26]


@torch.no_grad()
def test_states_that_are_kept_do_not_grow_with_the_answer(models):
    cached = CachedModel(models["qwen3_next"], 1)
    tokens = [11, 12, 13]
    read(cached, tokens, 0)
    for token in range(2 * SPAN):
        tokens = [*tokens, token % VOCAB_SIZE, 5]
        # a draft of two is accepted; what the last rounds have left is read again
        read(cached, [*tokens[cached.lengths[0] :], 6], 2)
        cached.keep([len(tokens)])
        assert len(cached.recurrent._copies[0]) <= 4
    # and a flag finds one close by
    cached.keep([len(tokens) - SPAN])
    assert len(tokens) - 2 * SPAN - 3 <= cached.lengths[0] <= len(tokens) - SPAN


def test_thinning_keeps_the_ends_and_those_around_a_span():
    copies = [Copy(length, {}, 0) for length in range(0, 500, 7)]
    kept = [copy.length for copy in thin(copies)]
    assert kept == [0, 427, 434, 497]
    assert thin([]) == []


def test_models_that_go_on_from_a_state_read_blocks_and_others_single_tokens(models):
    found = {name: mixers_of(models[name]) for name in KINDS}
    assert [name for name in KINDS if found[name] is None] == ["gemma3n_text", "deepseek_v32"]
    assert [name for name in KINDS if found[name] and not found[name].reads_blocks] == ["jamba"]


@pytest.mark.parametrize(("name", "reads_blocks"), [("mamba2", True), ("falcon_h1", True), ("jamba", False)])
def test_coarse_roundings_are_not_taken_for_forgetting(name, reads_blocks):
    assert mixers_of(build_architecture(name).to(torch.bfloat16)).reads_blocks is reads_blocks


@torch.no_grad()
def test_a_forward_leaves_mixers_as_they_were_and_other_threads_alone(models):
    model = models["qwen3_next"]
    before = [dict(vars(module)) for module in model.modules()]
    expected, seen, cached = prefill(model, [11, 12, 13]), [], CachedModel(model, 1)

    def interrupt(*_):
        if not seen:
            seen.append(None)
            other = threading.Thread(target=lambda: seen.append(prefill(model, [11, 12, 13])))
            other.start()
            other.join()

    hook = model.model.layers[-1].register_forward_pre_hook(interrupt)
    read(cached, [11, 12, 13], 1)
    hook.remove()
    assert torch.equal(seen[1], expected)
    after = [dict(vars(module)) for module in model.modules()]
    assert [state.keys() for state in after] == [state.keys() for state in before]
    assert all("forward" not in state for state in after)


@torch.no_grad()
def test_a_forward_that_fails_halfway_leaves_a_way_back(models):
    model = models["qwen3_next"]
    cached = CachedModel(model, 1)
    read(cached, [11, 12, 13], 0)
    read(cached, [14, 15], 1)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read(cached, [16, 17, 18], 2)
    hook.remove()
    cached.trim_cache(4)
    length = cached.cache.get_seq_length()
    assert length > 0
    rest = torch.tensor([[11, 12, 13, 14, 15][length:]])
    logits_V = model(rest, **{CACHE_NAME: cached.give_cache()}).logits[0, -1]
    torch.testing.assert_close(logits_V, prefill(model, [11, 12, 13, 14, 15]), **TOLERANCE)


@pytest.mark.skipif(is_before("5.23"), reason="by its class's word it is refused before anything is read")
def test_states_outside_of_the_cache_are_refused_by_name():
    with pytest.raises(UnsupportedRequestError, match="are not in its cache, so they can't be rolled back"):
        mixers_of(build_architecture("recurrent_gemma"))


def test_recurrent_states_are_where_the_mixers_say(models):
    for name in ("qwen3_next", "jamba", "zaya", "minimax"):
        cached = CachedModel(models[name], 1)
        read(cached, [11, 12], 0)
        layers = [at for at, layer in enumerate(cached.cache.layers) if isinstance(layer, LinearAttentionLayer)]
        assert sorted({key.layer for key in mixers_of(models[name]).keys}) == layers
