"""The private names of other libraries: each is where it was, or this says which one moved."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from safespec_hf import SafeSpecError
from safespec_hf.engine import private_names
from safespec_hf.engine.private_names import (
    NAMES,
    PrivateName,
    check_private_names,
    is_user_cache,
    mark_user_cache,
    pad_token_id,
)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own, while it is imported
@pytest.mark.parametrize("each", NAMES, ids=[f"{each.home}.{each.name}" for each in NAMES])
def test_no_private_name_has_moved(each):
    if each.home == private_names.KERNELS and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without these kernels, and they are done without")
    assert each.is_there(), f"{each.home} has no `{each.name}` any more: see engine/private_names.py"


def test_a_name_that_moved_is_named_with_the_versions(monkeypatch):
    moved = PrivateName("torch.nn.Module", "_that_was_renamed", nn.Module)
    monkeypatch.setattr(private_names, "NAMES", (*NAMES, moved))
    with pytest.raises(SafeSpecError, match=rf"torch {torch.__version__[0]}.*Module\._that_was_renamed"):
        check_private_names.__wrapped__()


def test_a_kernel_that_is_not_built_in_stops_nothing(monkeypatch):
    monkeypatch.setattr(private_names, "NAMES", (PrivateName("torch.ops.mkldnn", "_none_such", object),))
    check_private_names.__wrapped__()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_of_the_callers_is_known_as_such_in_every_release(name):
    cache = DynamicCache()
    assert not is_user_cache(cache)
    mark_user_cache({name: cache, "use_cache": True})
    assert is_user_cache(cache)


def test_a_config_without_padding_pads_with_nothing():
    config = GenerationConfig()
    config._pad_token_tensor = None
    assert pad_token_id(config) is None
