"""Compiled forwards say what others say, are compiled once, and leave the model as it was.

The compiler's own backend takes a C++ compiler and a minute, so all but one test run what it is given as it is.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import build_draft_head, build_head, build_model
from torch._dynamo.testing import CompileCounterWithBackend

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.engine import compiling as compiling_module
from safespec_hf.engine.compiling import compiled_forwards

PROMPT = torch.tensor([[12, 18, 24, 13]])
SILENT = {"risk_threshold": 1.0, "max_segment_tokens": 4, "reflection": "pause think", "refusal": "no thanks"}
pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ from release to release


@pytest.fixture
def backend(monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiling_module._forward, dynamic=True, backend=counter)
    monkeypatch.setattr(compiling_module, "_compiled", lambda: compiled)
    yield counter
    torch._dynamo.reset()


@pytest.fixture
def model(tokenizer):
    model = build_model()
    return attach_safety_head(model, build_head(model), tokenizer=tokenizer)


def answer(model, draft, num_tokens=24, **policy):
    policy = SafeSpecConfig(**{**SILENT, **policy})
    arguments = {"max_new_tokens": num_tokens, "do_sample": False, "assistant_model": draft, "safespec": policy}
    return model.generate(PROMPT, **arguments)


@pytest.mark.parametrize("pack_weights", [False, True])
def test_answers_are_those_of_the_target(model, backend, pack_weights):
    draft = build_draft_head(model).bind(model)
    expected = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert torch.equal(answer(model, draft, compile=True, pack_weights=pack_weights), expected)
    assert backend.frame_count > 0


def test_recovery_runs_compiled_as_well(model, backend):
    expected = answer(model, None, risk_threshold=1e-6)
    assert torch.equal(answer(model, None, risk_threshold=1e-6, compile=True), expected)


def test_a_later_call_compiles_nothing(model, backend):
    draft = build_draft_head(model).bind(model)
    answer(model, draft, compile=True)
    num_before = backend.frame_count
    answer(model, draft, 30, compile=True)
    assert backend.frame_count == num_before


def test_changed_weights_count(model, backend):
    answer(model, None, compile=True)
    with torch.no_grad():
        model.lm_head.weight.data.mul_(-1.0)
    expected = model.generate(PROMPT, max_new_tokens=24, do_sample=False)
    assert torch.equal(answer(model, None, compile=True), expected)


def test_the_model_is_left_as_it_was(model, backend):
    answer(model, None, compile=True)
    assert model._compiled_call_impl is None
    num_before = backend.frame_count
    model(PROMPT)
    answer(model, None, 40)
    assert backend.frame_count == num_before


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_overlapping_calls_leave_the_model_and_the_limits_as_they_were(model, first_ends_first):
    before = torch._dynamo.config.recompile_limit
    calls = [compiled_forwards([model]) for _ in range(2)]
    for call in calls:
        call.__enter__()
    for call in calls if first_ends_first else calls[::-1]:
        assert model._compiled_call_impl is not None
        call.__exit__(None, None, None)
    assert model._compiled_call_impl is None
    assert torch._dynamo.config.recompile_limit == before


def test_another_threads_forward_is_not_compiled(model, monkeypatch):
    monkeypatch.setattr(compiling_module, "_compiled", lambda: pytest.fail("compiled"))
    expected = model.generate(PROMPT, max_new_tokens=6, do_sample=False)
    with compiled_forwards([model]), ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: model.generate(PROMPT, max_new_tokens=6, do_sample=False)).result()
    assert torch.equal(found, expected)


def test_a_model_that_was_compiled_before_stays_so(model):
    model._compiled_call_impl = model._call_impl
    with compiled_forwards([model]), compiled_forwards([model]):
        pass
    assert model._compiled_call_impl == model._call_impl


def test_a_missing_compiler_is_told_before_the_first_forward(model, monkeypatch):
    monkeypatch.setattr(compiling_module, "find_compiler", lambda: None)
    model.forward = lambda **_: pytest.fail("a forward ran")
    with pytest.raises(UnsupportedRequestError, match="C\\+\\+ compiler"):
        answer(model, None, compile=True)
