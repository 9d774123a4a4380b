"""Candidates are scored while they are sampled as they would be afterwards, and end once they can't be chosen."""

import sys

import pytest
import torch
from scripted import ScriptedModel, count_after, probe
from tiny import VOCAB_SIZE, build_head, build_model, make_row
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safespec_hf import SafeSpecLogitsProcessor
from safespec_hf.decoding.candidate_scores import CandidateScores
from safespec_hf.decoding.monitor import RiskMonitor
from safespec_hf.decoding.sampling import sample_segments
from safespec_hf.engine.cache import BlockOutput, CachedModel

PROMPT = [11, 12, 13]
# The same float32 sums in another order, of logits of about 10 and states of about 5: 1e-5 is seen.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def sample(model, head, num, judge, newline_ids=frozenset(), prompt=PROMPT, max_tokens=6, draft_layers=()):
    row = make_row(prompt, newline_ids=newline_ids)
    monitor = RiskMonitor(head)
    cached = CachedModel(model, 1, [*monitor.layers, *draft_layers])
    cached.forward([prompt[:1]], 1)
    scores = CandidateScores(row, monitor, head.config.risk_threshold)
    segments, fork = sample_segments(
        cached.fork(0, 1),
        row,
        num_segments=num,
        max_tokens=max_tokens,
        end_ids=frozenset({33}),
        steer=SafeSpecLogitsProcessor(len(prompt), []),
        generator=torch.Generator().manual_seed(0),
        judge=lambda *args: judge(scores, *args),
    )
    return segments, scores, fork, cached


@pytest.mark.parametrize("pooling", ["last", "mean", "ewma", "mean+ewma+last"])
@torch.no_grad()
def test_watched_candidates_get_the_scores_of_candidates_read_at_once(pooling):
    model = build_model()
    head = build_head(model, pooling=pooling)

    def watch(scores, segments, is_open, output):
        scores.watch(segments, is_open, output)
        return list(is_open)  # however bad: this is about the scores

    segments, watched, fork, cached = sample(model, head, 5, watch, frozenset(range(0, 40, 3)))
    assert len({len(tokens) for tokens in segments}) > 1  # or else this would not show who is scored when
    read = CandidateScores(watched.row, watched.monitor, 1.0)
    again = cached.fork(0, 5)
    read.read(segments, 2, again.forward([PROMPT[1:] + tokens for tokens in segments], 7))
    for one, other in (
        (watched.risks, read.risks),
        (watched.log_probs, read.log_probs),
        (watched.worst(), read.worst()),
    ):
        assert len(one) == 5
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), **TOLERANCE)
    for k in range(5):
        torch.testing.assert_close(watched.pooled(k), read.pooled(k), **TOLERANCE)
        torch.testing.assert_close(watched.states(k), read.states(k), **TOLERANCE)
    assert fork.lengths == [3 + max(map(len, segments))] * 5  # all that was sampled has been read


# After 10 comes one of three numbers: 20 counts on and is fairly safe, 25 becomes unsafe at 27, and 30 ends at 33.
TURNS = {10: {20: 0.3, 25: 0.3, 30: 0.4}}


@torch.no_grad()
def watch_numbers(risks, num=24):
    model = ScriptedModel(count_after(TURNS), risks)
    segments, scores, *_ = sample(model, probe(model), num, CandidateScores.watch, prompt=[9, 10], max_tokens=5)
    return {tokens[0]: tokens for tokens in segments}, dict(zip([s[0] for s in segments], scores.worst(), strict=True))


def test_an_unsafe_candidate_ends_at_its_unsafe_token():
    segments, _ = watch_numbers({27: 0.8, 30: 0.3, 31: 0.3, 32: 0.3})
    assert segments[25] == [25, 26, 27]


def test_a_candidate_ends_once_it_is_worse_than_one_that_has_ended():
    segments, worst = watch_numbers({24: 0.4, 20: 0.25, 30: 0.2, 31: 0.2, 32: 0.2})
    assert segments[30] == [30, 31, 32, 33]
    assert segments[20] == [20, 21, 22, 23]
    assert worst[20] == pytest.approx(0.25, abs=1e-6)


def test_a_candidate_that_may_still_be_the_safest_goes_on():
    segments, _ = watch_numbers({30: 0.3, 31: 0.3, 32: 0.3, 33: 0.3})
    assert segments[20] == [20, 21, 22, 23, 24]


def test_when_all_are_unsafe_none_goes_on():
    segments, worst = watch_numbers(dict.fromkeys((20, 25, 30), 0.9) | {21: float("nan")})
    assert {tuple(tokens) for tokens in segments.values()} == {(20,), (25,), (30,)}
    assert all(risk >= 0.5 for risk in worst.values())


@pytest.mark.parametrize("span", ["segment", "answer"])
@torch.no_grad()
def test_one_more_token_costs_the_same_however_long_candidates_are(target, span):
    head = build_head(target, pooling="mean+ewma", span=span)
    scores = CandidateScores(make_row(PROMPT), RiskMonitor(head), threshold=2.0)
    segments, costs = [[], [], []], []
    for step in range(120):
        output = BlockOutput(torch.randn(3, 1, VOCAB_SIZE), torch.randn(3, 1, 32))
        with Work() as work:
            scores.watch(segments, [True] * 3, output)
        costs.append((work.num_calls, work.num_values))
        segments = [[*tokens, 20 + step % 3] for tokens in segments]
    assert max(costs[100:]) <= max(costs[5:25])  # calls of functions, Python's included, and values of tensors


class Work(TorchDispatchMode):
    """Counts what is done inside."""

    def __enter__(self):
        self.num_calls = self.num_values = 0
        sys.setprofile(self._note)
        return super().__enter__()

    def __exit__(self, *error):
        sys.setprofile(None)
        return super().__exit__(*error)

    def _note(self, frame, event, arg):
        self.num_calls += event in ("call", "c_call")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_values += sum(one.numel() for one in tree_leaves(result) if isinstance(one, torch.Tensor))
        return result


@torch.no_grad()
def test_states_for_a_draft_head_come_after_those_of_the_safety_head():
    model = build_model()
    _, scores, *_ = sample(model, build_head(model), 2, CandidateScores.watch, draft_layers=(0, 1, 2))
    assert scores.states(0).shape[1] == 4 * 32
    assert scores.monitor.num_tapped == 32
