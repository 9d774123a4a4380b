"""Drafts of a draft model: its own text, row by row, with the distributions they were drawn from."""

import random

import pytest
import torch
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after, count_up
from tiny import VOCAB_SIZE, build_model, make_row
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from safespec_hf import Provenance
from safespec_hf.drafting.draft_length import DraftCosts
from safespec_hf.drafting.router import DraftRouter


@torch.no_grad()
def test_a_model_drafts_its_own_greedy_text(target):
    router = DraftRouter(target)
    expected = target.generate(torch.tensor([[11, 12, 13]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    assert router.draft([make_row([11, 12, 13])], [6]).drafts == [expected]


@torch.no_grad()
def test_ragged_rows_are_drafted_as_each_row_alone(target):
    prompts, nums = [[11, 12, 13, 14], [15], [16, 17]], [4, 2, 0]
    rows = [make_row(prompt, index) for index, prompt in enumerate(prompts)]
    together = DraftRouter(target, num_rows=3).draft(rows, nums).drafts
    alone = [DraftRouter(target).draft([make_row(p)], [num]).drafts[0] for p, num in zip(prompts, nums, strict=True)]
    assert together == alone


@torch.no_grad()
def test_drafting_goes_on_right_after_a_rollback(target):
    router, row = DraftRouter(target), make_row([11, 12, 13])
    router.draft([row], [5])
    for token in (20, 21, 22):
        row.append(token, Provenance.TARGET)
    router.keep([3])
    fresh = DraftRouter(target).draft([make_row([11, 12, 13, 20, 21, 22])], [5])
    assert router.draft([row], [5]).drafts == fresh.drafts


def greedy(model, prompt, num):
    return model.generate(torch.tensor([prompt]), max_new_tokens=num, do_sample=False)[0, len(prompt) :].tolist()


@torch.no_grad()
def test_rows_are_written_until_that_is_enough_and_then_go_on(target):
    prompts = [[11, 12, 13], [15], [16, 17]]
    rows, router = [make_row(prompt, index) for index, prompt in enumerate(prompts)], DraftRouter(target, num_rows=3)
    texts = router.write(rows, [6, 3, 0], lambda index, tokens: index == 0 and len(tokens) == 5)
    assert texts == [greedy(target, [11, 12, 13], 5), greedy(target, [15], 3), []]
    assert router.model.cached.lengths == [3 + 4, 1 + 3, 2]  # the longest row's last token has not been read
    for row, tokens in zip(rows, texts, strict=True):
        for token in tokens:
            row.append(token, Provenance.DRAFTED)
    router.keep([row.num_context - 1 for row in rows])
    again = router.write(rows, [2, 2, 2], lambda index, tokens: False)
    assert again == [greedy(target, row.context(0), 2) for row in rows]


@torch.no_grad()
def test_nothing_is_written_where_the_draft_has_no_score_for_any_token():
    processors = LogitsProcessorList([FromToken(20)])
    router = DraftRouter(ScriptedModel(count_up, vocab_size=20), vocab_size=VOCAB_SIZE)
    assert router.write([make_row([10, 11], processors=processors)], [3], lambda *_: False) == [[]]


class FromToken(LogitsProcessor):
    """Leaves only tokens from one on."""

    def __init__(self, first):
        self.first = first

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.arange(self.first), -torch.inf)


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2])
def test_sampled_drafts_come_with_the_distribution_they_were_drawn_from(num_rows):
    model = ScriptedModel(count_after({11: {20: 0.7, 21: 0.2, 22: 0.1}}))
    counts, router = torch.zeros(VOCAB_SIZE), None
    for _ in range(300):
        router = DraftRouter(model, num_rows=num_rows, do_sample=True)
        proposal = router.draft([make_row([10, 11], index) for index in range(num_rows)], [1] * num_rows)
        counts += torch.tensor([draft[0] for draft in proposal.drafts]).bincount(minlength=VOCAB_SIZE)
    # the chances are logits that are written down; what else has a logit of -30 weighs 1e-13 each
    torch.testing.assert_close(proposal.probs_BGV[0, 0, 20:23], torch.tensor([0.7, 0.2, 0.1]), atol=1e-6, rtol=0.0)
    share = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    assert chisquare(counts[20:23].double(), share * 300 * num_rows).pvalue > 1e-4


