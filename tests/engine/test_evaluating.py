"""A call evaluates its models, and every module has its own mode again afterwards."""

import threading

import pytest
import torch
from torch import nn

from safespec_hf.engine.evaluating import evaluating


def build():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout())
    model[2].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_modes_are_those_of_evaluation_inside_and_as_before_afterwards():
    model = build()
    before = modes(model)
    with evaluating([model]):
        assert not any(modes(model))
    assert modes(model) == before == [True, True, True, False]


def test_an_exception_restores_the_modes_too():
    model = build()
    with pytest.raises(KeyboardInterrupt), evaluating([model]):
        raise KeyboardInterrupt
    assert modes(model) == [True, True, True, False]


def test_two_calls_that_overlap_both_evaluate():
    model, inside, leave = build(), threading.Event(), threading.Event()

    def first():
        with evaluating([model]):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with evaluating([model]):
        leave.set()
        thread.join(10)
        assert torch.equal(model[0](torch.ones(50)), torch.ones(50))
    assert modes(model) == [True, True, True, False]
