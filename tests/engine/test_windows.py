"""Layers with a window keep no more than it and a margin, and after any history go on as after a fresh prefill."""

import copy
import random

import numpy as np
import pytest
import torch
from test_cache import TOLERANCE, prefill, random_tokens
from tiny import CONFIGS, build_model

from safespec_hf.engine import growing
from safespec_hf.engine.cache import CACHE_NAME, CachedModel
from safespec_hf.engine.prompt import Prompt

WINDOW = 8
KINDS = [kind for kind in CONFIGS if kind in ("sliding", "alternating")]


@pytest.fixture(params=[3, 16])
def margin(request, monkeypatch):
    """Smaller than the longest rollbacks, and larger."""
    monkeypatch.setattr(growing, "MARGIN", request.param)
    monkeypatch.setattr(growing, "ROOM", 2)
    return request.param


class History:
    """A `CachedModel`, and beside it the tokens that each of its rows should know, read or to be read again."""

    def __init__(self, model, num_rows, choose):
        self.model, self.choose = model, choose
        self.cached = CachedModel(model, num_rows)
        self.rows = [[] for _ in range(num_rows)]
        self.num_again = 0

    def forward_and_check(self, least=1, most=5):
        known = self.cached.lengths
        self.num_again += sum(len(row) - length for row, length in zip(self.rows, known, strict=True))
        self.rows = [row + random_tokens(self.choose, least, most) for row in self.rows]
        blocks = [row[length:] for row, length in zip(self.rows, known, strict=True)]
        logits_BTV = self.cached.forward(blocks, 1).logits_BTV
        assert self.cached.lengths == [len(row) for row in self.rows]
        for row, logits_TV in zip(self.rows, logits_BTV, strict=True):
            torch.testing.assert_close(logits_TV[-1], prefill(self.model, row), **TOLERANCE)

    def keep(self):
        most = self.choose.choice([2, 2, 12])
        lengths = [self.choose.randint(max(1, len(row) - most), len(row)) for row in self.rows]
        self.cached.keep(lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def select(self):
        order = [self.choose.randrange(len(self.rows)) for _ in self.rows]
        self.cached.select(order)
        self.rows = [self.rows[index] for index in order]

    def fork_and_replace(self):
        source, num_copies = self.choose.randrange(len(self.rows)), self.choose.randint(1, 3)
        fork = self.cached.fork(source, num_copies)
        missing = self.rows[source][fork.lengths[0] :]
        blocks = [missing + random_tokens(self.choose, 1, 4) for _ in range(num_copies)]
        fork.forward(blocks, 1)
        copy_, row = self.choose.randrange(num_copies), self.choose.randrange(len(self.rows))
        self.cached.replace(row, fork, copy_)
        self.rows[row] = self.rows[source][: len(self.rows[source]) - len(missing)] + blocks[copy_]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_any_history_leaves_what_a_prefill_gives_and_no_more_than_the_window(kind, num_rows, margin):
    choose = random.Random(f"{kind}{num_rows}{margin}")
    history = History(build_model(kind), num_rows, choose)
    history.forward_and_check(3, 40)
    for _ in range(40):
        choose.choice([lambda: None, lambda: None, history.select, history.fork_and_replace])()
        history.keep()
        history.forward_and_check()
    again = sum(len(row) - length for row, length in zip(history.rows, history.cached.lengths, strict=True))
    assert again == 0
    # rollbacks that go back further than the margin are what makes it read again
    assert margin > 3 or history.cached.usage.num_reread_tokens >= history.num_again > 0
    window = history.cached.windows.layers[0]
    assert window.num_dropped > 0
    # a block of a row that is read again lies beside those of the others
    assert num_rows > 1 or window.num_held <= WINDOW + 2 * margin + 5
    assert window.num_held <= window.get_seq_length() == history.cached.used_BL.shape[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 2])
@torch.no_grad()
def test_a_long_answer_takes_no_more_memory_than_its_window(kind, num_rows, margin):
    cached, sizes = CachedModel(build_model(kind), num_rows), []
    cached.forward([[11] * 200, [12] * 150][:num_rows], 1)
    for step in range(60):
        cached.forward([[11] * 3, [12] * (1 + step % 3)][:num_rows], 1)
        sizes.append(max(layer._buffers[0].shape[2] for layer in cached.windows.layers))
    # what is held at most, a block, and the room to spare
    assert max(sizes[1:]) <= WINDOW + 2 * margin + 6 + 4
    whole = [layer for layer in cached.cache.layers if layer not in cached.windows.layers]
    assert all(layer.num_held >= 380 for layer in whole)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_even_the_prompt_is_held_no_longer_than_a_layer_reads_it(kind, margin):
    cached = CachedModel(build_model(kind), 1)
    cached.forward([[11] * 300], 1)
    assert all(layer.num_held == WINDOW + margin for layer in cached.windows.layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [60, 99])
@torch.no_grad()
def test_what_is_given_back_can_be_continued(kind, length, margin):
    model, tokens = build_model(kind), random_tokens(random.Random(2), 100, 100)
    cached = CachedModel(model, 1)
    cached.forward([tokens], 1)
    cached.trim_cache(length)
    given = cached.give_cache()
    # where it can't go back it is empty: the beginning of what was read, still
    num = length if length == 99 else 0
    assert given.get_seq_length() == num
    for size in (1, 5):
        again = copy.deepcopy(given)
        logits = model(torch.tensor([tokens[num : num + size]]), **{CACHE_NAME: again}).logits[0, -1]
        torch.testing.assert_close(logits, prefill(model, tokens[: num + size]), **TOLERANCE)


@torch.no_grad()
def test_a_pretended_context_holds_no_more_than_the_window(margin):
    cached = CachedModel(build_model("alternating"), 2)
    cached.forward([[0, 0]] * 2, 1)
    cached.pretend(500)
    cached.forward([[0, 0]] * 2, 1)
    held = [layer.num_held for layer in cached.cache.layers]
    assert held == [WINDOW + margin + 2, 502]
    cached.keep([500, 500])
    assert cached.lengths == [500, 500]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_after_a_prompt_that_can_not_be_read_again_all_is_kept(kind, margin):
    model, tokens = build_model(kind), random_tokens(random.Random(3), 90, 90)
    cached = CachedModel(model, 1)
    ids, is_real_BL = torch.tensor([tokens[:10]]), np.ones((1, 10), dtype=bool)
    cached.prefill(Prompt(inputs={"input_ids": ids}, is_real_BL=is_real_BL, num_tokens=[10]))
    for start in range(10, 90, 8):
        cached.forward([tokens[start : start + 8]], 1)
    cached.keep([30])
    assert cached.lengths == [30]
    logits_BTV = cached.forward([tokens[30:33]], 1).logits_BTV
    torch.testing.assert_close(logits_BTV[0, -1], prefill(model, tokens[:33]), **TOLERANCE)
