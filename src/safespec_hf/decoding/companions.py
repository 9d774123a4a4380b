"""Drafts that transformers has for some targets only, and that read what those computed: MTP, DFlash, shared KV."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel

from ..answer.rows import Row
from ..config import SafeSpecConfig
from ..drafting.draft_length import DraftCosts, DraftLength
from ..drafting.router import MakeDrafter
from ..drafting.states import DFlashDrafter, MtpDrafter, SharedKvDrafter
from ..engine.evaluating import evaluating
from ..engine.traits import FAILURES
from ..errors import UnsupportedRequestError
from .assistant import Draft

SHARED_KV = ("gemma4_assistant", "gemma4_unified_assistant")
"""Model types of assistants that read the target's keys and values."""
COLUMNS = {"DynamicLayer", "DynamicSlidingWindowLayer"}
"""Layers of caches that keep one column for each token."""
_RUN: WeakSet[nn.Module] = WeakSet()
_MTP: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()


def mtp_draft(model: PreTrainedModel) -> Draft:
    """The multi-token prediction layers that were trained with a model, read from its checkpoint once.

    Raises:
        UnsupportedRequestError: If it has none, or they can't be read.
    """
    text = model.config.get_text_config(decoder=True)
    num = getattr(text, "num_mtp_layers", None)
    if not num:
        raise UnsupportedRequestError(
            f"`use_mtp=True` can't be kept: the config of {type(model).__name__} has no `num_mtp_layers`. Use "
            "`assistant_model` or `prompt_lookup_num_tokens`."
        )
    network, last_layer = _mtp_network(model), text.num_hidden_layers

    def make(num_rows: int, length: DraftLength) -> MtpDrafter:
        return MtpDrafter(network, num_rows, length, last_layer)

    _check_runs(network, make)
    return Draft(network, make_drafter=make)


def _mtp_network(model: Any) -> Any:
    known = _MTP.get(model)
    if known is not None and (known.dtype, known.device) == (model.dtype, model.device):
        if known.shared_head is not model.get_output_embeddings():
            known.tie_with_main_model(model)  # after the vocabulary was resized
        return known
    try:
        from transformers.cache_utils import MtpCache
        from transformers.modeling_layers import MtpModel

        network: Any = MtpModel.from_pretrained(model, device_map={"": model.device})
    except (ImportError, OSError, *FAILURES) as error:
        raise UnsupportedRequestError(
            f"`use_mtp=True` can't be kept: the MTP layers of {type(model).__name__} could not be read from its "
            f"checkpoint, {model.config.name_or_path!r}: {error}"
        ) from error
    kinds = {type(layer).__name__ for layer in MtpCache(config=network.config).layers} - COLUMNS
    if kinds:
        raise UnsupportedRequestError(
            f"`use_mtp=True` can't be kept: the MTP layers of {type(model).__name__} keep states that can't be rolled "
            f"back by dropping tokens ({', '.join(sorted(kinds))}). Use `assistant_model` instead."
        )
    _MTP[model] = network.eval()
    return network


@torch.no_grad()
def _check_runs(network: Any, make: MakeDrafter) -> None:
    """Raises unless a network drafts after two tokens whose states are zeros; once for each."""
    if network in _RUN:
        return
    drafter, row = make(1, DraftLength(DraftCosts(), is_adaptive=False)), _row_of_three()
    drafter.observe(0, 0, torch.zeros(2, drafter.num_features))
    try:
        with evaluating([network]):
            drafter.draft([row], [1])
    except FAILURES as error:
        raise UnsupportedRequestError(
            f"{type(network).__name__} can't draft for this target: it fails on three tokens ({error})."
        ) from error
    _RUN.add(network)


def _row_of_three() -> Row:
    ids = torch.zeros(3, dtype=torch.long)
    return Row(0, ids, torch.ones_like(ids, dtype=torch.bool), max_new_tokens=1, policy=SafeSpecConfig())


def dflash_draft(model: Any, assistant: PreTrainedModel | None) -> Draft:
    """A network that denoises a block of drafts over the target's states.

    Raises:
        UnsupportedRequestError: If it is none, or not made for such a target.
    """
    config: Any = getattr(assistant, "config", None)
    fields: dict[str, Any] = {
        name: getattr(config, name, None) for name in ("block_size", "mask_token_id", "target_layer_ids")
    }
    if assistant is None or None in fields.values():
        raise UnsupportedRequestError(
            "`speculation_type='dflash'` needs an `assistant_model` with `block_size`, `mask_token_id` and "
            f"`target_layer_ids` in its config, but it is {'none' if assistant is None else type(assistant).__name__}."
        )
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    is_shared = isinstance(inputs, nn.Embedding) and isinstance(outputs, nn.Linear)
    is_shared = is_shared and not (inputs.weight.is_meta or outputs.weight.is_meta)
    is_fit = max(fields["target_layer_ids"]) < text.num_hidden_layers and fields["block_size"] > 1
    if not (is_shared and is_fit and config.hidden_size == text.hidden_size):
        raise UnsupportedRequestError(
            f"{type(assistant).__name__} can't draft for {type(model).__name__}: it reads layers "
            f"{fields['target_layer_ids']}, {config.hidden_size} wide, drafts blocks of {fields['block_size']}, and "
            f"shares embeddings and LM head, but the target has {text.num_hidden_layers} layers, {text.hidden_size} "
            f"wide, with {inputs} and {outputs}."
        )
    if fields["mask_token_id"] >= inputs.num_embeddings:
        raise UnsupportedRequestError(
            f"`mask_token_id={fields['mask_token_id']}` of {type(assistant).__name__} is no token of the target, "
            f"which has {inputs.num_embeddings}."
        )

    def make(num_rows: int, length: DraftLength) -> DFlashDrafter:
        return DFlashDrafter(assistant, num_rows, length, model)

    _check_runs(assistant, make)
    return Draft(assistant, make_drafter=make)


def shared_kv_draft(model: Any, assistant: PreTrainedModel) -> Draft:
    """A network that reads the keys and values of the target's last layers of each kind.

    Raises:
        UnsupportedRequestError: If it is not made for such a target.
    """
    config: Any = assistant.config
    text, own = model.config.get_text_config(decoder=True), config.get_text_config()
    layers_of = {
        module.layer_type: module.layer_idx
        for module in model.get_decoder().modules()
        if getattr(module, "store_full_length_kv", False)
    }
    found = text.hidden_size, text.vocab_size, sorted(layers_of)
    wanted = config.backbone_hidden_size, own.vocab_size, sorted(set(own.layer_types))
    if found != wanted:
        raise UnsupportedRequestError(
            f"{type(assistant).__name__} can't draft for {type(model).__name__}: it wants hidden states, a vocabulary "
            f"and shared keys and values of {wanted}, but the target has {found}."
        )

    def make(num_rows: int, length: DraftLength) -> SharedKvDrafter:
        return SharedKvDrafter(assistant, num_rows, length, model, layers_of)

    return Draft(assistant, make_drafter=make)