@torch.no_grad()
def test_distributions_of_ragged_drafts_are_aligned_to_the_right():
    router = DraftRouter(ScriptedModel(count_up), num_rows=2, do_sample=True)
    proposal = router.draft([make_row([10], 0), make_row([20], 1)], [3, 1])
    assert proposal.drafts == [[11, 12, 13], [21]]
    assert proposal.probs_BGV.argmax(-1).tolist() == [[11, 12, 13], [0, 0, 21]]
    assert proposal.probs_BGV[1, :2].sum() == 0


@torch.no_grad()
def test_processors_apply_to_drafts_position_by_position(target):
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8)])
    plain = target.generate(torch.tensor([[11, 12]]), max_new_tokens=8, do_sample=False, repetition_penalty=1.8)
    drafts = DraftRouter(target).draft([make_row([11, 12], processors=processors)], [8]).drafts
    assert drafts == [plain[0, 2:].tolist()]


@pytest.mark.parametrize("draft_size", [36, 48])
@pytest.mark.parametrize("do_sample", [False, True])
@torch.no_grad()
def test_a_padded_vocabulary_is_fitted_to_the_targets(draft_size, do_sample):
    model = build_model(vocab_size=draft_size)
    router = DraftRouter(model, vocab_size=VOCAB_SIZE, do_sample=do_sample)
    proposal = router.draft([make_row([11, 12])], [8])
    assert max(proposal.drafts[0]) < min(draft_size, VOCAB_SIZE)
    assert proposal.probs_BGV is None or proposal.probs_BGV.shape[-1] == VOCAB_SIZE


# Drafts that fall short of their target.

POSITIONS = {"gpt2": {"n_positions": 32}, "llama": {"max_position_embeddings": 32}}


def alone(model, row, num):
    return DraftRouter(model).draft([make_row(row.prompt + row.tokens)], [num]).drafts[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("num_context", range(26, 36))
def test_a_draft_ends_with_its_models_positions(kind, num_context):
    model, large = build_model(kind, **POSITIONS[kind]), build_model(kind)
    if kind == "gpt2":
        weight = torch.cat([model.transformer.wpe.weight] * 4)
        large.load_state_dict({**model.state_dict(), "transformer.wpe.weight": weight})
    context = [10 + index * 7 % 30 for index in range(num_context)]
    # the last token drafted is read by nobody
    expected = alone(large, make_row(context), 5)[: max(32 + 1 - num_context, 0)]
    assert DraftRouter(model).draft([make_row(context)], [5]).drafts == [expected]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("seed", range(6))
def test_rows_that_outgrow_a_model_leave_the_others_as_they_are(kind, seed):
    model, choose = build_model(kind, **POSITIONS[kind]), random.Random(seed)
    rows = [make_row([11] * choose.randint(1, 30), index) for index in range(3)]
    router = DraftRouter(model, num_rows=3)
    for _ in range(12):
        nums = [choose.randint(0, 5) for _ in rows]
        for row, num, drafts in zip(rows, nums, router.draft(rows, nums).drafts, strict=True):
            assert drafts in ([], alone(model, row, num))
            assert len(drafts) == num or row.num_context > 20
        for row in rows:
            row.truncate(max(len(row.tokens) - choose.choice([0, 0, 7]), 0))
        router.keep([row.num_context - 1 for row in rows])
        for row in rows:
            for _ in range(choose.randint(1, 5)):
                row.append(choose.randrange(10, 40), Provenance.TARGET)


@torch.no_grad()
def test_gpt_neo_which_finds_its_mask_by_column_drafts_uneven_rows_to_its_end():
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32}
    model = GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global"], 2]])).eval()
    router, rows = DraftRouter(model, num_rows=2), [make_row([11] * 20, 0), make_row([12, 13], 1)]
    nums = []
    for _ in range(10):
        nums.append([len(drafts) for drafts in router.draft(rows, [4, 4]).drafts])
        router.keep([row.num_context - 1 for row in rows])
        for row, num in zip(rows, (1, 4), strict=True):
            for _ in range(num):
                row.append(14, Provenance.TARGET)
    assert nums[0] == [4, 4]
    assert all(sum(pair) > 0 for pair in nums[:7])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_with_a_token_that_the_model_does_not_know_gets_no_drafts(kind):
    model = build_model(kind, vocab_size=36)
    router = DraftRouter(model, num_rows=3, vocab_size=VOCAB_SIZE)
    rows = [make_row([11, 39, 12], 0), make_row([13, 14], 1), make_row([15], 2)]
    assert router.draft(rows, [3, 3, 3]).drafts == [[], alone(model, rows[1], 3), alone(model, rows[2], 3)]
    rows[2].append(38, Provenance.TARGET)
    rows[1].append(16, Provenance.TARGET)
    router.keep([2, 2, 1])
    assert router.draft(rows, [3, 3, 3]).drafts == [[], alone(model, rows[1], 3), []]
    rows[2].truncate(0)
    rows[2].append(17, Provenance.TARGET)
    router.keep([2, 2, 1])
    router.select([1, 2])
    assert router.draft(rows[1:], [3, 3]).drafts == [alone(model, row, 3) for row in rows[1:]]


