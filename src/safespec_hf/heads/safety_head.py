"""The safety head: pooled hidden states of the target to P(unsafe), bound to the target it was trained on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..engine.private_names import commit_hash
from ..errors import HeadMismatchError, UnsupportedRequestError
from .card import Report
from .head_config import SafetyHeadConfig
from .loading import StrictModel
from .publishing import check_destination, publish, save_folder
from .tokenizers import is_extension, tokenizer_fingerprint

_PUSH_KWARGS = ("repo_id", "private", "token", "revision", "commit_message", "commit_description", "create_pr", "tags")


class SafetyHead(StrictModel):
    """An MLP from pooled hidden states to one logit (Section 3 of the paper: d -> d/2 -> 1, ReLU, dropout 0.1).

    With `config.prompt_threshold` there is a linear probe besides, which scores prompts.

    Saved as `config.json` and `model.safetensors`, loaded with `SafetyHead.from_pretrained(folder_or_hub_id)` or
    `AutoModel.from_pretrained`. Pickled weights are refused.

    Args:
        config ([`SafetyHeadConfig`]): With `hidden_size` and `hidden_layers` set.

    Raises:
        ValueError: If the config does not say what to read.

    Example:

        >>> import torch
        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> head = SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1])).eval()
        >>> head.risk(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3])
    """

    title = "safety head"
    config_class = SafetyHeadConfig
    config: SafetyHeadConfig
    base_model_prefix = "mlp"
    main_input_name = "features"

    def __init__(self, config: SafetyHeadConfig):
        super().__init__(config)
        if config.num_features == 0:
            raise ValueError(
                "A `SafetyHead` needs `hidden_size` > 0 and at least one of `hidden_layers`, but its config has "
                f"hidden_size={config.hidden_size} and hidden_layers={config.hidden_layers}."
            )
        inner = max(1, round(config.num_features * config.mlp_ratio))
        widths = [config.num_features] + [inner] * (config.num_mlp_layers - 1)
        layers: list[nn.Module] = []
        for width, next_width in pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        has_probe = config.prompt_threshold is not None
        self.prompt_probe = nn.Linear(config.num_tapped, 1) if has_probe else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the class `config.unsafe_label == 1` speaks for.

        Args:
            features (`torch.Tensor` of shape `(..., num_features)`): Pooled hidden states, any float dtype.

        Returns:
            `torch.Tensor` of shape `(...)`: Logits, float32 unless the head was cast.
        """
        return self._logits(features, self.mlp)

    def _logits(self, features: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        bias = cast("Tensor", self.mlp[-1].bias)  # `self.device` and `self.dtype` would look for a weight each time
        states = features.to(bias.device, bias.dtype)
        for layer in layers:
            states = layer(states)
        return states.squeeze(-1)

    def risk(self, features: Tensor) -> Tensor:
        """P(unsafe) of pooled hidden states, whatever the label direction, and without dropout in any mode.

        Args:
            features (`torch.Tensor` of shape `(..., num_features)`): Pooled hidden states.

        Returns:
            `torch.Tensor` of shape `(...)`: Risks in [0, 1].
        """
        # not a matter of the mode: someone may train the head while it guards, and a risk must never be a draw
        logits = self._logits(features, (layer for layer in self.mlp if not isinstance(layer, nn.Dropout))).float()
        return torch.sigmoid(logits if self.config.unsafe_label == 1 else -logits)

    def prompt_risk(self, states: Tensor) -> Tensor:
        """P(unsafe) of prompts, by a linear probe.

        Args:
            states (`torch.Tensor` of shape `(..., num_tapped)`): Hidden states of the last token of each.

        Returns:
            `torch.Tensor` of shape `(...)`: Risks in [0, 1].

        Raises:
            ValueError: If the head scores answers alone: its config has no `prompt_threshold`.

        Example:

            >>> import torch
            >>> from safespec_hf import SafetyHead, SafetyHeadConfig
            >>> config = SafetyHeadConfig(hidden_size=8, hidden_layers=[1], prompt_threshold=0.5)
            >>> SafetyHead(config).prompt_risk(torch.zeros(2, 8)).tolist()
            [0.5, 0.5]
        """
        if self.prompt_probe is None:
            raise ValueError("The head scores answers alone: its config has no `prompt_threshold`.")
        weight = self.prompt_probe.weight
        return torch.sigmoid(self.prompt_probe(states.to(weight.device, weight.dtype)).squeeze(-1).float())

    def save_pretrained(  # type: ignore[override]  # transformers' own keywords are in `kwargs`
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        report: Report | None = None,
        license: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """`save_head`, by the name that transformers gives it.

        Args:
            save_directory (`str` or `os.PathLike`): Folder; made if it is missing.
            is_main_process (`bool`, *optional*, defaults to `True`): Only the main one of many processes saves.
            report, license: As for `save_head`.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Publish it as well, as `repo_id`; other keywords are those of [`push_to_hub`].
            kwargs: As for [`~transformers.PreTrainedModel.save_pretrained`].

        Raises:
            SafeSpecError: If `repo_id`, `revision` or `license` can't be one.
        """
        pushed = {name: kwargs.pop(name) for name in _PUSH_KWARGS if name in kwargs} if push_to_hub else {}
        if push_to_hub:
            # transformers' default is the folder's name, in the name space of whoever is logged in
            repo_id = pushed.pop("repo_id", Path(save_directory).name)
            check_destination(repo_id, pushed.get("revision"))
        if is_main_process:
            save_folder(self, save_directory, report, license, **kwargs)
        if push_to_hub and is_main_process:
            publish(type(self), save_directory, repo_id, license=license, **pushed)

    def push_to_hub(  # type: ignore[override]  # transformers' own keywords are in `kwargs`
        self, repo_id: str, *, report: str | os.PathLike[str] | None = None, license: str | None = None, **kwargs: Any
    ) -> str:
        """`push_head`, by the name that transformers gives it.

        Args:
            repo_id (`str`): `owner/name`; made if it is missing.
            report, license: As for `push_head`.
            kwargs: `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`, `tags`.

        Returns:
            `str`: The address of the repository, or of the branch in it.
        """
        # a head is small: it is not cut into shards
        kwargs.pop("max_shard_size", None)
        return publish(type(self), self, repo_id, report=report, license=license, **kwargs)


def target_binding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """What ties a head to its target.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Its tokenizer, for the fingerprint.

    Returns:
        `dict`: `model_id` (`None` for a local folder), `revision`, `architecture`, `hidden_size`, `num_layers`,
        `vocab_size` and `tokenizer`, the fingerprint.
    """
    text_config = model.config.get_text_config(decoder=True)
    name = model.config.name_or_path
    return {
        "model_id": name if is_hub_id(name or "") else None,
        "revision": commit_hash(model.config),
        "architecture": _architecture(type(model)),
        "hidden_size": text_config.hidden_size,
        "num_layers": text_config.num_hidden_layers,
        "vocab_size": text_config.vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }


def is_hub_id(name: str) -> bool:
    """Whether a model of that name came from the Hub, as far as it shows: a folder may be out of reach by now."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    if os.path.isdir(name):
        return False
    return "/" in name or os.path.isdir(os.path.join(constants.HF_HUB_CACHE, f"models--{name}"))


def _architecture(model_class: type) -> str:
    """The name of a model's class; of a subclass made at run time, as FSDP makes, that of the class under it."""
    for cls in model_class.__mro__:
        is_named = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
        if issubclass(cls, PreTrainedModel) and (is_named or "<locals>" in cls.__qualname__):
            return cls.__name__
    return model_class.__name__


def check_target(
    head: StrictModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ignore: tuple[str, ...] = (),
) -> None:
    """Raises unless `head` may read this target.

    Tokens that were added after the vocabulary the head knows, such as one for padding, and embeddings that were
    resized for them, change nothing about the states of all others.

    Raises:
        HeadMismatchError: Names every field that differs.
    """
    found, bound = target_binding(model, tokenizer), head.config.target or {}
    if tokenizer is not None and is_extension(tokenizer, bound.get("tokenizer")):
        found |= {"tokenizer": bound["tokenizer"], "vocab_size": bound.get("vocab_size")}
    check_binding(head, found, ignore)


def check_usable(head: SafetyHead, model: PreTrainedModel) -> None:
    """Raises for a head that was changed since it was loaded, so that it could no longer read, or never flag.

    Raises:
        UnsupportedRequestError: Names the field, its legal range and its value.
    """
    config, num_layers = head.config, model.config.get_text_config(decoder=True).num_hidden_layers
    try:
        config.check()
    except (TypeError, ValueError) as error:
        raise UnsupportedRequestError(f"The safety head's config was changed after loading: {error}") from error
    if (head.prompt_probe is None) != (config.prompt_threshold is None):
        raise UnsupportedRequestError(
            f"The safety head's config was changed after loading: `prompt_threshold={config.prompt_threshold}`, but "
            f"the head has {'no' if head.prompt_probe is None else 'a'} probe for prompts. `safespec train-prompts` "
            "gives it one, and `SafeSpecConfig(screen_prompts=False)` leaves prompts alone."
        )
    num_inputs = cast("nn.Linear", head.mlp[0]).in_features
    if config.num_features != num_inputs or max(config.hidden_layers or [0]) > num_layers:
        raise UnsupportedRequestError(
            f"The safety head's config was changed after loading: its weights take {num_inputs} features, and the "
            f"target has hidden states 0 to {num_layers}, but the config says hidden_size={config.hidden_size} and "
            f"hidden_layers={config.hidden_layers}. Load the head again."
        )


def check_binding(head: StrictModel, found: dict[str, Any], ignore: tuple[str, ...] = ()) -> None:
    """Raises unless `head` may read the target that `found` (a [`target_binding`]) describes.

    A field that either side does not know (`None`) is not compared. A head whose binding tells nothing about this
    target but its width is bound to nothing.

    Raises:
        HeadMismatchError: Names every field that differs.
    """
    bound = head.config.target or {}
    known = [name for name, value in found.items() if None not in (bound.get(name), value)]
    if set(known) <= {"hidden_size"}:
        raise HeadMismatchError({"target": (None, found["model_id"] or found["architecture"])}, head.title)
    mismatches = {
        name: (bound[name], found[name]) for name in known if name not in ignore and bound[name] != found[name]
    }
    if head.config.hidden_size != found["hidden_size"]:
        mismatches["hidden_size"] = (head.config.hidden_size, found["hidden_size"])
    if max(head.config.hidden_layers or [0]) > found["num_layers"]:
        mismatches["hidden_layers"] = (head.config.hidden_layers, f"{found['num_layers']} layers")
    if mismatches:
        raise HeadMismatchError(mismatches, head.title)


AutoConfig.register("safespec_head", SafetyHeadConfig, exist_ok=True)
AutoModel.register(SafetyHeadConfig, SafetyHead, exist_ok=True)
