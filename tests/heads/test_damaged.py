"""Heads that are damaged, of another kind, or not there are refused by name, from a folder and from the Hub."""

import pytest
import torch
from head_files import CONFIG, ID, WEIGHTS, pickled, read, stored_as, with_config, with_weights
from hub_server import TOKEN
from safetensors.torch import load_file
from tiny import build_model
from transformers import AutoModel

from safespec_hf import (
    HeadFileError,
    HeadMismatchError,
    SafeSpecError,
    SafetyHead,
    SafetyHeadConfig,
    attach_safety_head,
)
from safespec_hf.heads.hub import push_head

# huggingface_hub 2.4 uploads LFS files with an argument that its HTTP library deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


DAMAGE = {
    "truncated": (lambda f: {WEIGHTS: read(f)[WEIGHTS][:-9]}, "not a whole safetensors file"),
    "empty": (lambda f: {WEIGHTS: b""}, "not a whole safetensors file"),
    "corrupted": (lambda f: {WEIGHTS: b"\xff" * 9 + read(f)[WEIGHTS][9:]}, "not a whole safetensors file"),
    "pickle in its place": (lambda f: {WEIGHTS: pickled(f)}, "such as a pickle, which is never read"),
    "pickle beside": (lambda f: {WEIGHTS: None, "pytorch_model.bin": pickled(f)}, "model.safetensors"),
    "no weights": (lambda f: {WEIGHTS: None}, "model.safetensors"),
    "no config": (lambda f: {CONFIG: None}, "config.json"),
    "config of another kind": (lambda f: {CONFIG: b'{"model_type": "llama"}'}, "of model type 'llama'"),
    "config that is no object": (lambda f: {CONFIG: b"[1]"}, "No safety head could be loaded"),
    "config that is no JSON": (lambda f: {CONFIG: b"{"}, "config"),
    "value out of range": (lambda f: with_config(f, risk_threshold=1.5), "`risk_threshold` must be"),
    "missing tensor": (lambda f: with_weights(f, lambda w: w.pop("mlp.0.bias")), "mlp.0.bias missing"),
    "unknown tensor": (lambda f: with_weights(f, lambda w: w.update(x=torch.ones(1))), "x unknown"),
    "wrong shape": (lambda f: with_config(f, mlp_ratio=1.0), "mlp.0.bias, mlp.0.weight.* of another shape"),
    "a field of a newer version": (lambda f: with_config(f, activation="gelu"), "has no `activation`"),
    "a mistyped field": (lambda f: with_config(f, "pooling", poling="mean"), "does not say `pooling`"),
    "no label direction": (lambda f: with_config(f, "unsafe_label"), "does not say `unsafe_label`"),
    "no dtype of weights": (lambda f: with_config(f, dtype="nothing"), "`dtype` must be one of"),
    "quantized": (lambda f: with_config(f, quantization_config={"load_in_8bit": True}), "`quantization_config`"),
    "more than fits into memory": (lambda f: with_config(f, mlp_ratio=1e9), "of another shape"),
    "more layers than anyone has": (lambda f: with_config(f, num_mlp_layers=10**6), "`num_mlp_layers` must be"),
    "integers": (lambda f: stored_as(f, torch.int8), r"mlp.0.bias \(torch.int8\), .* another kind of number"),
    "booleans": (lambda f: stored_as(f, torch.bool), r"\(torch.bool\)"),
    "complex numbers": (lambda f: stored_as(f, torch.complex64), r"\(torch.complex64\)"),
    "not a number": (
        lambda f: with_weights(f, lambda w: w["mlp.0.weight"][0].fill_(float("nan"))),
        "mlp.0.weight not finite",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused(folder, name):
    make, message = DAMAGE[name]
    for file, content in make(folder).items():
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            (folder / file).write_bytes(content)
    with pytest.raises(HeadFileError, match=message):
        SafetyHead.from_pretrained(folder)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_repository_is_refused(hub, folder, target, tokenizer, name):
    make, message = DAMAGE[name]
    files = {file: content for file, content in {**read(folder), **make(folder)}.items() if content is not None}
    hub.put(ID, files)
    with pytest.raises(HeadFileError, match=message) as error:
        attach_safety_head(target, ID, tokenizer=tokenizer)
    assert ID in str(error.value)
    assert not [request for request in hub.requests if request.endswith(".bin")]


def test_a_damaged_head_is_refused_through_auto_model_too(hub, folder):
    hub.put(ID, {**read(folder), **DAMAGE["missing tensor"][0](folder)})
    with pytest.raises(HeadFileError, match=r"mlp\.0\.bias missing"):
        AutoModel.from_pretrained(ID)


def test_a_field_that_nobody_reads_is_refused_in_code_too():
    with pytest.raises(TypeError, match="has no `risk_treshold`"):
        SafetyHeadConfig(hidden_size=8, hidden_layers=[1], risk_treshold=0.1)


def test_a_head_for_another_target_is_refused_by_id(hub, head, tokenizer):
    push_head(head, ID, token=TOKEN)
    with pytest.raises(HeadMismatchError, match="`num_layers`"):
        attach_safety_head(build_model(num_hidden_layers=3), ID, tokenizer=tokenizer)


def test_a_repository_or_revision_that_is_missing_is_named(hub, head):
    with pytest.raises(HeadFileError, match="owner/nothing"):
        SafetyHead.from_pretrained("owner/nothing")
    push_head(head, ID, token=TOKEN)
    with pytest.raises(HeadFileError, match="v9"):
        SafetyHead.from_pretrained(ID, revision="v9")


def test_weights_that_a_config_points_to_elsewhere_are_not_followed(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    (folder / CONFIG).write_bytes(with_config(folder, transformers_weights="adapter_model.bin")[CONFIG])
    with pytest.raises(HeadFileError, match="has no `transformers_weights`"):
        SafetyHead.from_pretrained(folder)


def test_a_file_error_is_what_transformers_callers_expect():
    assert issubclass(HeadFileError, SafeSpecError)
    assert issubclass(HeadFileError, OSError)
    assert str(HeadFileError("why")) == "why"
