"""`attach_safety_head` gives one model instance a `generate(..., safespec=...)`. The class it had stays its class."""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import SafeSpecConfig
from .decoding.attachment import Attachment
from .decoding.call import GuardedCall
from .decoding.support import check_model
from .errors import UnsupportedRequestError
from .heads.safety_head import SafetyHead, check_binding, target_binding

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


def attach_safety_head(
    model: Model,
    head: SafetyHead | str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    always: bool = False,
    ignore_mismatches: tuple[str, ...] = (),
    **hub_kwargs: Any,
) -> Model:
    """Gives a model's `generate` the argument `safespec`, and returns the same model.

    `model.generate(..., safespec=True)`, or with a [`SafeSpecConfig`], decodes under the head's eye; add
    `assistant_model=` or `prompt_lookup_num_tokens=` for speed. Without `safespec`, `generate` is what it was. The
    instance keeps its class, so `isinstance`, `save_pretrained`, pipelines and device maps work as before.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only language model. For a PEFT model, its base model.
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or its Hub id or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Default: the one beside the model.
        always (`bool`, defaults to `False`): Guard every `generate`, with the default policy where none is given.
        ignore_mismatches (`tuple[str, ...]`, defaults to `()`):
            Fields of the target binding to excuse, such as `"model_id"` for a fine-tune that was checked.
        hub_kwargs: For loading the head: `revision`, `token`, `cache_dir`, ...

    Raises:
        HeadMismatchError: If the head was trained for another target; says which field differs.
        UnsupportedRequestError: If this kind of model can't be guarded.
        TypeError: If `model` is not a transformers model that can generate.

    Example:

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from safespec_hf import SafetyHead, SafetyHeadConfig, attach_safety_head, target_binding
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, num_key_value_heads=2))
        >>> head = SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1], target=target_binding(model)))
        >>> isinstance(attach_safety_head(model, head), LlamaForCausalLM)
        True
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise TypeError(
            f"`model` must be a transformers model that can generate, but it is a {type(model).__name__}. For a PEFT "
            "model, attach the head to `model.get_base_model()`."
        )
    check_model(model)
    if not isinstance(head, SafetyHead):
        head = SafetyHead.from_pretrained(head, **hub_kwargs)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model)
    check_binding(head, target_binding(model, tokenizer), ignore_mismatches)
    detach_safety_head(model)  # only now: a head that was refused must not cost the model the one it had
    model._safespec = Attachment(head.eval().to(model.device), always, ignore_mismatches, tokenizer)
    model.__class__ = guarded_class(type(model))
    return model


def detach_safety_head(model: Model) -> Model:
    """Undoes [`attach_safety_head`]; does nothing to a model without a head.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model; returned.
    """
    if isinstance(model, Guarded):
        model.__class__ = type(model).__mro__[2]
        del model._safespec
    return model


class Guarded:
    """Mixed in before a model's class by [`attach_safety_head`]. Use that; this is not for subclassing."""

    _safespec: Attachment

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        safespec: bool | SafeSpecConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """[`~transformers.GenerationMixin.generate`], guarded when `safespec` says so.

        Args:
            safespec (`bool` or [`SafeSpecConfig`], *optional*): `True` for the default policy.

        Returns:
            As without `safespec`; with `return_dict_in_generate=True` a [`SafeSpecOutput`].

        Raises:
            SafeSpecError: Before the first forward, if the request can't be met safely.
        """
        policy = choose_policy(self._safespec, safespec, generation_config, self.generation_config)  # type: ignore[attr-defined]
        generate = super().generate  # type: ignore[misc]
        if policy is None:
            return generate(inputs, generation_config, *args, **kwargs)
        if args:
            raise TypeError("With `safespec`, pass all arguments of `generate` after `generation_config` by name.")
        check_keywords(kwargs)
        call = GuardedCall(
            policy, kwargs.pop("assistant_model", None), kwargs.get("streamer"), kwargs.get("num_assistant_tokens")
        )
        return generate(inputs, generation_config, custom_generate=call, **kwargs)

    def _extract_generation_mode_kwargs(
        self, custom_generate: Any, kwargs: dict[str, Any], *args: Any
    ) -> dict[str, Any]:
        # transformers drops the tokenizer for a callable, and stop strings with it
        tokenizer = kwargs.get("tokenizer")
        mode_kwargs = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args)  # type: ignore[misc]
        return mode_kwargs | {"tokenizer": tokenizer} if isinstance(custom_generate, GuardedCall) else mode_kwargs

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, which can't be guarded."""
        self._refuse_if_always("generate_batch")
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching, which can't be guarded."""
        self._refuse_if_always("init_continuous_batching")
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _refuse_if_always(self, name: str) -> None:
        if self._safespec.always:
            raise UnsupportedRequestError(
                f"`{name}` can't be guarded, and this model's head was attached with `always=True`."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the dynamic class can't be found by name, so copies and pickles are rebuilt from the original one
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@functools.cache
def guarded_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of `model_class` with a guarded `generate`; it keeps the name, which configs and pipelines read."""
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (Guarded, model_class), names)


def _rebuild(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    guarded = guarded_class(model_class)  # type: ignore[arg-type]  # classes are hashable
    return guarded.__new__(guarded)


def choose_policy(
    attachment: Attachment,
    safespec: bool | SafeSpecConfig | None,
    generation_config: GenerationConfig | None,
    model_config: GenerationConfig,
) -> SafeSpecConfig | None:
    """The policy of a call, or `None` for an unguarded one.

    A `safespec` entry of a generation config counts as well: transformers would accept it and run unguarded.

    Raises:
        TypeError: If it is neither a `bool` nor a [`SafeSpecConfig`].
        UnsupportedRequestError: If safety is switched off on a model that is always guarded.
    """
    for config in (generation_config, model_config):
        safespec = getattr(config, "safespec", None) if safespec is None else safespec
    if safespec is not None and not isinstance(safespec, (bool, SafeSpecConfig)):
        raise TypeError(f"`safespec` must be a bool or a SafeSpecConfig, but it is a {type(safespec).__name__}.")
    if safespec is False and attachment.always:
        raise UnsupportedRequestError(
            "`safespec=False` on a model whose head was attached with `always=True`. Use `detach_safety_head` first."
        )
    if isinstance(safespec, SafeSpecConfig):
        return safespec
    return SafeSpecConfig() if safespec or attachment.always else None


def check_keywords(kwargs: dict[str, Any]) -> None:
    """Raises for arguments that would take `generate` past the guarded loop.

    Raises:
        UnsupportedRequestError: Names the argument.
    """
    for name, why in (
        ("custom_generate", "is a decoding strategy of its own"),
        ("assistant_tokenizer", "means a draft model with another tokenizer; use one that shares the target's"),
        ("synced_gpus", "needs all processes to run the same number of forwards"),
        ("inputs_embeds", "hides the prompt's tokens; pass `input_ids`"),
    ):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise UnsupportedRequestError(f"`{name}` can't be combined with `safespec`: it {why}.")
    if kwargs.get("cache_implementation") == "paged":
        raise UnsupportedRequestError("`cache_implementation='paged'` switches to continuous batching, unguarded.")


def find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model's weights, if there is one."""
    if not model.config.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.config.name_or_path)
    except (OSError, ValueError) as error:
        logger.warning("safespec-hf found no tokenizer for %s (%s).", model.config.name_or_path, type(error).__name__)
        return None
