"""Every layout gives the products of the matrix, or is not used for it."""

import pytest
import torch
from torch.nn import functional as F

from safespec_hf.engine import products
from safespec_hf.engine.products import (
    LAYOUTS,
    PLAIN,
    WIDTHS,
    Layout,
    fastest_layouts,
    multiply_halves,
    pack_halves,
    usual_layouts,
)

DTYPES = torch.float32, torch.bfloat16, torch.float16
CASES = [
    (name, dtype)
    for name in LAYOUTS
    for dtype in DTYPES
    if LAYOUTS[name].pack(torch.ones(2, 2, dtype=dtype)) is not None
]
halves = pytest.mark.skipif(pack_halves(torch.ones(2, 2)) is None, reason="this torch was built without them")


@pytest.mark.parametrize("num_inputs", [1, 5, 33])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_are_those_of_the_matrix(num_inputs, has_bias, name, dtype):
    weight, inputs = torch.randn(48, 40).bfloat16().to(dtype), torch.randn(2, num_inputs, 40).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    # all round a float32 sum of 40 terms once: at most one step of 16-bit floats apart; float32 sums about 1e-6
    atol, rtol = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (0, 2**-7), torch.float16: (2**-10, 2**-9)}[dtype]
    found = LAYOUTS[name].multiply(inputs, LAYOUTS[name].pack(weight), bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.linear(inputs, weight, bias), atol=atol, rtol=rtol)


@pytest.mark.skipif(LAYOUTS["blocks"].pack(torch.ones(2, 2)) is None, reason="this torch was built without them")
def test_prompts_of_all_lengths_take_few_kernels(monkeypatch):
    read, multiply = set(), products.multiply_by_blocks

    def note(inputs, packed, bias):
        read.add(inputs.numel() // inputs.shape[-1])
        return multiply(inputs, packed, bias)

    monkeypatch.setattr(products, "multiply_by_blocks", note)
    weight, bias = torch.randn(8, 4), torch.randn(8)
    packed = products.pack_blocks(weight)
    for num in [*range(300), 1000, 1500]:
        inputs = torch.randn(1, num, 4)
        found = products.multiply_blocks(inputs, packed, bias)
        assert found.shape == (1, num, 8)
        torch.testing.assert_close(found, F.linear(inputs, weight, bias), atol=1e-5, rtol=1e-5)
        assert num <= products.round_rows(num) <= max(num, 1.125 * num)
    assert len(read) < 64
    assert {*range(1, 32)} <= read


@halves
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-12, 1.0, 2.0**12, 2.0**40])
def test_halves_hold_every_number_of_bfloat16_however_large_or_small_they_are(scale):
    weight = (torch.randn(64, 64).clamp(-3, 3).bfloat16() * scale).float()
    torch.testing.assert_close(
        multiply_halves(torch.eye(64), pack_halves(weight), None), weight.T, rtol=0, atol=2.0**-36 * scale
    )


@halves
@pytest.mark.parametrize(
    "weight",
    [
        torch.full((2, 2), 1 / 3),
        torch.tensor([[1.0, 1.0 + 2**-20]]),
        torch.tensor([[float("nan"), 1.0]]),
        torch.tensor([[float("inf"), 1.0]]),
        torch.tensor([[1e30, 1e-3 + 1e-9]]),
        torch.ones(2, 2, dtype=torch.float64),
        torch.ones(2, 2, 2),
        torch.ones(2, 2, device="meta"),
    ],
    ids=str,
)
def test_halves_are_refused_where_they_would_lose_something(weight):
    assert pack_halves(weight) is None


@halves
@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2, 3), -65504.0)], ids=str)
def test_halves_of_odd_matrices(weight):
    inputs = torch.ones(2, weight.shape[1])
    torch.testing.assert_close(multiply_halves(inputs, pack_halves(weight), None), F.linear(inputs, weight))


@pytest.fixture
def clock(monkeypatch):
    """Seconds pass only where a product takes some."""
    now = [0.0]
    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    return now


def taking(clock, seconds):
    """A layout whose products take so long, by the number of tokens."""

    def multiply(inputs, packed, bias):
        clock[0] += seconds[len(inputs)]
        return F.linear(inputs, packed, bias)

    return Layout(lambda weight: weight, multiply, lambda weight: weight.numel())


def test_each_width_gets_the_layout_that_is_fastest_for_it(monkeypatch, clock):
    narrow, wide = {1: 0.001, 4: 0.01, 16: 0.01, 64: 0.1}, {1: 0.01, 4: 0.001, 16: 0.001, 64: 0.01}
    monkeypatch.setattr(products, "LAYOUTS", {"narrow": taking(clock, narrow), "wide": taking(clock, wide)})
    monkeypatch.setattr(products, "_plain", lambda *_: clock.__setitem__(0, clock[0] + 0.05))
    assert fastest_layouts([torch.ones(2, 2)]) == ("narrow", "wide", "wide", "wide")


def test_what_saves_next_to_nothing_takes_no_second_copy(monkeypatch, clock):
    first, second = dict.fromkeys(WIDTHS, 0.02), {1: 0.0199, 4: 0.024, 16: 0.024, 64: 0.024}
    monkeypatch.setattr(products, "LAYOUTS", {"first": taking(clock, first), "second": taking(clock, second)})
    monkeypatch.setattr(products, "_plain", lambda *_: clock.__setitem__(0, clock[0] + 0.05))
    assert set(fastest_layouts([torch.ones(2, 2)])) == {"first"}


def test_a_layout_that_can_not_hold_the_weights_is_not_chosen(monkeypatch):
    monkeypatch.setattr(products, "LAYOUTS", {"never": Layout(lambda _: None, F.linear, lambda _: 0)})
    assert fastest_layouts([torch.ones(2, 2)]) == (PLAIN,) * len(WIDTHS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_usual_layout_is_one_that_holds_weights_of_that_format(dtype):
    for name in set(usual_layouts(dtype)) - {PLAIN}:
        assert LAYOUTS[name].pack(torch.ones(4, 4, dtype=dtype)) is not None
