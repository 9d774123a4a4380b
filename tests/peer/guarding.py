"""A pytest plugin under which the tests of transformers run guarded: `python -m pytest -p guarding TESTS`.

Every outermost `generate` of a decoder-only model runs plain, on copies of what it was given, and then guarded by a
head that flags nothing, drafting by prompt lookup where the call says nothing about drafts. The test goes on with the
guarded output, so its own assertions are about that. What became of each call is written to `$PEER_CALLS`, one JSON
object a line.
"""

import copy
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

from safespec_hf import SafeSpecConfig, SafeSpecError, attach_safety_head, detach_safety_head

sys.path.append(str(Path(__file__).parent.parent))
import tiny

PLAIN_GENERATE = GenerationMixin.generate
POLICY = SafeSpecConfig(adaptive_drafts=False)
"""Constant drafts: no time goes into measuring what pays, and every round has something to verify."""
NUM_LOOKUP_TOKENS = 3
OUTPUTS = ("scores", "logits", "hidden_states", "attentions")
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # of float32, whose sums depend on the shape of a block
CALLS: list[dict[str, str]] = []


class _Nested:
    """Whether a call is one that another one makes: of a draft, or of a strategy that calls `generate` in its turn."""

    depth = 0


def is_decoder_only(model: PreTrainedModel) -> bool:
    return not model.config.is_encoder_decoder and model.get_output_embeddings() is not None


def generate(model, *args, **kwargs):
    """Stands for `GenerationMixin.generate`."""
    if _Nested.depth or not is_decoder_only(model):
        return PLAIN_GENERATE(model, *args, **kwargs)
    _Nested.depth += 1
    try:
        return compare(model, args, kwargs)
    finally:
        _Nested.depth -= 1


def compare(model, args, kwargs):
    """Runs a call plain and guarded, and takes note of what came of it."""
    state = torch.get_rng_state()
    # a call may change what it is given, such as a cache: the plain one gets copies, so that both begin alike
    plain_args, plain_kwargs = copied(args), copied(kwargs)
    expected = PLAIN_GENERATE(model, *plain_args, **plain_kwargs)  # raises where the test wants it to
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        found = guarded(model, args, kwargs)
    except SafeSpecError as error:
        note("refused", str(error), kwargs)
    except Exception as error:  # noqa: BLE001  # whatever it is, it is what is counted here
        last = traceback.extract_tb(error.__traceback__)[-1]
        note("crashed", f"{Path(last.filename).name}:{last.lineno}: {type(error).__name__}: {error}", kwargs)
    else:
        difference = differs(expected, found, is_sampled(model, args, kwargs), is_drafted(model, kwargs))
        note("differed" if difference else "guarded", difference, kwargs)
        return found
    torch.set_rng_state(state)
    expected = PLAIN_GENERATE(model, *args, **kwargs)
    torch.set_rng_state(after)
    return expected


def guarded(model, args, kwargs):
    """The same call under a silent head."""
    tokenizer = tiny.build_tokenizer(model.config.get_text_config().vocab_size)
    had = vars(model).get("_safespec")
    attach_safety_head(model, tiny.build_head(model), tokenizer=tokenizer)
    try:
        names = list(inspect.signature(PLAIN_GENERATE).parameters)[1 : 1 + len(args)]
        named = dict(zip(names, args, strict=True)) | kwargs
        inputs, config = named.pop("inputs", None), named.pop("generation_config", None)
        return model.generate(inputs, config, **drafting(model, config, named), safespec=POLICY)
    finally:
        if had is None:
            detach_safety_head(model)


def drafting(model, config, kwargs):
    """The arguments of a call, with prompt lookup where it says nothing about drafts."""
    many_beams = (kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1
    if many_beams or config is not None or is_drafted(model, kwargs):
        return kwargs
    return kwargs | {"prompt_lookup_num_tokens": NUM_LOOKUP_TOKENS}


def is_drafted(model, kwargs) -> bool:
    """Whether a call says something about drafts."""
    names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")
    configs = [each for each in (kwargs.get("generation_config"), model.generation_config) if each is not None]
    return any(kwargs.get(name) for name in names) or any(getattr(c, n, None) for c in configs for n in names)


def copied(value):
    """A copy of a call's arguments, down to what a call may change; models and functions stay themselves."""
    if isinstance(value, dict):
        return {name: copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(copied, value))
    if isinstance(value, (torch.nn.Module, str, int, float, bool, type(None))) or inspect.isroutine(value):
        return value
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError, ValueError):
        return value


def is_sampled(model, args, kwargs) -> bool:
    configs = [kwargs.get("generation_config"), *args[1:2], model.generation_config]
    values = [kwargs.get("do_sample"), *(getattr(config, "do_sample", None) for config in configs)]
    return bool(next((value for value in values if value is not None), False))


def differs(expected, found, sampled: bool, drafted: bool) -> str:
    """What is another than in the plain output; of what is sampled only shapes can be compared.

    transformers' own assisted decoding cuts the states of its first round from the beginning of the prompt, so with
    drafts in the plain call, too, they can't be compared.
    """
    theirs = getattr(expected, "sequences", expected)
    ours = getattr(found, "sequences", found)
    if sampled:
        return "" if theirs.shape[:1] == ours.shape[:1] else "sequences"
    if theirs.shape != ours.shape or not torch.equal(theirs, ours):
        return "sequences"
    for name in OUTPUTS[:2] if drafted else OUTPUTS:
        if not is_close(getattr(expected, name, None), getattr(found, name, None)):
            return name
    return ""


def is_close(theirs, ours) -> bool:
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        return len(theirs) == len(ours) and all(map(is_close, theirs, ours))
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        same_shape = theirs.shape == ours.shape and theirs.dtype == ours.dtype
        return same_shape and torch.allclose(theirs, ours, **TOLERANCE, equal_nan=True)
    return theirs is None and ours is None


def note(outcome: str, why: str, kwargs) -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition("::")[2].split(" ")[0]
    asked = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    CALLS.append({"test": test, "outcome": outcome, "why": why[:300], "asked": ", ".join(asked)})


@pytest.fixture(autouse=True)
def _guarding():
    generate.__signature__ = inspect.signature(PLAIN_GENERATE)  # which some tests read
    with patch.object(GenerationMixin, "generate", generate):
        yield


def pytest_sessionfinish(session, exitstatus) -> None:
    if path := os.environ.get("PEER_CALLS"):
        Path(path).write_text("".join(json.dumps(call) + "\n" for call in CALLS), encoding="utf-8")
