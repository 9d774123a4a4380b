"""A row's bookkeeping: segments, rollback, what is final, and what the caller sees."""

import math
import random

import pytest
import torch

from safespec_hf import Provenance, SafeSpecConfig
from safespec_hf.answer.rows import Row, pad_rows

PROMPT = [10, 11]
NEWLINE = 7


def make_row(max_new_tokens=40, prompt=PROMPT, padding=0, **policy):
    ids = torch.tensor([0] * padding + prompt)
    return Row(
        0,
        ids,
        torch.arange(len(ids)) >= padding,
        max_new_tokens=max_new_tokens,
        policy=SafeSpecConfig(**{"max_segment_tokens": 4, "min_segment_tokens": 2, **policy}),
        newline_ids=frozenset({NEWLINE}),
    )


def extend(row, tokens, origin=Provenance.TARGET, settled=True):
    for token in tokens:
        row.append(token, origin)
    if settled and row.num_unscored():
        num = row.num_unscored()
        row.settle([0.1] * num, torch.arange(float(num))[:, None])
    return row


@pytest.mark.parametrize(
    ("tokens", "starts", "num_open"),
    [
        ([20], [0], 1),
        ([20] * 4, [0, 4], 0),
        ([20] * 9, [0, 4, 8], 1),
        ([20, NEWLINE, 20], [0, 2], 1),
        ([NEWLINE, NEWLINE, 20], [0, 2], 1),
        ([20, 20, 20, NEWLINE], [0, 4], 0),
    ],
)
def test_segments_start_after_four_tokens_or_a_newline(tokens, starts, num_open):
    row = extend(make_row(), tokens)
    assert (row.segments.starts, row.segments.num_open) == (starts, num_open)


def test_counts_ahead_are_the_counts_that_appending_gives():
    row, ahead = extend(make_row(), [20, 20, 20]), [20, NEWLINE, 20, NEWLINE, 20]
    counts = row.segments.counts_ahead(ahead)
    assert extend(row, ahead).segments.counts[3:] == counts


@pytest.mark.parametrize(("rollback_segments", "kept"), [(0, 8), (1, 4), (2, 0), (5, 0)])
def test_a_rollback_gives_up_the_open_segment_and_so_many_before_it(rollback_segments, kept):
    row = extend(make_row(rollback_segments=rollback_segments), range(20, 30))
    assert row.roll_back(flagged=9) == (kept, 10 - kept)
    assert row.tokens == list(range(20, 20 + kept))
    assert (row.num_settled, row.num_visible, row.segments.num_open) == (kept, kept, 0)


