"""What the code of an exported repository calls: it loads the target with its head on, or nothing at all.

The repository's own files only import from here. So whoever loads it has this package installed, and its fixes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..decoding.attachment import origin_of
from ..decoding.doors import asked
from ..errors import HeadFileError, UnsupportedRequestError
from ..heads.draft_head import DraftHead, DraftHeadConfig
from ..heads.safety_head import SafetyHead
from ..modeling import GuardedModel, attach_safety_head
from .manifest import AUTO_MAP, Manifest, Part, read_manifest, take_hub_kwargs

logger = logging.get_logger(__name__)
_attaching = threading.Lock()


class GuardedConfig:
    """What `AutoConfig` finds in an exported repository: it gives the target's own config.

    The config says which class is to load the model: ours, whatever class would fit it.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: a model that is saved again is the target, which needs no code."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> Any:
        """The config of the target.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub id of the repository.
            kwargs: As for [`~transformers.AutoConfig.from_pretrained`].

        Raises:
            HeadFileError: If the repository is none that this version can read.
        """
        hub_kwargs = _own_hub_kwargs(kwargs)
        where, arguments = read_manifest(name, hub_kwargs).target.locate(name, hub_kwargs)
        found = AutoConfig.from_pretrained(where, **arguments, **kwargs)
        config: Any = found[0] if isinstance(found, tuple) else found
        # servers and pipelines look for a class by this name, beside transformers' auto classes
        config.auto_map, config.architectures = AUTO_MAP, ["AutoModelForCausalLM"]
        return found


class GuardedModelForCausalLM:
    """What `AutoModelForCausalLM` finds in an exported repository: it gives the target, always guarded."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Does nothing: a model that is saved again is the target, which needs no code."""

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *model_args: Any, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> Any:
        """The target with its safety head, attached with `always=True`, and its draft.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub id of the repository.
            config ([`~transformers.PreTrainedConfig`], *optional*): Of the target. Default: its own.
            kwargs: As for [`~transformers.PreTrainedModel.from_pretrained`].

        Returns:
            [`GuardedModel`]: Of the target's class; with `output_loading_info=True` a tuple of it and that.

        Raises:
            HeadFileError: If a part is missing or damaged.
            HeadMismatchError: If the head was trained for another target.
            UnsupportedRequestError: If the target can't be guarded.
        """
        hub_kwargs = _own_hub_kwargs(kwargs)
        manifest = read_manifest(name, hub_kwargs)
        where, arguments = manifest.target.locate(name, hub_kwargs)
        model_class, config = _choose_class(manifest.target, where, config, arguments)
        head = load_head(manifest, name, hub_kwargs)  # first: it is small, and the target is not
        found = model_class.from_pretrained(where, *model_args, config=config, **arguments, **kwargs)
        model: Any = found[0] if isinstance(found, tuple) else found
        if kwargs.get("generation_config") is None:
            model.generation_config = GenerationConfig.from_pretrained(name, **hub_kwargs)
        _name_copy(model, manifest)
        tokenizer = load_tokenizer(name, config, hub_kwargs)
        _attach(model, head, manifest, tokenizer, Source(name, hub_kwargs), always=True)
        return found


