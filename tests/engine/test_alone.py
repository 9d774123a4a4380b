"""Rows that are read one by one: whatever happens to them, the next logits are those of a fresh prefill."""

import random

import pytest
import torch
from architectures import build_architecture
from histories import History, read
from tiny import is_before

from safespec_hf import UnsupportedRequestError
from safespec_hf.decoding.support import check_model
from safespec_hf.engine.alone import MOST_BEHIND, MOST_REREAD, RowsAlone, cached_model
from safespec_hf.engine.traits import read_alone, reads_alone

# compressed keys and values, an indexer of blocks, a state that the forward takes and returns, positions by key length
KINDS = ["deepseek_v4", "minimax_m3_vl_text", "rwkv", "mpt"]
pytestmark = pytest.mark.skipif(is_before("5.24"), reason="these models came, or read blocks, with later releases")


@pytest.fixture(scope="module")
def models():
    models = {name: build_architecture(name, 0.1) for name in KINDS}
    for model in models.values():
        check_model(model)
    return models


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_any_history_leaves_what_a_prefill_gives(name, num_rows, models):
    history = History(models[name], num_rows, random.Random(f"{name}{num_rows}"))
    assert isinstance(history.cached, RowsAlone)
    history.play(8)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_what_is_accepted_is_read_once_and_what_is_rejected_from_the_last_copy_on(name, models):
    cached = cached_model(models[name], 1)
    read(cached, [11, 12, 13], 0)
    for token in range(14, 26, 4):
        read(cached, [token, token + 1, token + 2, token + 3], 3)
        cached.keep([cached.lengths[0]])
    assert (cached.lengths, cached.usage.num_forwards, cached.usage.num_reread_tokens) == ([15], 4, 0)
    cached.keep([13])
    assert cached.lengths[0] in range(13 - 4 - MOST_BEHIND, 14)
    start = cached.lengths[0]
    read(cached, list(range(11 + start, 26)), 2)
    assert (cached.usage.num_forwards, cached.usage.num_reread_tokens) == (5, 13 - start)


@torch.no_grad()
def test_what_is_read_again_before_drafts_stays_short(models):
    cached, tokens = cached_model(models["rwkv"], 1), [11, 12, 13]
    read(cached, tokens, 0)
    for round_ in range(40):  # one of two drafts is rejected, every time
        block = [*tokens[cached.lengths[0] :], round_ % 30]
        assert len(block) <= MOST_REREAD + 4
        read(cached, [*block, 5, 6], 2)
        tokens += [round_ % 30, 5]
        cached.keep([len(tokens)])
    # and before a copy was worth it, all is read again: in a forward of its own, once
    assert cached.usage.num_forwards <= 40 + 1 + 40 // 10


@torch.no_grad()
def test_candidates_do_not_each_read_again_what_they_have_in_common(models):
    cached = cached_model(models["mpt"], 1)
    read(cached, list(range(11, 31)), 0)
    cached.keep([18])
    assert cached.lengths == [0]
    fork = cached.fork(0, 4)
    assert (fork.lengths, cached.usage.num_reread_tokens) == ([18] * 4, 18)


def test_rows_are_read_together_where_that_is_right():
    model = build_architecture("llama")
    check_model(model)
    assert not reads_alone(model)


def test_a_copy_of_a_model_is_asked_for_itself(models):
    other = build_architecture("mpt")
    assert not reads_alone(other)
    check_model(other)
    assert reads_alone(other)


def test_states_that_are_kept_elsewhere_are_refused_by_name():
    model = build_architecture("recurrent_gemma")
    with pytest.raises(UnsupportedRequestError, match="are not in its cache"):
        check_model(model)
    read_alone(model)  # nor does it help to read its rows alone
    with pytest.raises(UnsupportedRequestError, match=r"differ from|it fails"):
        check_model(model)


def test_a_forward_that_changes_weights_for_good_is_not_taken_back_halfway():
    model = build_architecture("rwkv", num_hidden_layers=3, rescale_every=1).train()
    before = model.rwkv.blocks[2].attention.output.weight.clone()
    check_model(model)
    model.eval()
    with torch.no_grad():
        model(torch.tensor([[11, 12]]))
    assert torch.equal(model.rwkv.blocks[2].attention.output.weight, before / 4)
