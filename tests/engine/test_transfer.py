"""What is packed for the host arrives there as it was, to the last bit."""

import pytest
import torch

from safespec_hf.engine.transfer import pack, to_host, unpack

PARTS = [
    torch.tensor([[2**24 + 1, 2**53 + 1], [-1, 0]]),
    torch.tensor([0.1, float("nan"), float("inf"), -0.0]),
    torch.tensor([True, False]),
    torch.tensor([]),
    torch.tensor([0.5], dtype=torch.bfloat16),
]


@pytest.mark.parametrize("copy", [to_host, lambda parts: unpack(pack(parts), parts)])
def test_values_arrive_bit_by_bit(copy):
    for sent, got in zip(PARTS, copy(PARTS), strict=True):
        assert got.shape == sent.shape
        torch.testing.assert_close(got, sent.to(got.dtype), rtol=0.0, atol=0.0, equal_nan=True)


def test_what_is_sent_is_one_tensor():
    packed = pack(PARTS)
    assert (packed.ndim, packed.dtype, packed.numel()) == (1, torch.int64, sum(part.numel() for part in PARTS))
