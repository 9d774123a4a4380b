"""`attach_safety_head` gives one model instance a `generate(..., safespec=...)`. The class it had stays its class."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast, overload

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from .config import SafeSpecConfig
from .decoding.adapters import look_at
from .decoding.assistant import Draft, as_draft, check_assistant
from .decoding.attachment import Attachment, find_threshold
from .decoding.call import GuardedCall
from .decoding.doors import (
    check_attachable,
    check_keywords,
    choose_policy,
    enter_own_repository,
    find_schedule,
    keep_request,
    take_assistant,
)
from .decoding.draft_screen import check_draft_head
from .decoding.support import check_kind, check_model
from .engine.packing import release_packed
from .engine.private_names import GenerateSteps, check_private_names, mark_user_cache
from .errors import UnsupportedRequestError
from .heads.draft_head import DraftHead
from .heads.safety_head import SafetyHead, check_target, check_usable
from .heads.tokenizers import find_tokenizer
from .outputs import SafeSpecOutput

Model = TypeVar("Model", bound=PreTrainedModel)

if TYPE_CHECKING:

    class _Model(PreTrainedModel, GenerationMixin):
        def __getattr__(self, name: str) -> Any: ...  # what the model's own class has

else:
    _Model = object


def attach_safety_head(
    model: PreTrainedModel,
    head: SafetyHead | str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policy: SafeSpecConfig | None = None,
    always: bool = False,
    draft: PreTrainedModel | None = None,
    draft_head: SafetyHead | str | os.PathLike[str] | None = None,
    ignore_mismatches: tuple[str, ...] = (),
    **hub_kwargs: Any,
) -> GuardedModel:
    """Gives a model's `generate` the argument `safespec`, and returns the same model.

    `model.generate(..., safespec=True)`, or with a [`SafeSpecConfig`], decodes under the head's eye; add
    `assistant_model=` or `prompt_lookup_num_tokens=` for speed. Without `safespec`, `generate` is what it was. The
    instance keeps its class, so `isinstance`, `save_pretrained`, pipelines and device maps work as before.

    Args:
        model ([`~transformers.PreTrainedModel`]): A decoder-only language model. For a PEFT model, its base model.
        head ([`SafetyHead`], `str` or `os.PathLike`): The head, or its Hub id or folder.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Default: the one beside the model.
        policy ([`SafeSpecConfig`], *optional*): What `safespec=True` means. Default: `SafeSpecConfig()`.
        always (`bool`, defaults to `False`): Guard every `generate`, with the default policy where none is given.
        draft ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*):
            What drafts in guarded calls that have neither an `assistant_model` nor another source of drafts.
        draft_head ([`SafetyHead`], `str` or `os.PathLike`, *optional*):
            A head of that draft, which is then a language model: of the candidates that the draft samples in a
            recovery, the target reads only those that this head finds safe, or else the safest. The target's head
            has the last word, as without it. It also sorts segments, with `num_draft_segments`. Not part of an export.
        ignore_mismatches (`tuple[str, ...]`, defaults to `()`):
            Fields of the target binding to excuse, such as `"model_id"` for a fine-tune that was checked.
        hub_kwargs: For loading the head: `revision`, `token`, `cache_dir`, ...

    Raises:
        HeadMismatchError: If the head was trained for another target; says which field differs.
        UnsupportedRequestError: If this kind of model can't be guarded.
        TypeError: If `model` is not a transformers model that can generate, or another argument is of a wrong type.

    Returns:
        [`GuardedModel`]: The same model. `model.safety` tells what was attached.

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
            "model, attach the head to `model.get_base_model()`; a compiled one gets its head before `torch.compile`; "
            "of `DataParallel` and the like it is `model.module` that generates."
        )
    check_private_names()
    check_attachable(model, tokenizer, policy, always, hub_kwargs if isinstance(head, SafetyHead) else {})
    check_kind(model)
    if not isinstance(head, SafetyHead):
        head = SafetyHead.from_pretrained(head, **hub_kwargs)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model.config.name_or_path or "")
    check_target(head, model, tokenizer, ignore_mismatches)
    check_usable(head, model)
    find_threshold(policy or SafeSpecConfig(), head)  # that there is none is told now
    check_model(model)  # late, since it takes forwards
    draft = as_draft(draft)
    if isinstance(draft, DraftHead):
        draft.bind(model, ignore_mismatches)
    if tokenizer is not None:
        check_assistant(model, Draft(draft), tokenizer)
    if draft_head is not None:
        if not isinstance(draft_head, SafetyHead):
            draft_head = SafetyHead.from_pretrained(draft_head)
        check_draft_head(draft_head, draft, tokenizer, ignore_mismatches)
    keep_request(model)
    # only now: a head that was refused must not cost the model the one it had
    guarded = cast("GuardedModel", model)
    looks = look_at(model)
    guarded._safespec = Attachment(
        head,
        policy or SafeSpecConfig(),
        always,
        tokenizer,
        ignore_mismatches,
        draft,
        weights=looks,
        draft_head=draft_head,
    )
    if not isinstance(model, GuardedModel):
        plain_class: Any = type(model)
        guarded.__class__ = guarded_class(plain_class)
    return guarded


