"""Draft heads that others trained: EAGLE-3 checkpoints, in their authors' format and in that of `speculators`.

Both are one decoder layer over three hidden states of the target, as a [`DraftHead`] is, with an LM head of their own
over some of the target's tokens. Only their files are read, none of their code.

Shapes: as in `draft_head`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..errors import HeadFileError, SafeSpecError, UnsupportedRequestError
from .draft_head import DraftHead, DraftHeadConfig, rope_table
from .loading import explain_hub_error, hub_arguments
from .safety_head import check_binding, target_binding

MAX_POSITIONS = 32_768
"""Positions that a rotary table is made for where the checkpoint's own number is smaller than the target's."""
LAYER = "layers.0."
JOINED = {
    "fuse.weight": ["fc.weight"],
    "qkv_proj.weight": [f"{LAYER}self_attn.{name}_proj.weight" for name in "qkv"],
    "o_proj.weight": [f"{LAYER}self_attn.o_proj.weight"],
    "mlp_norm": [f"{LAYER}post_attention_layernorm.weight"],
    "gate_up_proj.weight": [f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"],
    "down_proj.weight": [f"{LAYER}mlp.down_proj.weight"],
    "norm": ["norm.weight"],
    "output.weight": ["lm_head.weight"],
}
"""Which of their weights, one below the other, are each of ours."""
NORMS = [f"{LAYER}input_layernorm.weight", f"{LAYER}hidden_norm.weight"]
OTHERS = ("verifier_norm.weight", "verifier_lm_head.weight", "t2d")
"""The target's own, for training, and what `d2t` says as well."""


class Eagle3HeadConfig(DraftHeadConfig):
    """Architecture of an [`Eagle3Head`]: a [`DraftHeadConfig`], and what EAGLE-3 checkpoints may do otherwise.

    Args:
        norm_before_residual (`bool`, defaults to `False`): Whether the state is added to as it was normed.
        norm_before_fuse (`bool`, defaults to `False`): Whether the tapped states are normed.
        has_embedding (`bool`, defaults to `False`): Whether it has embeddings of its own.
        inverse_frequencies (`list[float]`, *optional*): Of the rotary embedding. Default: those of `rope_theta`.
        rope_scale (`float`, defaults to 1.0): Factor of the rotary table.
    """

    model_type = "safespec_eagle3"

    norm_before_residual: bool = False
    norm_before_fuse: bool = False
    has_embedding: bool = False
    inverse_frequencies: list[float] | None = None
    rope_scale: float = 1.0


class Eagle3Head(DraftHead):
    """A draft head of an EAGLE-3 checkpoint: see [`load_eagle3_draft`].

    Args:
        config ([`Eagle3HeadConfig`]): With sizes and `hidden_layers` set.
    """

    title = "EAGLE-3 head"
    config_class = Eagle3HeadConfig
    config: Eagle3HeadConfig

    def __init__(self, config: Eagle3HeadConfig):
        super().__init__(config)
        rows: Any = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.output = rows  # its own ones, in the place of the target's
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size) if config.has_embedding else None
        self.fuse_norm = nn.Parameter(torch.ones(config.num_features)) if config.norm_before_fuse else None

    @torch.no_grad()
    def bind(self, target: PreTrainedModel, ignore_mismatches: tuple[str, ...] = ()) -> DraftHead:
        check_binding(self, target_binding(target), ignore_mismatches)
        _check_layers(self.config.hidden_layers or [], target)
        inputs = target.get_input_embeddings() if self.embedding is None else self.embedding
        if not isinstance(inputs, nn.Embedding) or inputs.weight.shape[1] != self.width or inputs.weight.is_meta:
            raise UnsupportedRequestError(
                f"An EAGLE-3 head shares its target's embeddings, which must be a matrix of {self.width} columns in "
                f"memory, but {type(target).__name__} has {inputs}."
            )
        self._embedding = (inputs.weight,)
        if self.rope_P2C is None or self.rope_P2C.device != self.device or self.rope_P2C.dtype != self.dtype:
            config = self.config
            self.rope_P2C = rope_table(config, config.inverse_frequencies, config.rope_scale).to(self.fuse.weight)
        return self

    def finish(self, mixed_BTX: Tensor, state_BTD: Tensor) -> Tensor:
        if self.config.norm_before_residual:
            state_BTD = self._norm(state_BTD, self.input_norms[1])
        return super().finish(mixed_BTX, state_BTD)

    def _fuse(self, states: Tensor, num_fused: int | None) -> Tensor:
        if self.fuse_norm is not None and states.shape[-1] == self.config.num_features:
            states = states.to(self.fuse.weight.device, self.fuse.weight.dtype)
            normed = F.rms_norm(states, (states.shape[-1],), self.fuse_norm.to(states.dtype), self.eps)
            # behind `num_fused` are states of its own
            states = normed if num_fused is None else torch.cat([normed[:, :num_fused], states[:, num_fused:]], dim=1)
        return super()._fuse(states, num_fused)


