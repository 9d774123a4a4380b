"""After anything that can happen to a cache, the next logits are those of a fresh prefill of the tokens kept."""

import random
from itertools import pairwise

import pytest
import torch
from tiny import CONFIGS, VOCAB_SIZE, build_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from safespec_hf.engine.cache import CACHE_NAME, CachedModel, Usage, takes_trees
from safespec_hf.engine.token_tree import path_to
from safespec_hf.engine.traits import reads_alone

KINDS = list(CONFIGS)
# The same float32 sums in another order, through two layers of a model whose logits reach about 10: 1e-5 is seen.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def random_tokens(choose, least, most):
    return [choose.randrange(VOCAB_SIZE) for _ in range(choose.randint(least, most))]


@torch.no_grad()
def prefill(model, tokens):
    """The obvious reference: all tokens of one row, without any cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


class Shadow:
    """A `CachedModel`, and beside it the plain lists of the tokens that each of its rows should hold."""

    def __init__(self, model, num_rows, choose):
        self.model, self.choose = model, choose
        self.cached = CachedModel(model, num_rows)
        self.rows = [[] for _ in range(num_rows)]

    @torch.no_grad()
    def forward_and_check(self, least=1, most=5):
        blocks = [random_tokens(self.choose, least, most) for _ in self.rows]
        logits = self.cached.forward(blocks, 1).logits_BTV[:, -1]
        self.rows = [row + block for row, block in zip(self.rows, blocks, strict=True)]
        assert self.cached.lengths == [len(row) for row in self.rows]
        for row, logits_V in zip(self.rows, logits, strict=True):
            torch.testing.assert_close(logits_V, prefill(self.model, row), **TOLERANCE)

    def keep(self):
        lengths = [self.choose.randint(max(1, len(row) - 8), len(row)) for row in self.rows]
        self.cached.keep(lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]

    def select(self):
        order = [self.choose.randrange(len(self.rows)) for _ in self.rows]
        self.cached.select(order)
        self.rows = [self.rows[index] for index in order]

    @torch.no_grad()
    def fork_and_replace(self):
        source, num_copies = self.choose.randrange(len(self.rows)), self.choose.randint(1, 3)
        fork = self.cached.fork(source, num_copies)
        blocks = [random_tokens(self.choose, 1, 4) for _ in range(num_copies)]
        fork.forward(blocks, 1)
        copy, row = self.choose.randrange(num_copies), self.choose.randrange(len(self.rows))
        self.cached.replace(row, fork, copy)
        self.rows[row] = self.rows[source] + blocks[copy]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_any_history_of_one_kind_of_model_leaves_what_a_prefill_gives(kind, num_rows):
    # 8 kinds and sizes of 30 rollbacks each: 240
    choose = random.Random(f"{kind}{num_rows}")
    shadow = Shadow(build_model(kind), num_rows, choose)
    shadow.forward_and_check(3, 12)
    for _ in range(30):
        choose.choice([lambda: None, shadow.select, shadow.fork_and_replace])()
        shadow.keep()
        shadow.forward_and_check()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_very_different_lengths_do_not_disturb_each_other(kind):
    shadow = Shadow(build_model(kind), 2, random.Random(4))
    with torch.no_grad():
        shadow.cached.forward([[1] * 20, [2, 3]], 1)
    shadow.rows = [[1] * 20, [2, 3]]
    for _ in range(3):
        shadow.forward_and_check()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_position_of_a_ragged_block_is_right(kind):
    model = build_model(kind)
    cached, prompts = CachedModel(model, 2), [[11] * 12, [12] * 12]
    cached.forward(prompts, 1)
    blocks = [[13, 14, 15, 16, 17, 18], [19, 20]]
    logits = cached.forward(blocks, 6).logits_BTV
    for row, (prompt, block) in enumerate(zip(prompts, blocks, strict=True)):
        for back in range(len(block)):
            expected = prefill(model, prompt + block[: len(block) - back])
            torch.testing.assert_close(logits[row, 5 - back], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_tapped_states_are_those_of_a_plain_forward(kind):
    model = build_model(kind)
    cached = CachedModel(model, 1, layers=[1, 2])
    cached.forward([[11, 12, 13]], 1)
    hidden_BTF = cached.forward([[14, 15]], 1).hidden_BTF
    states = model(torch.tensor([[11, 12, 13, 14, 15]]), output_hidden_states=True).hidden_states
    expected = torch.cat([states[1], states[2]], dim=-1)[:, -2:]
    torch.testing.assert_close(hidden_BTF, expected, **TOLERANCE)


def random_tree(choose, num):
    return [choose.randint(-1, draft - 1) for draft in range(num)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_every_draft_of_a_tree_sees_its_own_continuation_only(kind, num_rows, attention):
    # 2 x 2 x 2 kinds of 12 rounds with about 5 drafts in each row
    choose = random.Random(f"{kind}{num_rows}")
    shadow = Shadow(build_model(kind, attn_implementation=attention), num_rows, choose)
    cached = shadow.cached
    shadow.forward_and_check(3, 12)
    for _ in range(12):
        waiting = [random_tokens(choose, 1, 3) for _ in range(num_rows)]
        drafts = [random_tokens(choose, 0, 9) for _ in range(num_rows)]
        trees = [random_tree(choose, len(row)) for row in drafts]
        blocks = [first + row for first, row in zip(waiting, drafts, strict=True)]
        width = max(map(len, blocks))
        logits_BTV = cached.forward(blocks, width, parents=trees).logits_BTV
        for row, (first, tree) in enumerate(zip(waiting, trees, strict=True)):
            shadow.rows[row] = shadow.rows[row] + first
            for draft in range(len(tree)):
                tokens = shadow.rows[row] + [drafts[row][index] for index in path_to(draft, tree)]
                found = logits_BTV[row, width - len(tree) + draft]
                torch.testing.assert_close(found, prefill(shadow.model, tokens), **TOLERANCE)
            path = path_to(choose.randrange(len(tree)), tree) if tree else []
            if tree:
                cached.keep_drafts(row, len(tree), path)
            shadow.rows[row] = shadow.rows[row] + [drafts[row][index] for index in path]
        cached.keep(cached.lengths)
        assert cached.lengths == [len(row) for row in shadow.rows]
        assert num_rows > 1 or cached.used_BL.shape[1] == cached.lengths[0] == cached.cache.get_seq_length()
        shadow.forward_and_check()


@pytest.mark.parametrize(("kind", "is_fit"), [("llama", True), ("gpt2", True), ("sliding", False)])
def test_trees_need_attention_to_the_whole_context(kind, is_fit):
    assert takes_trees(build_model(kind)) is is_fit


@torch.no_grad()
def test_only_the_logits_asked_for_come_back(target):
    cached = CachedModel(target, 1)
    assert cached.forward([[11, 12, 13]], 2).logits_BTV.shape == (1, 2, VOCAB_SIZE)
    assert cached.forward(torch.tensor([[14]]), 1).hidden_BTF is None


@torch.no_grad()
def test_a_single_row_never_has_a_hole(target):
    cached = CachedModel(target, 1)
    for kept in (4, 3, 6, 6, 1):
        cached.forward([[11] * 5], 1)
        cached.keep([kept])
        assert cached.used_BL.all()
        assert cached.cache.get_seq_length() == cached.lengths[0] == kept


@torch.no_grad()
def test_keeping_nothing_empties_the_cache(target):
    cached = CachedModel(target, 1)
    cached.forward([[11, 12]], 1)
    cached.keep([0])
    logits = cached.forward([[13]], 1).logits_BTV[0, -1]
    torch.testing.assert_close(logits, prefill(target, [13]), **TOLERANCE)


@torch.no_grad()
def test_keeping_more_than_a_row_has_changes_nothing(target):
    cached = CachedModel(target, 2)
    cached.forward([[11, 12], [13]], 1)
    cached.keep([9, 9])
    assert cached.lengths == [2, 1]


@torch.no_grad()
def test_holes_are_closed_once_they_are_a_quarter(target):
    cached = CachedModel(target, 2)
    cached.forward([[11] * 4, [12] * 4], 1)
    widths, longest = [], []
    for step in range(60):
        cached.forward([[13] * 6, [14] * 6], 1)
        # in turns, one row rejects all but one token
        cached.keep([length - 5 * (row == step % 2) for row, length in enumerate(cached.lengths)])
        widths.append(cached.used_BL.shape[1])
        longest.append(max(cached.lengths))
    assert any(after < before for before, after in pairwise(widths))
    # 64 holes are tolerated, or a third of what is used, and a round adds at most 6 more before the next check
    assert all(width <= used + max(64, used / 3) + 6 for width, used in zip(widths, longest, strict=True))


@torch.no_grad()
def test_a_fork_leaves_its_parent_as_it_was(target):
    cached = CachedModel(target, 2)
    cached.forward([[11, 12, 13], [14]], 1)
    fork = cached.fork(0, 3)
    fork.forward([[20], [21, 22], [23]], 1)
    fork.keep([1, 1, 1])
    logits = cached.forward([[15], [16]], 1).logits_BTV[:, -1]
    torch.testing.assert_close(logits[0], prefill(target, [11, 12, 13, 15]), **TOLERANCE)
    torch.testing.assert_close(logits[1], prefill(target, [14, 16]), **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_forks_hold_what_they_have_in_common_once(attention):
    # 400 tokens before 8 times 7 of their own
    cached = CachedModel(build_model(attn_implementation=attention), 1)
    cached.forward([random_tokens(random.Random(1), 400, 400)], 1)
    before = num_values(cached)
    fork = cached.fork(0, 8)
    with Largest() as largest:
        for _ in range(7):
            fork.forward(torch.full((8, 1), 11), 1)
    assert fork.lengths == [407] * 8
    assert num_values(fork) < 2 * before  # there is room for 256 tokens more, once for all
    # keys of all 4 heads, where 2 are kept: what transformers makes of a layer while it reads, and no more
    assert largest.num_values < 2 * before


def num_values(cached):
    states = [state.untyped_storage() for layer in cached.cache.layers for state in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() // 4 for storage in states}.values())


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside."""

    num_values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.num_values = max([self.num_values, *(one.numel() for one in made)])
        return result


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_fork_sees_the_common_beginning_and_its_own_tokens_only(kind):
    model, choose = build_model(kind), random.Random(3)
    cached, common = CachedModel(model, 2, layers=[2]), random_tokens(choose, 9, 9)
    cached.forward([random_tokens(choose, 12, 12), common], 1)
    fork, rows = cached.fork(1, 3), [list(common) for _ in range(3)]
    for _ in range(4):
        blocks = [random_tokens(choose, 1, 5) for _ in rows]
        rows = [row + block for row, block in zip(rows, blocks, strict=True)]
        width = max(map(len, blocks))
        output = fork.forward(blocks, width)
        for row, block, logits_TV, hidden_TF in zip(rows, blocks, *output, strict=True):
            whole = model(torch.tensor([row]), output_hidden_states=True)
            torch.testing.assert_close(logits_TV[-len(block) :], whole.logits[0, -len(block) :], **TOLERANCE)
            states_TF = whole.hidden_states[2][0, -len(block) :]
            torch.testing.assert_close(hidden_TF[-len(block) :], states_TF, **TOLERANCE)
        fork.keep([len(row) - 1 for row in rows])
        rows = [row[:-1] for row in rows]