def detach_safety_head(model: Model) -> Model:
    """Undoes [`attach_safety_head`]; does nothing to a model without a head.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model; returned.

    Raises:
        UnsupportedRequestError: If the model's generation config asks for `safespec`, which would be ignored without a
            head, or if another library has put a class on top of ours that can't be rebuilt without it.
    """
    if isinstance(model, GuardedModel):
        if getattr(model.generation_config, "safespec", None):
            raise UnsupportedRequestError(
                "The model's generation config asks for `safespec`, and without a head transformers would ignore that "
                "and answer unguarded. Take it off first: `del model.generation_config.safespec`."
            )
        model.__class__ = _without_guard(type(model))
        del model._safespec
        release_packed(model)
    return model


class _GuardedKwargs(dict[str, Any]):
    """The arguments of a guarded call, by which what transformers asks on the way knows that it is one."""


class GuardedModel(GenerateSteps, _Model):
    """A model with a safety head: what [`attach_safety_head`] returns, for annotations and `isinstance`.

    It is a subclass, made at run time, of the class that the model had. It is not for subclassing.
    """

    _safespec: Attachment
    _plain_class: ClassVar[type[PreTrainedModel]]

    @property
    def safety(self) -> Attachment:
        """What is attached: `head`, `policy`, `risk_threshold`, `always`, `tokenizer`. Attach again to change it."""
        return self._safespec

    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        safespec: Literal[True] | SafeSpecConfig,
        return_dict_in_generate: Literal[True],
        **kwargs: Any,
    ) -> SafeSpecOutput: ...
    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: None = None,
        *,
        safespec: Literal[True] | SafeSpecConfig,
        return_dict_in_generate: Literal[False] = False,
        **kwargs: Any,
    ) -> Tensor: ...
    @overload
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        safespec: bool | SafeSpecConfig | None = None,
        **kwargs: Any,
    ) -> Any: ...
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
            safespec (`bool` or [`SafeSpecConfig`], *optional*):
                `True` for the policy of the attachment. Default: what the generation config says, the given one or
                else the model's; there it may also be the dict of [`~SafeSpecConfig.to_dict`].

        Returns:
            As without `safespec`; with `return_dict_in_generate=True` a [`SafeSpecOutput`].

        Raises:
            SafeSpecError: Before the first forward, if the request can't be met safely.
        """
        safespec = enter_own_repository(self.safety, safespec, kwargs)
        configs = (
            [self.generation_config] if generation_config is None else [generation_config, self.generation_config]
        )
        policy = choose_policy(self.safety, safespec, *configs)
        if policy is None:
            return super().generate(inputs, generation_config, *args, **kwargs)
        if args:
            raise TypeError("With `safespec`, pass all arguments of `generate` after `generation_config` by name.")
        check_keywords(kwargs, configs)
        mark_user_cache(kwargs)
        assistant = take_assistant(self.safety, self, kwargs, configs)
        schedule = find_schedule(kwargs, configs, assistant)
        call = GuardedCall(
            policy,
            assistant,
            kwargs.get("streamer"),
            schedule.num_tokens,
            assistant_tokenizer=kwargs.pop("assistant_tokenizer", None),
            is_heuristic=schedule.is_heuristic,
        )
        output = super().generate(inputs, generation_config, custom_generate=call, **kwargs)
        if not call.has_run:
            raise UnsupportedRequestError(
                f"Nothing guarded the answer: `{type(self).__name__}.generate` drops `custom_generate`."
            )
        return output

    def _kept_mode_kwargs(self, strategy: Any, given: Mapping[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        # transformers drops the tokenizer for a callable, and stop strings with it
        is_ours = isinstance(strategy, GuardedCall)
        return _GuardedKwargs(kept, tokenizer=given.get("tokenizer")) if is_ours else kept

    def _validated_mode(self, mode: GenerationMode, config: GenerationConfig, kwargs: Any) -> GenerationMode:
        # transformers' assisted decoding can't take recurrent states back, nor write several answers; ours can
        is_ours = isinstance(kwargs, _GuardedKwargs) and mode == GenerationMode.ASSISTED_GENERATION
        return GenerationMode.GREEDY_SEARCH if is_ours else mode

    def generate_batch(self, *args: Any, safespec: bool | SafeSpecConfig | None = None, **kwargs: Any) -> Any:
        """Continuous batching, which can't be guarded: raises if `safespec` is asked for in any way."""
        self._refuse_request("generate_batch", safespec, *args, *kwargs.values())
        return super().generate_batch(*args, **kwargs)

    def init_continuous_batching(
        self, *args: Any, safespec: bool | SafeSpecConfig | None = None, **kwargs: Any
    ) -> Any:
        """Continuous batching, which can't be guarded: raises if `safespec` is asked for in any way."""
        self._refuse_request("init_continuous_batching", safespec, *args, *kwargs.values())
        return super().init_continuous_batching(*args, **kwargs)

    def continuous_batching_context_manager(
        self, *args: Any, safespec: bool | SafeSpecConfig | None = None, **kwargs: Any
    ) -> Any:
        """Continuous batching, which can't be guarded: raises if `safespec` is asked for in any way."""
        self._refuse_request("continuous_batching_context_manager", safespec, *args, *kwargs.values())
        return super().continuous_batching_context_manager(*args, **kwargs)

    def _refuse_request(self, name: str, safespec: bool | SafeSpecConfig | None, *arguments: Any) -> None:
        configs = [value for value in (*arguments, self.generation_config) if isinstance(value, GenerationConfig)]
        if choose_policy(self.safety, safespec, *configs) is not None:
            always = (
                "this model's head was attached with `always=True`" if self.safety.always else "`safespec` asks for it"
            )
            raise UnsupportedRequestError(
                f"`{name}` can't be guarded, and {always}. Use `generate`, which takes batches of any size."
            )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """[`~transformers.PreTrainedModel.save_pretrained`]; a `safespec` in the generation config is saved, too."""
        keep_request(self)
        super().save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(max(protocol, 2))
        if "_plain_class" not in vars(type(self)):
            return reduced  # another library's class is on top of ours: it is copied as it would be without us
        # our class can't be found by name, so copies and pickles are rebuilt from the original one
        return _rebuild, (type(self)._plain_class, *reduced[1][1:]), *reduced[2:]


