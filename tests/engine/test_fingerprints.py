"""A fingerprint of weights changes with whatever changes in them."""

from itertools import combinations

import pytest
import torch

from safespec_hf.engine import fingerprints as fingerprints_module
from safespec_hf.engine.fingerprints import fingerprint

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
pytestmark = pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)


def draw(dtype, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def flipped(weight, places, bit):
    other = weight.clone()
    values = other.view(-1).view(INTEGERS[weight.dtype])
    values[list(places)] ^= torch.tensor(1).bitwise_left_shift(bit).to(values.dtype)
    return other


def test_any_bit_counts(dtype):
    weight = draw(dtype, 3, 7)
    bits = [(place, bit) for place in range(21) for bit in range(8 * weight.element_size())]
    found = {fingerprint(flipped(weight, [place], bit)) for place, bit in bits}
    assert len(found | {fingerprint(weight)}) == len(bits) + 1


@pytest.mark.parametrize("places", [range(24), range(0, 9000, 331)], ids=["side by side", "far apart"])
def test_any_two_signs_count(dtype, places):
    weight = draw(dtype, 9001)
    before, bit = fingerprint(weight), 8 * weight.element_size() - 1
    assert all(fingerprint(flipped(weight, pair, bit)) != before for pair in combinations(places, 2))


@pytest.mark.parametrize("shape", [(32, 32), (700, 1024), (33, 31)], ids=str)
def test_signs_of_a_row_or_a_column_count(dtype, shape):
    weight = draw(dtype, *shape)
    found = {fingerprint(weight)}
    for column in range(8):
        for part in (weight[:, column], weight[column], weight[:, column : column + 8 : 4]):
            part.neg_()
            found.add(fingerprint(weight))
            part.neg_()
    assert len(found) == 1 + 8 * 3


@pytest.mark.parametrize("factor", [-1, 2])
def test_a_column_that_is_doubled_or_turned_around_counts(dtype, factor):
    weight = draw(dtype, 64, 64)
    before = fingerprint(weight)
    for column in range(64):
        other = weight.clone()
        other[:, column] *= factor
        assert fingerprint(other) != before


def test_it_depends_neither_on_the_blocks_nor_on_where_the_weight_begins(dtype, monkeypatch):
    weight = draw(dtype, 3, 3000)
    before = fingerprint(weight)
    assert fingerprint(torch.cat([weight.new_zeros(1), weight.view(-1)])[1:].view(3, 3000)) == before
    monkeypatch.setattr(fingerprints_module, "_NUM_ROWS", 2)
    assert fingerprint(weight) == before
