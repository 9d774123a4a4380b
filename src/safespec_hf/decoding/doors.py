"""The ways in which a request for safety reaches a model: each leads to a policy, or raises."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from ..config import SafeSpecConfig
from ..engine.private_names import is_from_model_config, keep_as_own
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead
from .attachment import Attachment

GENERATING = ("generate", "generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def check_attachable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    policy: SafeSpecConfig | None,
    always: bool,
    unused: Mapping[str, Any],
) -> None:
    """Raises for arguments of `attach_safety_head` that would be of no effect, or of another one than was meant.

    Raises:
        TypeError: Names the argument.
        UnsupportedRequestError: If the instance's own `generate` would go before the guarded one, or if `always` is to
            guard with a policy that only observes.
    """
    if unused:
        raise TypeError(f"{sorted(unused)} are for loading a head, but `head` is loaded already. Take them off.")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` must be a transformers tokenizer, but it is a {type(tokenizer).__name__}.")
    if policy is not None and not isinstance(policy, SafeSpecConfig):
        raise TypeError(f"`policy` must be a SafeSpecConfig, but it is a {type(policy).__name__}.")
    if always and policy is not None and policy.policy == "observe":
        raise UnsupportedRequestError("`policy='observe'` guards nothing, and so contradicts `always=True`.")
    own = sorted(name for name in GENERATING if name in vars(model))
    if own and "_safespec" not in vars(model):
        raise UnsupportedRequestError(
            f"This model's `{own[0]}` was replaced on the instance, by code of its repository or by another library, "
            f"and would run instead of the guarded one. Take it off first: `del model.{own[0]}`."
        )


def choose_policy(
    attachment: Attachment, safespec: bool | SafeSpecConfig | None, *configs: GenerationConfig
) -> SafeSpecConfig | None:
    """The policy of a call, or `None` for an unguarded one.

    A `safespec` entry of a generation config counts as well: transformers would accept it and run unguarded.

    Args:
        attachment ([`Attachment`]): What the model carries.
        safespec (`bool` or [`SafeSpecConfig`], *optional*): The argument, which goes before all configs.
        configs ([`~transformers.GenerationConfig`]): The first that says anything counts.

    Raises:
        TypeError: If it is neither a `bool` nor a [`SafeSpecConfig`], nor in a config the dict of one.
        ValueError: If a dict is not that of a policy; names the field.
        UnsupportedRequestError: If safety is switched off on a model that is always guarded.
    """
    if safespec is None:
        entries = (getattr(config, "safespec", None) for config in configs)
        safespec = next((entry for entry in entries if entry is not None), None)
        if isinstance(safespec, dict):
            safespec = SafeSpecConfig.from_dict(safespec)
    if safespec is not None and not isinstance(safespec, (bool, SafeSpecConfig)):
        raise TypeError(f"`safespec` must be a bool or a SafeSpecConfig, but it is a {type(safespec).__name__}.")
    if safespec is False and attachment.always:
        raise UnsupportedRequestError(
            "`safespec=False` on a model whose head was attached with `always=True`. Use `detach_safety_head` first."
        )
    if isinstance(safespec, SafeSpecConfig) and safespec.policy == "observe" and attachment.always:
        raise UnsupportedRequestError(
            "`policy='observe'` guards nothing, and this model's head was attached with `always=True`. Attach it "
            "again without."
        )
    if isinstance(safespec, SafeSpecConfig):
        return safespec
    return attachment.policy if safespec or attachment.always else None


def keep_request(model: PreTrainedModel) -> None:
    """Sees to it that a `safespec` in the model's generation config survives saving and loading.

    transformers marks a generation config that it made from a model's config, saves the mark, and drops all entries
    that it does not know when it reads such a file. So what was dropped is read again, and the mark taken off.
    """
    config = model.generation_config
    if not is_from_model_config(config):
        return
    keep_as_own(config)
    if getattr(config, "safespec", None) is None:
        saved = _saved_generation_config(model.config.name_or_path)
        if saved.get("safespec") is not None:
            config.update(safespec=saved["safespec"], allow_custom_entries=True)


def _saved_generation_config(name: str | None) -> dict[str, Any]:
    if not name:
        return {}
    try:
        file = cached_file(name, GENERATION_CONFIG_NAME, local_files_only=True)
    except (OSError, ValueError):
        return {}
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def check_keywords(kwargs: Mapping[str, Any], configs: Sequence[GenerationConfig]) -> None:
    """Raises for arguments that would take `generate` past the guarded loop, or run the model before it.

    Raises:
        UnsupportedRequestError: Names the argument.
    """
    for name, why in (
        ("custom_generate", "is a decoding strategy of its own"),
        ("synced_gpus", "needs all processes to run the same number of forwards"),
        ("inputs_embeds", "hides the prompt's tokens; pass `input_ids`"),
    ):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedRequestError(f"`{name}` can't be combined with `safespec`: it {why}.")
    if kwargs.get("cache_implementation") == "paged":
        raise UnsupportedRequestError("`cache_implementation='paged'` switches to continuous batching, unguarded.")
    if asked("token_healing", kwargs, configs):
        raise UnsupportedRequestError(
            "`token_healing` can't be combined with `safespec`: it writes the prompt's last token anew, unguarded."
        )


def asked(name: str, kwargs: Mapping[str, Any], configs: Sequence[GenerationConfig]) -> Any:
    """The value of a setting, before transformers fills in its defaults: the argument's, else that of a config."""
    values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in values if value is not None), None)


def num_assistant_tokens(
    kwargs: Mapping[str, Any], configs: Sequence[GenerationConfig], assistant: PreTrainedModel | None
) -> int | None:
    """How many drafts per round were asked for: by an argument, a generation config, or that of the draft model.

    Raises:
        UnsupportedRequestError: If it is not a whole number >= 1.
    """
    if assistant is not None and not isinstance(assistant, DraftHead):
        configs = [*configs, assistant.generation_config]
    number = asked("num_assistant_tokens", kwargs, configs)
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise UnsupportedRequestError(f"`num_assistant_tokens` must be an integer >= 1, but it is {number!r}.")
    return number