@pytest.mark.parametrize("rollback_segments", [0, 1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_a_rollback_is_as_if_the_tokens_had_never_been_added(rollback_segments, seed):
    choose = random.Random(seed)
    tokens = [choose.choice([NEWLINE, 20, 21]) for _ in range(20)]
    row = extend(make_row(rollback_segments=rollback_segments), tokens)
    kept, _ = row.roll_back(choose.randrange(20))
    fresh = extend(make_row(rollback_segments=rollback_segments), tokens[:kept])
    for name in ("tokens", "origins", "risks", "num_settled", "num_visible"):
        assert getattr(row, name) == getattr(fresh, name), name
    assert row.visible_ids().tolist() == fresh.visible_ids().tolist()
    assert row.pooled.num_tokens == kept


@pytest.mark.parametrize("rollback_segments", [0, 1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_no_later_flag_takes_back_a_final_token(rollback_segments, seed):
    choose = random.Random(seed)
    row, final = make_row(400, rollback_segments=rollback_segments), []
    for _ in range(40):
        extend(row, [choose.choice([NEWLINE, *range(20, 30)]) for _ in range(choose.randint(1, 4))], settled=False)
        num_safe = choose.randint(0, row.num_unscored())
        row.settle([0.1] * num_safe, torch.zeros(num_safe, 1))
        if choose.random() < 0.3 and row.num_unscored():
            row.roll_back(row.num_settled)
            if choose.random() < 0.5:
                extend(row, [4, 5], Provenance.REFLECTION)
        else:
            row.finalize()
        assert row.tokens[: len(final)] == final
        final = row.tokens[: row.num_final]


def test_final_waits_for_tokens_whose_risk_is_unknown():
    row = extend(make_row(rollback_segments=0), range(20, 23))
    extend(row, range(23, 29), settled=False)
    row.finalize()
    assert row.num_final == 0  # the oldest token that waits is in the first segment
    row.settle([0.1] * 2, torch.zeros(2, 1))
    row.finalize()
    assert row.num_final == 4


@pytest.mark.parametrize(("rollback_segments", "num_final"), [(0, 12), (1, 8), (2, 4), (3, 0)])
def test_so_many_committed_segments_are_held_back(rollback_segments, num_final):
    row = extend(make_row(rollback_segments=rollback_segments), range(20, 34))
    row.finalize()
    assert row.num_final == num_final


def test_the_prompt_is_never_rolled_back():
    row = extend(make_row(rollback_segments=9), range(20, 23))
    row.roll_back(0)
    assert row.context(0) == PROMPT


def test_padding_is_not_context_but_stays_in_front_of_what_is_visible():
    row = extend(make_row(padding=3), [20])
    assert row.context(0) == [*PROMPT, 20]
    assert row.visible_ids([21]).tolist() == [[0, 0, 0, *PROMPT, 20, 21]]


@pytest.mark.parametrize("start", range(5))
def test_context_is_prompt_then_answer_from_any_index(start):
    assert extend(make_row(), [20, 21]).context(start) == [*PROMPT, 20, 21][start:]


def test_the_model_reads_a_reflection_that_the_caller_does_not_see():
    row = extend(extend(make_row(), [4, 5], Provenance.REFLECTION), [20])
    assert row.context(0) == [*PROMPT, 4, 5, 20]
    assert row.visible_ids().tolist() == [[*PROMPT, 20]]
    assert (row.visible(), row.num_visible, row.room) == ([2], 1, 39)


def test_a_kept_reflection_is_visible_and_takes_room():
    row = extend(extend(make_row(keep_reflection=True), [4, 5], Provenance.REFLECTION), [20])
    assert row.visible_ids().tolist() == [[*PROMPT, 4, 5, 20]]
    assert (row.visible(), row.num_visible, row.room) == ([0, 1, 2], 3, 37)


def test_a_reflection_has_no_risk_and_counts_in_no_segment():
    row = extend(extend(make_row(), [20, 21, 22, 23]), [4, NEWLINE], Provenance.REFLECTION)
    assert (row.num_unscored(), row.num_scored(), row.segments.num_open) == (0, 4, 0)
    assert extend(row, [24]).segments.counts[-1] == 0
    assert [math.isnan(risk) for risk in row.risks] == [False] * 4 + [True] * 2 + [False]


@pytest.mark.parametrize("keep_reflection", [False, True])
def test_rolling_back_over_a_reflection_removes_it(keep_reflection):
    row = extend(make_row(rollback_segments=0, keep_reflection=keep_reflection), range(20, 24))
    extend(extend(row, [4, 5], Provenance.REFLECTION), [30, 31])
    assert row.roll_back(flagged=7) == (4, 2)
    assert row.visible_ids().tolist() == [[*PROMPT, 20, 21, 22, 23]]
    assert row.num_scored() == row.num_settled == row.pooled.num_tokens == 4


def test_num_scored_leaves_out_inserted_text_before_any_index():
    row = extend(extend(extend(make_row(), [20]), [4, 5], Provenance.REFLECTION), [21, 22])
    assert [row.num_scored(end) for end in range(6)] == [0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("keep_reflection", [False, True])
def test_the_buffer_holds_the_visible_tokens_after_any_history(seed, keep_reflection):
    choose, row = random.Random(seed), make_row(400, keep_reflection=keep_reflection)
    for _ in range(30):
        origin = choose.choice([Provenance.TARGET, Provenance.DRAFTED, Provenance.REFLECTION])
        extend(row, [choose.randrange(40) for _ in range(choose.randint(1, 5))], origin)
        if choose.random() < 0.4:
            row.truncate(choose.randint(row.num_final, len(row.tokens)))
        shown = [row.tokens[index] for index in row.visible()]
        assert row.visible_ids().tolist() == [PROMPT + shown]
        assert row.room == 400 - len(shown)


def test_pad_rows_marks_padding_and_inserted_text():
    short, long = extend(make_row(), [20]), extend(make_row(keep_reflection=True), [4], Provenance.REFLECTION)
    tokens, risks, provenance = pad_rows([short, extend(long, [21])], 39, torch.device("cpu"))
    assert tokens.tolist() == [[20, 39], [4, 21]]
    assert risks.isnan().tolist() == [[False, True], [True, False]]
    assert provenance.tolist() == [[Provenance.TARGET, -1], [Provenance.REFLECTION, Provenance.TARGET]]
