"""Acceptance, by hand on three and four tokens, and by frequency against the exact target distribution."""

import math

import pytest
import torch
from scipy.stats import chisquare

from safespec_hf.decoding.verification import mean_log_prob, verify_sampled
from safespec_hf.engine.token_tree import accept_matching, chain_parents, is_chain, path_to

NUM_DRAWS = 40_000
# A right sampler fails such a test once in ten thousand seeds, and these seeds are fixed: it passes for ever or never.
P_VALUE = 1e-4
P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.25, 0.5]])  # the target at three positions
Q = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])  # the draft at the first two


def p_value(tokens, p_V):
    """Of the hypothesis that these tokens are distributed as `p_V`."""
    counts, p_V = tokens.bincount(minlength=p_V.numel()).double(), p_V.double() / p_V.double().sum()
    return chisquare(counts, p_V * counts.sum()).pvalue


def one_hot(tokens, num=4):
    return torch.eye(num)[torch.tensor(tokens)]


@pytest.mark.parametrize(
    ("drafts", "num_accepted", "next_token"),
    [
        ([1, 2, 3], 3, 0),
        ([1, 2, 0], 2, 3),
        ([1, 0, 3], 1, 2),
        ([0, 2, 3], 0, 1),
        ([0, 0, 0], 0, 1),
    ],
)
def test_greedy_acceptance_stops_at_the_first_difference(drafts, num_accepted, next_token):
    assert accept_matching([1, 2, 3, 0], drafts, chain_parents(3)) == (list(range(num_accepted)), next_token)


def test_without_drafts_the_next_token_is_the_targets():
    assert accept_matching([2], [], []) == ([], 2)
    verified = verify_sampled(one_hot([2]).mul(1e4)[None], torch.zeros(1, 0, dtype=torch.long), torch.tensor([0]))
    assert [part.tolist() for part in verified] == [[0], [2]]


# a tree: 5 or 6 after the context, 7 or 8 after the 5, 9 after the 6
TREE, PARENTS = [5, 6, 7, 8, 9], [-1, -1, 0, 0, 1]


@pytest.mark.parametrize(
    ("choices", "path", "next_token"),
    [
        ([5, 8, 0, 0, 1, 0], [0, 3], 1),
        ([5, 7, 0, 2, 0, 0], [0, 2], 2),
        ([5, 9, 0, 0, 0, 0], [0], 9),
        ([6, 0, 9, 0, 0, 3], [1, 4], 3),
        ([7, 8, 9, 0, 0, 0], [], 7),
    ],
)
def test_greedy_acceptance_follows_the_branch_that_the_target_takes(choices, path, next_token):
    assert accept_matching(choices, TREE, PARENTS) == (path, next_token)
    assert all(path_to(draft, PARENTS) == path[: index + 1] for index, draft in enumerate(path))


def test_a_chain_is_the_tree_without_branches():
    assert is_chain(chain_parents(4))
    assert not is_chain(PARENTS)


@pytest.mark.parametrize("seed", range(20))
def test_sampling_without_a_choice_is_greedy_acceptance_row_by_row(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 5, (3,), generator=generator)
    scores_BTV = torch.randn(3, 5, 4, generator=generator)
    # half of the drafts are right, so that acceptance ends anywhere
    noise_BG = torch.randint(0, 4, (3, 4), generator=generator)
    is_right_BG = torch.rand(3, 4, generator=generator) < 0.5
    drafts_BG = torch.where(is_right_BG, scores_BTV[:, :-1].argmax(-1), noise_BG)
    # scores so far apart that sampling has no choice
    together = verify_sampled(scores_BTV * 1e6, drafts_BG, lengths)
    for row, length in enumerate(lengths.tolist()):
        choices, drafts = scores_BTV[row, 4 - length :].argmax(-1).tolist(), drafts_BG[row, 4 - length :].tolist()
        path, next_token = accept_matching(choices, drafts, chain_parents(length))
        assert [part[row].item() for part in together] == [len(path), next_token]


def test_a_draft_the_target_finds_at_least_as_likely_is_always_kept():
    p, q = torch.tensor([[[0.6, 0.4], [0.5, 0.5]]]).log(), torch.tensor([[[0.6, 0.4]]])
    for seed in range(200):
        verified = verify_sampled(p, torch.tensor([[0]]), torch.tensor([1]), q, torch.Generator().manual_seed(seed))
        assert verified.num_accepted_B.item() == 1