class OnlyFrom(LogitsProcessor):
    """Leaves the tokens from one on, as a forced end does."""

    def __init__(self, first):
        self.first = first

    def __call__(self, input_ids, scores):
        return torch.zeros_like(scores).index_fill(1, torch.arange(self.first), -torch.inf)


@torch.no_grad()
@pytest.mark.parametrize("costs", [None, DraftCosts(draft=0.01, verify=0.002)], ids=["constant", "adaptive"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_token_that_only_the_target_knows_is_never_drafted(costs, do_sample):
    router = DraftRouter(build_model(vocab_size=36), vocab_size=40, do_sample=do_sample, costs=costs, takes_trees=True)
    row = make_row([11, 12], processors=LogitsProcessorList([OnlyFrom(36)]))
    row.append(13, Provenance.TARGET)
    assert all(token < 36 for token in router.draft([row], [4]).drafts[0])


def break_logits(model, values, rows=slice(None)):
    def damage(module, args, output):
        output = output.clone()
        output[rows] = torch.tensor(values)[:, None].expand(-1, 20).flatten()[:40]
        return output

    model.lm_head.register_forward_hook(damage)
    return model


BROKEN = {"nan": [torch.nan, 1.0], "inf": [torch.inf, 1.0], "two": [torch.nan, -torch.inf], "none": [-torch.inf] * 2}


@torch.no_grad()
@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("costs", [None, DraftCosts(draft=0.01, verify=0.002)], ids=["constant", "adaptive"])
@pytest.mark.parametrize("takes_trees", [False, True])
def test_greedy_drafts_of_broken_logits_are_tokens_of_the_vocabulary(values, costs, takes_trees):
    router = DraftRouter(
        break_logits(build_model(), values), vocab_size=VOCAB_SIZE, costs=costs, takes_trees=takes_trees
    )
    row = make_row([11, 12])
    row.append(13, Provenance.TARGET)
    for _ in range(3):
        assert all(0 <= token < VOCAB_SIZE for token in router.draft([row], [4]).drafts[0])
        router.keep([2])


@torch.no_grad()
@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("costs", [None, DraftCosts(draft=0.01, verify=0.002)], ids=["constant", "adaptive"])
def test_of_broken_logits_nothing_is_sampled_and_other_rows_go_on(values, costs):
    model = break_logits(build_model(), values, rows=slice(0, 1))
    router = DraftRouter(model, num_rows=2, vocab_size=VOCAB_SIZE, do_sample=True, costs=costs)
    first, second = router.draft([make_row([11, 12], 0), make_row([13], 1)], [4, 4]).drafts
    assert first == []
    assert len(second) == 4 or costs


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_drafts_of_another_precision_are_sampled_in_float32(dtype):
    proposal = DraftRouter(build_model().to(dtype), do_sample=True).draft([make_row([11, 12])], [3])
    assert proposal.probs_BGV.dtype == torch.float32
    torch.testing.assert_close(proposal.probs_BGV.sum(-1), torch.ones(1, 3), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_draft_that_is_broken_off_leaves_no_trace(target, error):
    def fail(*_):
        raise error

    router, row = DraftRouter(target), make_row([11, 12, 13])
    router.draft([row], [2])
    router.keep([2])
    handle = target.model.layers[1].register_forward_pre_hook(fail)  # the first layer's cache has grown by then
    with pytest.raises(error):
        router.draft([row], [2])
    handle.remove()
    assert router.draft([row], [4]).drafts == [alone(target, row, 4)]


@torch.no_grad()
def test_a_model_samples_a_segment_only_where_it_fits():
    router = DraftRouter(build_model(vocab_size=36, max_position_embeddings=32), num_rows=2, vocab_size=VOCAB_SIZE)
    assert router.sampler(0, make_row([11] * 20), 13) is router.model.cached
    assert router.sampler(0, make_row([11] * 20), 14) is None
    assert router.sampler(1, make_row([11, 38]), 1) is None
