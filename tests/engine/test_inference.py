"""Inference mode is for plain weights only, and nothing of it stays in a model."""

import pytest
import torch
from tiny import build_head, build_model
from torch import nn

from safespec_hf import attach_safety_head
from safespec_hf.engine.inference import inference_mode


class Odd(torch.Tensor):
    """A tensor type of its own."""


class Table(nn.Module):
    """Keeps a table that it makes when it is needed, in a buffer or beside it."""

    def __init__(self, is_buffer):
        super().__init__()
        self.register_buffer("table", None) if is_buffer else setattr(self, "table", None)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self):
        self.table = torch.arange(3.0) if self.table is None else self.table
        return (self.table * self.weight).sum()


def test_plain_weights_run_in_inference_mode():
    with inference_mode([build_model()]):
        assert torch.is_inference_mode_enabled()
    assert not torch.is_inference_mode_enabled()


def test_other_weights_do_not(tokenizer):
    model = build_model()
    expected = model.generate(torch.tensor([[12, 18]]), max_new_tokens=8, do_sample=False)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(Odd))
    with inference_mode([build_model(), model]):
        assert not torch.is_inference_mode_enabled()
    answer = model.generate(torch.tensor([[12, 18]]), max_new_tokens=8, do_sample=False, safespec=True)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("is_buffer", [False, True])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_what_a_module_keeps_can_be_trained_with(is_buffer, error):
    module = Table(is_buffer)
    try:
        with inference_mode([nn.Sequential(module)]):
            module()
            assert module.table.is_inference() is not is_buffer  # a buffer is an ordinary one at once
            if error is not None:
                raise error
    except KeyboardInterrupt:
        pass
    module().backward()
    assert module.weight.grad.tolist() == [0.0, 1.0, 2.0]


def test_a_model_that_keeps_tensors_beside_its_buffers_runs_without_from_then_on():
    module = Table(is_buffer=False)
    for is_first in (True, False):
        with inference_mode([module]):
            assert torch.is_inference_mode_enabled() is is_first
            module()


def test_autocast_keeps_weights_that_it_cast_and_so_runs_without():
    model = build_model()
    with torch.autocast("cpu", torch.bfloat16), inference_mode([model]):
        assert not torch.is_inference_mode_enabled()