class NoDecisionModel:
    """What `AutoModelForDecision` finds in an exported repository: a no, after which servers ask for a text model."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForDecision") -> None:
        """Does nothing."""

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **kwargs: Any) -> NoReturn:
        """Raises.

        Raises:
            UnsupportedRequestError: Always.
        """
        raise UnsupportedRequestError(f"{str(name)!r} is a guarded model, which writes text and takes no decisions.")


class Source(NamedTuple):
    """The repository that parts are loaded from."""

    name: str | os.PathLike[str]
    hub_kwargs: Mapping[str, Any]


def generate(
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    model: PreTrainedModel,
    **kwargs: Any,
) -> Any:
    """What `model.generate(..., custom_generate="owner/name", trust_remote_code=True)` runs: guarded decoding.

    The head of the repository is attached to the model, once, and stays there: `detach_safety_head` takes it off.

    Args:
        inputs, generation_config: As for [`~transformers.GenerationMixin.generate`].
        model ([`~transformers.PreTrainedModel`]): The model, which must be the head's target.
        kwargs: The other arguments of the call, and `revision`, `token` and the like of the repository.

    Raises:
        HeadMismatchError: If the head was trained for another target.
        UnsupportedRequestError: If the call or the model can't be guarded, or if another head is attached.
    """
    asked_for = _asked_repository()
    source = Source(asked_for or model.config.name_or_path or "", take_hub_kwargs(kwargs))
    guarded = _attach_once(model, source, is_bound=asked_for is None)
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    request = asked("safespec", kwargs, configs)
    if request is False:
        raise UnsupportedRequestError(f"`safespec=False` contradicts `custom_generate={str(source.name)!r}`.")
    if request is None:
        kwargs["safespec"] = True
    return guarded.generate(inputs, generation_config, **kwargs)


def _attach_once(model: PreTrainedModel, source: Source, is_bound: bool) -> GuardedModel:
    with _attaching:
        if is_bound:
            # transformers bound it to the model when that was loaded from a folder of the repository
            vars(model).pop("generate", None)
        if not isinstance(model, GuardedModel):
            manifest = read_manifest(*source)
            head = load_head(manifest, *source)
            tokenizer = load_tokenizer(source.name, model.config, source.hub_kwargs)
            _attach(model, head, manifest, tokenizer, source, always=is_bound)
        elif model.safety.origin != origin_of(source.name, source.hub_kwargs.get("revision")):
            raise UnsupportedRequestError(
                f"`custom_generate={str(source.name)!r}` brings a safety head, but this model has one from elsewhere. "
                "Generate with that one, `safespec=True`, or take it off first: `detach_safety_head(model)`."
            )
    return model  # type: ignore[return-value]  # its class was changed


def _attach(
    model: Any, head: SafetyHead, manifest: Manifest, tokenizer: PreTrainedTokenizerBase, source: Source, always: bool
) -> None:
    attach_safety_head(
        model,
        head,
        tokenizer=tokenizer,
        policy=manifest.policy,
        always=always,
        draft=_load_draft(model, manifest, source),
        ignore_mismatches=manifest.ignore_mismatches,
    )
    model._safespec = replace(model._safespec, origin=origin_of(source.name, source.hub_kwargs.get("revision")))


def _own_hub_kwargs(kwargs: MutableMapping[str, Any]) -> dict[str, Any]:
    """Takes what is about the repository out of the arguments; the rest is the target's."""
    for name in ("adapter_kwargs", "code_revision", "trust_remote_code", "name_or_path"):
        kwargs.pop(name, None)
    return take_hub_kwargs(kwargs)


def _choose_class(
    target: Part, where: str, config: Any, arguments: Mapping[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that was exported, with a config that leads nowhere else."""
    architecture = target.architecture or ""
    model_class: Any = getattr(transformers, architecture, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        raise UnsupportedRequestError(
            f"The target is a {architecture!r}, which transformers {transformers.__version__} does not have."
        )
    config = AutoConfig.from_pretrained(where, **arguments) if config is None else copy.deepcopy(config)
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and model_class.config_class is text_class:
        config = config.get_text_config()
    vars(config).pop("auto_map", None)
    config.architectures = [architecture]
    return model_class, config


def _name_copy(model: PreTrainedModel, manifest: Manifest) -> None:
    """Lets a copy of a target answer to the id of the original, which its heads are bound to.

    That it is one was checked when it was exported. The id of the copy's own repository says nothing.
    """
    if manifest.is_light or "model_id" in manifest.ignore_mismatches:
        return
    if manifest.target.model_id:
        model.config.name_or_path = model.name_or_path = manifest.target.model_id


def load_head(manifest: Manifest, name: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> SafetyHead:
    """The head of a repository."""
    where, arguments = manifest.head.locate(name, hub_kwargs)
    return SafetyHead.from_pretrained(where, **arguments)


def load_tokenizer(
    name: str | os.PathLike[str], config: PreTrainedConfig, hub_kwargs: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """The tokenizer of a repository, of the class that the target's config asks for.

    Raises:
        HeadFileError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name, config=config, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise HeadFileError(f"The tokenizer of {str(name)!r} could not be loaded: {error}") from error


def _load_draft(target: PreTrainedModel, manifest: Manifest, source: Source) -> PreTrainedModel | None:
    """The draft of a repository, on the target's device. Without one the answers are the same, only slower."""
    if manifest.draft is None:
        return None
    where, arguments = manifest.draft.locate(*source)
    device = target.device
    if not isinstance(AutoConfig.from_pretrained(where, **arguments), DraftHeadConfig):
        draft: Any = AutoModelForCausalLM.from_pretrained(where, dtype=target.dtype, **arguments)
        return draft.to(device).eval()
    head: Any = DraftHead.from_pretrained(where, **arguments)
    head = head.to(device=device, dtype=target.dtype).eval()
    try:
        return head.bind(target, manifest.ignore_mismatches)
    except UnsupportedRequestError as error:
        logger.warning("Guarded decoding goes on without the draft of %s: %s", source.name, error)
        return None


@functools.cache
def _generate_code() -> Any:
    return inspect.unwrap(GenerationMixin.generate).__code__


def _asked_repository() -> str | None:
    """The repository that `generate` was asked to run the code of.

    transformers does not tell that code, and copies it elsewhere before it runs it. Without knowing the repository
    there is no head. So it is read where transformers has it: the argument of the `generate` that called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _generate_code():
            asked_for = frame.f_locals.get("custom_generate")
            return asked_for if isinstance(asked_for, str) else None
        frame = frame.f_back
    return None