def load_eagle3_draft(name: str | os.PathLike[str], target: PreTrainedModel, **hub_kwargs: Any) -> Eagle3Head:
    """Loads an EAGLE-3 checkpoint as a draft for its target.

    It may be in the format of its authors, as SpecForge and others write it too, or in that of `speculators`. One
    decoder layer of Llama's kind is read, in safetensors. Not all of these files say what they were trained for:
    whether one suits the target is up to the caller. A draft that does not costs time, and changes no answer.

    Args:
        name (`str` or `os.PathLike`): Folder, or id on the Hub.
        target ([`~transformers.PreTrainedModel`]): The model that it was trained for.
        hub_kwargs: For loading: `revision`, `token`, `cache_dir`, `local_files_only`, ...

    Returns:
        [`Eagle3Head`]: Bound to the target, in its precision and on its device. It can be saved as other heads are.

    Raises:
        HeadFileError: If a file is missing or damaged, or holds something else.
        UnsupportedRequestError: If it is of another shape than the target, or of a kind that is not known here.

    Example:

        >>> from safespec_hf import load_eagle3_draft
        >>> try:
        ...     load_eagle3_draft("no/such-folder/here", target=None)
        ... except OSError as error:
        ...     print(str(error)[:64])
        No EAGLE-3 head could be loaded from 'no/such-folder/here': no s
    """
    fields, weights = _read(name, hub_kwargs)
    try:
        config = _config(name, fields, weights, target)
        head = Eagle3Head(config)
    except SafeSpecError:
        raise
    except (KeyError, TypeError, ValueError) as error:  # from values in config.json
        raise HeadFileError(f"The config of the EAGLE-3 head {str(name)!r} makes no head: {error!r}") from error
    state, unknown = _convert(weights, config)
    if unknown:
        raise UnsupportedRequestError(
            f"The EAGLE-3 head {str(name)!r} has weights that are not known here: {', '.join(sorted(unknown)[:6])}."
        )
    try:
        head.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise HeadFileError(f"The weights of the EAGLE-3 head {str(name)!r} don't fit its config: {error}") from error
    if bad := [what for what, keys in head._bad_values().items() if keys]:
        raise HeadFileError(f"The weights of the EAGLE-3 head {str(name)!r} are bad: {'; '.join(bad)}.")
    head.config.name_or_path = head.name_or_path = str(name)
    head.to(target.device, target.dtype).eval().bind(target)  # type: ignore[arg-type]  # its stub takes no device
    return head


