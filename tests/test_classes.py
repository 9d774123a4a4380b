"""The class of a guarded model: under others' classes, in copies, and as type checkers see it."""

import copy
import pickle

import mypy.api
import pytest
import torch
from tiny import build_head
from transformers import (
    LlamaForCausalLM,
)

from safespec_hf import (
    GuardedModel,
    SafeSpecConfig,
    SafeSpecOutput,
    UnsupportedRequestError,
    attach_safety_head,
    detach_safety_head,
)

PROMPT = torch.tensor([[11, 17, 23]])
SHORT = {"max_new_tokens": 8, "do_sample": False}
POLICY = SafeSpecConfig(max_segment_tokens=4, reflection="pause think", refusal="no thanks")


def is_guarded(model):
    output = model.generate(PROMPT, **SHORT, safespec=True, return_dict_in_generate=True)
    return isinstance(output, SafeSpecOutput)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
def test_copies_keep_the_guard(target, never, tokenizer, duplicate):
    # before the first forward: transformers' own hooks for hidden states can't be pickled afterwards
    other = duplicate(attach_safety_head(target, never, tokenizer=tokenizer, always=True))
    assert isinstance(other, LlamaForCausalLM)
    assert is_guarded(other)
    with pytest.raises(UnsupportedRequestError, match="always=True"):
        other.generate(PROMPT, **SHORT, safespec=False)


def test_a_deep_copy_can_be_detached_without_touching_the_original(guarded):
    other = detach_safety_head(copy.deepcopy(guarded))
    assert type(other) is LlamaForCausalLM
    assert is_guarded(guarded)


class Theirs:
    """Stands for what FSDP and others put before a model's class."""


def put_on_top(model):
    cls = type(model)
    model.__class__ = type(f"FSDP{cls.__name__}", (Theirs, cls), {})
    return model


def test_a_class_on_top_of_ours_guards_copies_and_is_kept_by_detaching(guarded):
    model = put_on_top(guarded)
    assert is_guarded(model)
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert isinstance(other, Theirs)
        assert is_guarded(other)
    plain = detach_safety_head(model)
    assert isinstance(plain, (Theirs, LlamaForCausalLM))
    assert not isinstance(plain, GuardedModel)
    assert type(plain).__name__ == "FSDPLlamaForCausalLM"
    assert plain.generate(PROMPT, **SHORT).shape == (1, 11)
    with pytest.raises(ValueError, match="safespec"):
        plain.generate(PROMPT, **SHORT, safespec=True)


def test_attaching_twice_under_a_class_on_top_replaces_the_head(guarded, tokenizer):
    model = put_on_top(guarded)
    attach_safety_head(model, build_head(model, pooling="last"), tokenizer=tokenizer)
    assert model.safety.head.config.pooling == "last"
    assert type(model).__mro__.count(GuardedModel) == 1
    assert type(detach_safety_head(model)).__bases__ == (Theirs, LlamaForCausalLM)


def test_a_head_can_be_attached_after_a_class_was_put_on_top(target, never, tokenizer):
    put_on_top(target)
    theirs = type(target)
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    assert is_guarded(model)
    assert is_guarded(copy.deepcopy(model))
    assert type(detach_safety_head(model)) is theirs


def test_a_class_that_is_bound_to_ours_is_refused_by_detaching(guarded):
    class Bound(type(guarded)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    guarded.__class__ = Bound
    assert is_guarded(guarded)
    with pytest.raises(UnsupportedRequestError, match="Undo it first"):
        detach_safety_head(guarded)
    assert is_guarded(guarded)


def test_a_parametrized_model_is_guarded_and_detached(guarded):
    guarded.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    torch.nn.utils.parametrize.register_parametrization(guarded, "scale", torch.nn.Identity())
    assert is_guarded(copy.deepcopy(guarded))
    detach_safety_head(guarded)
    torch.nn.utils.parametrize.remove_parametrizations(guarded, "scale")
    assert type(guarded) is LlamaForCausalLM


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_model_that_was_compiled_in_place_is_copied(target, never, tokenizer, duplicate):
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    model.compile()
    assert duplicate(model)._compiled_call_impl is None
    assert type(duplicate(model)) is type(model)


TYPED = """
from transformers import LlamaForCausalLM
from safespec_hf import SafeSpecConfig, SafeSpecOutput, SafetyHead, attach_safety_head

plain: LlamaForCausalLM = LlamaForCausalLM.from_pretrained("x")
model = attach_safety_head(plain, "head", policy=SafeSpecConfig())
"""
GOOD = """
from torch import Tensor

tokens: Tensor = model.generate(None, safespec=True, max_new_tokens=3)
output: SafeSpecOutput = model.generate(None, safespec=SafeSpecConfig(), return_dict_in_generate=True)
head: SafetyHead = model.safety.head
threshold: float = model.safety.risk_threshold
model.model.layers[0]
model.config.vocab_size
model.generate(None, None, [], max_new_tokens=3)
"""
BAD = """
model.generate(None, safespec="yes")
model.generate(None, safespec=1)
model.generate(None, safespec={"num_candidates": 3})
number: int = model.generate(None, safespec=True)
model.safety.head = None
model.safety.nothing
"""


# Reading all of transformers takes a minute, and what it says of its models is not what is tested here.
SETTINGS = """
[mypy]
[mypy-transformers.*,huggingface_hub.*,safetensors.*]
follow_imports = skip
"""


def test_type_checkers_know_what_a_guarded_model_takes_and_gives(tmp_path):
    for name, code in (("good.py", GOOD), ("bad.py", BAD), ("mypy.ini", "")):
        (tmp_path / name).write_text(TYPED + code if code else SETTINGS)
    options = ["--strict", "--no-error-summary", f"--cache-dir={tmp_path}", f"--config-file={tmp_path / 'mypy.ini'}"]
    report, errors, _ = mypy.api.run([*options, str(tmp_path / "good.py"), str(tmp_path / "bad.py")])
    assert errors == ""
    found = [line for line in report.splitlines() if ": error:" in line and str(tmp_path) in line]
    assert [line for line in found if "good.py" in line] == []
    lines = {int(line.split("bad.py:")[1].split(":")[0]) - TYPED.count("\n") for line in found}
    assert lines == set(range(2, BAD.count("\n") + 1))
