"""Calls of one model at the same time: each is right, other uses of the model notice nothing, and nothing is left."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import build_head, build_model, perturb
from torch import nn

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.engine import packing
from safespec_hf.engine.inference import inference_mode
from safespec_hf.engine.packing import packed_weights
from safespec_hf.engine.sharing import Shared, ThreadSwitch

PROMPT = torch.tensor([[12, 18, 24, 13]])
ARGUMENTS = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def model(tokenizer):
    model = build_model()
    return attach_safety_head(model, build_head(model), tokenizer=tokenizer)


def aside(function):
    """What another thread finds."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def state_of(model):
    stored = [tensor for module in model.modules() for tensor in [*module._buffers.values(), *vars(module).values()]]
    tensors = [tensor for tensor in stored if isinstance(tensor, torch.Tensor)]
    patched = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return patched, model._compiled_call_impl, any(tensor.is_inference() for tensor in tensors)


def test_a_switch_is_each_threads_own_and_the_innermost_counts():
    switch = ThreadSwitch()
    with switch.turned(True):
        assert aside(lambda: switch.is_on) is False
        with switch.turned(False):
            assert switch.is_on is False
        assert switch.is_on is True
    assert switch.is_on is False


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_what_is_shared_stays_until_the_last_call_has_ended(first_ends_first):
    shared, log = Shared(), []
    calls = [shared.held({"it": lambda: log.append("on") or (lambda: log.append("off"))}) for _ in range(2)]
    for call in calls:
        call.__enter__()
    for call in calls if first_ends_first else calls[::-1]:
        assert log == ["on"]
        call.__exit__(None, None, None)
    assert log == ["on", "off"]


def test_a_switch_goes_back_after_an_interrupt():
    switch = ThreadSwitch()
    with pytest.raises(KeyboardInterrupt), switch.turned(True):
        raise KeyboardInterrupt
    assert switch.is_on is False


def test_what_was_put_on_before_one_that_fails_is_taken_off():
    shared, log = Shared(), []
    things = {"it": lambda: lambda: log.append("off"), "bad": lambda: {}["missing"]}
    with pytest.raises(KeyError), shared.held(things):
        pass
    assert log == ["off"]


def test_many_threads_answer_as_one_and_leave_the_model_clean(model):
    expected = model.generate(PROMPT, **ARGUMENTS)
    draft = perturb(build_model())

    def answer(number):
        policy = SafeSpecConfig(pack_weights=number % 3 > 0)
        return model.generate(PROMPT, safespec=policy, assistant_model=draft if number % 2 else None, **ARGUMENTS)

    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(answer, range(24)))
    assert state_of(model) == ([], None, False)


def test_a_training_forward_beside_a_guarded_call_has_its_gradients(model):
    def train():
        model.zero_grad()
        loss = model(PROMPT, labels=PROMPT).loss
        loss.backward()
        return [weight.grad.clone() for weight in model.parameters()]

    expected = train()
    with packed_weights([model], True), inference_mode([model]):
        with torch.no_grad():
            model(PROMPT)
        found = aside(train)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_packed_weights_are_for_the_thread_that_wants_them(model, monkeypatch):
    monkeypatch.setattr(packing, "_choose", lambda *_: pytest.fail("packed"))
    with packed_weights([model], True):
        aside(lambda: model(PROMPT))
        with packed_weights([model], False):
            model(PROMPT)


class Table(nn.Module):
    """Makes a longer table when it needs one, as some position embeddings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(2.0), persistent=False)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, length):
        if length > len(self.table):
            self.table = torch.arange(float(length))
        return (self.table[:length] * self.weight).sum()


def test_what_a_guarded_call_leaves_in_buffers_can_be_trained_with_at_once():
    module = Table()
    with inference_mode([module]):
        module(5)
        assert torch.is_inference_mode_enabled()
        aside(lambda: module(4).backward())
    assert module.weight.grad.item() == 6


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_made_while_a_call_runs_has_its_own_weights(clone):
    layer = nn.Sequential(nn.Linear(3, 2))
    with packed_weights([layer], True):
        other = clone(layer)
    nn.init.zeros_(other[0].weight)
    assert torch.equal(other(torch.ones(1, 3))[0], other[0].bias)


def test_an_error_in_one_thread_does_not_end_anothers_call(model):
    inside, failed = threading.Event(), threading.Event()

    def run():
        with packed_weights([model], True):
            inside.set()
            failed.wait(10)
            return [name for name, module in model.named_modules() if "forward" in vars(module)]

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        inside.wait(10)
        with pytest.raises(KeyboardInterrupt), packed_weights([model], True):
            raise KeyboardInterrupt
        failed.set()
        assert len(running.result()) == 2 * 7 + 1
    assert state_of(model)[0] == []