@torch.no_grad()
def test_a_fork_of_an_empty_cache_is_empty(target):
    fork = CachedModel(target, 1).fork(0, 2)
    logits = fork.forward([[11], [12, 13]], 1).logits_BTV[:, -1]
    torch.testing.assert_close(logits[1], prefill(target, [12, 13]), **TOLERANCE)


@torch.no_grad()
def test_forwards_of_forks_are_counted_with_their_parents(target):
    cached = CachedModel(target, 1, usage=Usage())
    cached.forward([[11]], 1)
    cached.fork(0, 4).forward([[12]] * 4, 1)
    assert cached.usage.num_forwards == 2
    assert cached.usage.seconds > 0


@torch.no_grad()
def test_a_cache_that_was_taken_is_continued(target):
    cache = DynamicCache()
    target(torch.tensor([[11, 12, 13]]), **{CACHE_NAME: cache})
    cached = CachedModel(target, 1)
    cached.take_cache(cache)
    logits = cached.forward([[14]], 1).logits_BTV[0, -1]
    torch.testing.assert_close(logits, prefill(target, [11, 12, 13, 14]), **TOLERANCE)
    assert cache.get_seq_length() == 4


@torch.no_grad()
def test_trimming_crops_even_a_forward_that_was_interrupted_between_layers(target):
    cached = CachedModel(target, 1)
    cached.forward([[11, 12, 13]], 1)
    target.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cached.forward([[14, 15]], 1)
    assert [layer.get_seq_length() for layer in cached.cache.layers] == [5, 3]
    cached.trim_cache(3)
    assert [layer.get_seq_length() for layer in cached.cache.layers] == [3, 3]


@torch.no_grad()
def test_trimming_knows_that_a_trees_path_has_not_been_chosen_yet(target):
    cached = CachedModel(target, 1)
    cached.forward([[11, 12]], 1)
    cached.forward([[13, 14, 15, 16]], 4, parents=[[-1, -1, 1]])
    cached.trim_cache(5)
    assert cached.cache.get_seq_length() == 3


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_attention_models_are_read_together(kind):
    assert not reads_alone(build_model(kind))