def test_a_draft_the_target_rules_out_is_never_kept():
    p, q = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]]).log(), torch.tensor([[[0.6, 0.4]]])
    for seed in range(200):
        verified = verify_sampled(p, torch.tensor([[0]]), torch.tensor([1]), q, torch.Generator().manual_seed(seed))
        assert (verified.num_accepted_B.item(), verified.next_token_B.item()) == (0, 1)


def test_a_rejected_draft_is_replaced_from_the_residual():
    # p - q = (.3, 0, -.3): after a rejection of token 2 the only choice left is token 0
    drafts = torch.full((2000, 1), 2)
    verified = verify_sampled(
        P[:2].log().expand(2000, 2, 3), drafts, torch.ones(2000, dtype=torch.long), Q[:1].expand(2000, 1, 3)
    )
    rejected = verified.next_token_B[verified.num_accepted_B == 0]
    assert rejected.numel() > 0
    assert rejected.unique().tolist() == [0]


def draw(num_drafts, one_hot_q, seed):
    """First and second tokens of many rounds with drafts from Q, right-aligned to two."""
    generator = torch.Generator().manual_seed(seed)
    scores = P[2 - num_drafts :].log().expand(NUM_DRAWS, num_drafts + 1, 3)
    q = Q[2 - num_drafts :].expand(NUM_DRAWS, num_drafts, 3)
    if one_hot_q:
        drafts = q.argmax(dim=-1)
    else:
        drafts = torch.multinomial(q.reshape(-1, 3), 1, generator=generator).view(NUM_DRAWS, num_drafts)
    lengths = torch.full((NUM_DRAWS,), num_drafts)
    verified = verify_sampled(scores, drafts, lengths, None if one_hot_q else q, generator)
    padded = torch.cat([drafts, torch.zeros(NUM_DRAWS, 1, dtype=torch.long)], dim=1)
    tokens = padded.scatter(1, verified.num_accepted_B[:, None], verified.next_token_B[:, None])
    return tokens, verified.num_accepted_B + 1


@pytest.mark.parametrize("one_hot_q", [False, True])
@pytest.mark.parametrize("num_drafts", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_token_is_distributed_as_the_target(num_drafts, one_hot_q, seed):
    tokens, _ = draw(num_drafts, one_hot_q, seed)
    assert p_value(tokens[:, 0], P[2 - num_drafts]) > P_VALUE


@pytest.mark.parametrize("one_hot_q", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_later_token_is_distributed_as_the_target(one_hot_q, seed):
    tokens, num_tokens = draw(2, one_hot_q, seed)
    for position in (1, 2):
        later = tokens[num_tokens > position, position]
        assert later.numel() > 500  # so many rounds come that far that a wrong distribution would show
        assert p_value(later, P[position]) > P_VALUE


def test_the_frequency_test_would_notice_the_drafts_distribution():
    tokens = torch.multinomial(Q[0], NUM_DRAWS, replacement=True)
    assert p_value(tokens, P[0]) < P_VALUE


def test_ragged_sampled_rows_are_distributed_as_the_target():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([1, 2]).repeat(NUM_DRAWS)
    drafts = torch.multinomial(Q.repeat(2 * NUM_DRAWS, 1), 1, generator=generator).view(-1, 2)
    scores, q = P.log().expand(2 * NUM_DRAWS, 3, 3), Q.expand(2 * NUM_DRAWS, 2, 3)
    verified = verify_sampled(scores, drafts, lengths, q, generator)
    for length, first in ((1, 1), (2, 0)):
        rows = lengths == length
        kept = verified.num_accepted_B[rows] > 0
        tokens = torch.where(kept, drafts[rows, first], verified.next_token_B[rows])
        assert p_value(tokens, P[first]) > P_VALUE


def test_a_seed_fixes_the_outcome():
    first, second = draw(2, False, 3), draw(2, False, 3)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(first[0], draw(2, False, 4)[0])


def test_equal_distributions_leave_no_residual_and_still_give_a_token():
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    verified = verify_sampled(p.log(), torch.tensor([[1]]), torch.tensor([1]), p[:, :1])
    assert verified.num_accepted_B.item() == 1
    assert verified.next_token_B.item() in (0, 1)


def test_mean_log_prob_is_that_of_the_last_tokens_only():
    logits = torch.tensor([[9.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)], [5.0, 5.0]])
    # the last two tokens have chances 3/4 and 1/4; a log of a float32 quotient is exact to 1e-6
    assert mean_log_prob(logits, [0, 0]) == pytest.approx((math.log(3 / 4) + math.log(1 / 4)) / 2, abs=1e-6)
