"""Columns against the obvious reference: for each row the list of the columns that its tokens are in."""

import random

import numpy as np
import pytest

from safespec_hf.engine.columns import Columns, align_blocks, right_ends


def check(columns, rows):
    """`rows` says for each row which token numbers it holds; each column of a row must hold the right one."""
    assert columns.lengths == [len(row) for row in rows]
    assert columns.used_BL.shape == (len(rows), columns.num)
    assert columns.used_BL.sum(axis=1).tolist() == columns.lengths
    assert columns.is_full == bool(columns.used_BL.all())


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_tokens_are_found_again_after_any_history(num_rows, seed):
    choose, columns = random.Random(seed), Columns(num_rows)
    held = np.zeros((num_rows, 0), dtype=int)  # what a cache would hold
    rows = [[] for _ in range(num_rows)]
    for step in range(40):
        gather = columns.close(5, 2**31, has_windows=seed % 2 == 0)
        held = held if gather is None else np.take_along_axis(held, gather, axis=1)
        blocks = [[100 * step + index for index in range(choose.randint(1, 5))] for _ in rows]
        ids, added = align_blocks(blocks, to_left=seed % 2 == 0)
        positions = columns.extend(added)
        held = np.concatenate([held, ids], axis=1)
        rows = [row + block for row, block in zip(rows, blocks, strict=True)]
        lasts = [row[-1] for row in positions.tolist()] if isinstance(added, tuple) else None
        assert lasts is None or lasts == [len(row) - 1 for row in rows]
        lengths = [choose.randint(max(len(row) - 4, 0), len(row)) for row in rows]
        held = held[:, : held.shape[1] - columns.keep(lengths)]
        rows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        check(columns, rows)
        assert [held[row, columns.of(row)].tolist() for row in range(num_rows)] == rows
        assert num_rows > 1 or columns.is_full


def test_a_tree_sees_its_path_only():
    columns = Columns(1)
    columns.extend((1, 2))
    positions = columns.extend((1, 4))
    mask = columns.tree_mask([[-1, 0, -1]], positions)
    assert positions.tolist() == [[2, 3, 4, 3]]
    assert mask[0].astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize(("path", "moves"), [([0, 1], None), ([2], ([5], [3])), ([], None)])
def test_only_states_that_lie_elsewhere_are_moved(path, moves):
    columns = Columns(1)
    columns.extend((1, 6))
    assert columns.keep_path(0, 3, path) == moves
    columns.keep(columns.lengths)
    assert columns.num == 3 + len(path)


def test_holes_are_closed_before_there_are_more_columns_than_there_may_be():
    columns = Columns(2)
    columns.extend(align_blocks([[1] * 8, [2]], to_left=False)[1])
    columns.extend(align_blocks([[1], [2] * 6], to_left=False)[1])
    assert columns.close(2, 16, has_windows=False) is None
    assert columns.close(3, 16, has_windows=False).shape == (2, 9)
    assert columns.num == 9


def test_a_row_laid_anew_ends_in_the_last_column():
    columns = Columns(2)
    columns.extend((2, 3))
    assert columns.put(1, 5) == 2
    assert columns.used_BL.astype(int).tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_blocks_padded_on_the_right_are_read_from_their_ends():
    added = align_blocks([[1, 2, 3], [4]], to_left=True)[1]
    assert right_ends(added).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_a_row_without_a_token_is_an_error():
    with pytest.raises(AssertionError, match="every row needs a token"):
        align_blocks([[1], []], to_left=False)
