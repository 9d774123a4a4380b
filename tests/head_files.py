"""The files that a head is saved as, and what may become of them."""

import json

import torch
from safetensors.torch import load_file, save_file

ID = "owner/head"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read(folder):
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def pickled(folder):
    file = folder.parent / "weights.bin"
    torch.save(load_file(folder / WEIGHTS), file)
    return file.read_bytes()


def with_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / "changed")
    content = (folder / "changed").read_bytes()
    (folder / "changed").unlink()
    return {WEIGHTS: content}


def with_config(folder, *without, **values):
    config = {**json.loads((folder / CONFIG).read_text()), **values}
    return {CONFIG: json.dumps({name: value for name, value in config.items() if name not in without}).encode()}


def stored_as(folder, dtype):
    return with_weights(folder, lambda w: w.update({key: weight.to(dtype) for key, weight in w.items()}))