@functools.cache
def guarded_class(model_class: type) -> Any:
    """The subclass of `model_class` with a guarded `generate`; it keeps the name, which configs and pipelines read."""
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(model_class.__name__, (GuardedModel, model_class), {**names, "_plain_class": model_class})


def _rebuild(model_class: type) -> Any:
    guarded = guarded_class(model_class)
    return guarded.__new__(guarded)


def _without_guard(model_class: type) -> Any:
    """The class without ours in it. FSDP, parametrizations and others may have put theirs on top, and keep it.

    Raises:
        UnsupportedRequestError: If theirs is bound to the class it was written as.
    """
    if "_plain_class" in vars(model_class):
        return vars(model_class)["_plain_class"]
    if not issubclass(model_class, GuardedModel):
        return model_class
    names = {name: value for name, value in vars(model_class).items() if name not in ("__dict__", "__weakref__")}
    functions = [value for value in names.values() if isinstance(value, FunctionType)]
    if any(cell.cell_contents is model_class for function in functions for cell in function.__closure__ or ()):
        raise UnsupportedRequestError(
            f"{model_class.__qualname__} was put on top of the guarded model and calls `super()`, so it can't be "
            "taken apart. Undo it first, then detach the head."
        )
    metaclass: Any = type(model_class)
    return metaclass(model_class.__name__, tuple(map(_without_guard, model_class.__bases__)), names)