def _read(name: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        arguments = hub_arguments(name, hub_kwargs, Eagle3Head.title)
        files = [cached_file(name, file, **arguments) for file in (CONFIG_NAME, SAFE_WEIGHTS_NAME)]
        config, weights = map(str, files)  # where there is none, it raises by itself
        fields: dict[str, Any] = json.loads(Path(config).read_text(encoding="utf-8"))
        return fields, load_file(weights)
    except (OSError, ValueError, SafetensorError) as error:
        why = explain_hub_error(name, error, hub_kwargs) or error
        raise HeadFileError(
            f"No {Eagle3Head.title} could be loaded from {str(name)!r}: {why}. It has to have a `{CONFIG_NAME}` and "
            f"a `{SAFE_WEIGHTS_NAME}`; pickles are never read."
        ) from error


def _config(
    name: str | os.PathLike[str], fields: Mapping[str, Any], weights: dict[str, Tensor], target: PreTrainedModel
) -> Eagle3HeadConfig:
    """The config of a checkpoint, whose `weights` are renamed and rid of what the target has as well."""
    for key in list(weights):
        weights[key.removeprefix("model.").replace("midlayer.", LAYER)] = weights.pop(key)
    kind = fields.get("speculators_model_type")
    if kind not in (None, "eagle3") or "fc.weight" not in weights or NORMS[1] not in weights:
        found = f"is of kind {kind!r}" if kind else f"has the weights {sorted(weights)[:6]}"
        raise HeadFileError(f"{str(name)!r} holds no EAGLE-3 head: it {found}.")
    layer: Mapping[str, Any] = fields.get("transformer_layer_config") or fields
    binding, text = target_binding(target), target.config.get_text_config(decoder=True)
    is_known = layer.get("num_hidden_layers", 1) == 1 and layer.get("hidden_act", "silu") == "silu"
    sizes = {"hidden_size": layer["hidden_size"], "vocab_size": layer.get("vocab_size", text.vocab_size)}
    if not is_known or sizes != {key: binding[key] for key in sizes}:
        raise UnsupportedRequestError(
            f"The EAGLE-3 head {str(name)!r} can't draft for {type(target).__name__}: it must be one layer with "
            f"`hidden_act='silu'` and the target's sizes, {binding['hidden_size']} states and "
            f"{binding['vocab_size']} tokens, but it has num_hidden_layers={layer.get('num_hidden_layers', 1)}, "
            f"hidden_act={layer.get('hidden_act', 'silu')!r} and {sizes}."
        )
    embedding, shared = weights.get("embed_tokens.weight"), target.get_input_embeddings()
    has_embedding = embedding is not None and not _is_same(embedding, getattr(shared, "weight", None))
    if not has_embedding:
        weights.pop("embed_tokens.weight", None)
    heads = layer["num_attention_heads"]
    rope = _frequencies(name, layer)
    own, theirs = layer.get("max_position_embeddings", 0), getattr(text, "max_position_embeddings", None) or 0
    return Eagle3HeadConfig(
        **sizes,
        hidden_layers=_layers(fields, weights["fc.weight"], target),
        draft_vocab_size=weights["lm_head.weight"].shape[0] if "lm_head.weight" in weights else 0,
        intermediate_size=layer["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=layer.get("num_key_value_heads") or heads,
        head_dim=layer.get("head_dim") or layer["hidden_size"] // heads,
        rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
        max_position_embeddings=max(own, min(theirs, MAX_POSITIONS)) or MAX_POSITIONS,
        # `speculators` leaves out what is its default
        norm_before_residual=bool(fields.get("norm_before_residual", kind is not None)),
        norm_before_fuse="input_norm.weight" in weights,
        has_embedding=has_embedding,
        inverse_frequencies=rope[0],
        rope_scale=rope[1],
        target=binding,
    )


def _layers(fields: Mapping[str, Any], fuse: Tensor, target: PreTrainedModel) -> list[int]:
    """Which hidden states are read: each is what goes into the layer of that number, the embeddings' being 0."""
    within: Mapping[str, Any] = fields.get("eagle_config") or {}
    key, num = "eagle_aux_hidden_state_layer_ids", target_binding(target)["num_layers"]
    given = fields.get(key) or within.get(key)
    layers = list(given or [2, num // 2, num - 3])
    if len(layers) * target_binding(target)["hidden_size"] != fuse.shape[1] or min(layers) < 0:
        raise UnsupportedRequestError(
            f"An EAGLE-3 head reads {fuse.shape[1]} features, which hidden states {layers} of "
            f"{type(target).__name__} with {num} layers don't give."
        )
    _check_layers(layers, target)
    return layers


def _check_layers(layers: list[int], target: PreTrainedModel) -> None:
    num = target_binding(target)["num_layers"]
    if max(layers) >= num:
        raise UnsupportedRequestError(
            f"An EAGLE-3 head reads hidden states before the last norm, of layers below {num}, but this one asks for "
            f"{layers}."
        )


def _frequencies(name: str | os.PathLike[str], layer: Mapping[str, Any]) -> tuple[list[float], float]:
    """The rotary embedding's inverse frequencies, and the factor of its table."""
    rope = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    rope.setdefault("rope_theta", layer.get("rope_theta", 10_000.0))
    kind = rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    if kind == "mrope" or "mrope_section" in rope:
        kind = rope["rope_type"] = "default"  # which it is for text
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise UnsupportedRequestError(f"The EAGLE-3 head {str(name)!r} has rotary positions of kind {kind!r}.")
    heads = layer["num_attention_heads"]
    dim = layer.get("head_dim") or layer["hidden_size"] // heads
    if kind == "default":
        half = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        return (float(rope["rope_theta"]) ** -half).tolist(), 1.0
    config = LlamaConfig(
        hidden_size=layer["hidden_size"],
        num_attention_heads=heads,
        head_dim=dim,
        max_position_embeddings=layer.get("max_position_embeddings", 2048),
        rope_parameters=rope,
    )
    found, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return found.double().tolist(), float(scale)


def _convert(weights: dict[str, Tensor], config: Eagle3HeadConfig) -> tuple[dict[str, Tensor], set[str]]:
    """Weights under our names, and those that have none."""
    used = {"d2t", *NORMS, *OTHERS, *(key for keys in JOINED.values() for key in keys)}
    state = {
        name: torch.cat([weights[key] for key in keys])
        for name, keys in JOINED.items()
        if all(key in weights for key in keys)
    }
    if all(key in weights for key in NORMS):
        state["input_norms"] = torch.stack([weights[key] for key in NORMS])
    for name, key in (("embedding.weight", "embed_tokens.weight"), ("fuse_norm", "input_norm.weight")):
        if key in weights:
            used.add(key)
            state[name] = weights[key]
    # what is to be added to a draft's id to get the target's
    ids = torch.arange(config.draft_vocab_size)
    ids = ids + weights["d2t"].long() if "d2t" in weights else ids
    order = ids.argsort()
    state["token_ids"] = ids[order]
    if "output.weight" in state:
        state["output.weight"] = state["output.weight"][order]
    return state, {key for key in weights if key not in used and not re.fullmatch(r".*rotary_emb\..*", key)}


def _is_same(matrix: Tensor, other: Tensor | None) -> bool:
    if other is None or other.is_meta or matrix.shape != other.shape:
        return False
    return torch.equal(matrix.to(other), other)


AutoConfig.register("safespec_eagle3", Eagle3HeadConfig, exist_ok=True)
AutoModel.register(Eagle3HeadConfig, Eagle3Head, exist_ok=True)
