"""`attach_safety_head` gives one model instance a `generate(..., safespec=...)`. The class it had stays its class."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .answer.pooling import find_newline_ids
from .answer.rows import Row
from .config import SafeSpecConfig
from .decoding.assistant import as_draft, check_assistant
from .decoding.loop import Decoder
from .decoding.monitor import RiskMonitor
from .decoding.plan import Plan
from .decoding.request import (
    DEFAULT_NUM_DRAFT_TOKENS,
    check_generation_config,
    check_processors,
    eos_ids,
    make_candidates,
    make_rows,
    other_criteria,
)
from .decoding.support import check_model, check_positions, check_prompt, max_context
from .engine.cache import CACHE_NAME
from .engine.compiling import check_compiler, compiled_forwards
from .engine.inference import inference_mode
from .engine.packing import packed_weights
from .errors import UnsupportedRequestError
from .heads.draft_head import DraftHead
from .heads.safety_head import SafetyHead, check_binding, target_binding
from .outputs import SafeSpecOutput

logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(slots=True)
class Attachment:
    """What a guarded model carries besides its weights. Not a module, so that it is not saved with them."""

    head: SafetyHead
    always: bool
    ignore_mismatches: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase | None
    newline_ids: frozenset[int] = field(default_factory=frozenset)

    def use_tokenizer(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Takes a tokenizer if it is another one than before, and checks that it is the head's."""
        if tokenizer is not None and tokenizer is not self.tokenizer:
            check_binding(self.head, target_binding(model, tokenizer), self.ignore_mismatches)
            self.tokenizer, self.newline_ids = tokenizer, frozenset()
        if self.tokenizer is None:
            raise UnsupportedRequestError(
                f"No tokenizer was found at {model.config.name_or_path!r}, and guarded decoding needs one for "
                "segments and for the policy's texts. Pass `tokenizer=` to `attach_safety_head` or to `generate`."
            )
        if not self.newline_ids:
            self.newline_ids = find_newline_ids(self.tokenizer)


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
            "model, attach the head to `model.get_base_model()`; a compiled one gets its head before `torch.compile`."
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
            policy,
            as_draft(kwargs.pop("assistant_model", None)),
            kwargs.get("streamer"),
            kwargs.get("num_assistant_tokens"),
            kwargs.pop("assistant_tokenizer", None),
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


@dataclass(frozen=True, slots=True)
class GuardedCall:
    """The decoding strategy of one guarded `generate` call, run by transformers once it has prepared everything."""

    policy: SafeSpecConfig
    assistant: PreTrainedModel | None = None
    streamer: BaseStreamer | None = None
    num_assistant_tokens: int | None = None
    assistant_tokenizer: PreTrainedTokenizerBase | None = None
    is_monitored: bool = True  # False only to measure what safety costs

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> SafeSpecOutput | Tensor:
        attachment: Attachment = model._safespec
        attachment.use_tokenizer(model, tokenizer)
        attachment.head.to(model.device)
        self._check(model, attachment, input_ids, logits_processor, generation_config, model_kwargs)
        input_ids = input_ids.to(model.device)
        mask = model_kwargs.get("attention_mask")
        is_real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(input_ids.device).bool()
        check_positions(model_kwargs.get("position_ids"), is_real)
        rows = make_rows(
            input_ids,
            is_real,
            max_length=generation_config.max_length,
            policy=self.policy,
            newline_ids=attachment.newline_ids,
            processors=logits_processor,
        )
        candidates = make_candidates(model, self.assistant, generation_config, self.policy, len(rows))
        plan = self._plan(model, attachment, generation_config, stopping_criteria, rows)
        decoder = Decoder(model, rows, candidates, plan, self.streamer)
        cache: Any = model_kwargs.get(CACHE_NAME)
        if getattr(cache, "_is_user_defined", False):
            decoder.target.adopt(cache)
        models = [model] if self.assistant is None else [model, self.assistant]
        with (
            packed_weights(models, self.policy.pack_weights),
            compiled_forwards(models, self.policy.compile),
            inference_mode([*models, attachment.head]),
        ):
            decoder.run()
        pad, is_whole = generation_config._pad_token_tensor, bool(generation_config.return_dict_in_generate)
        output = decoder.output(input_ids, 0 if pad is None else int(pad), with_cache=is_whole)
        return output if is_whole else output.sequences

    def _check(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
    ) -> None:
        assert attachment.tokenizer is not None
        check_generation_config(config)
        check_prompt(model, input_ids, model_kwargs)
        check_processors(processors, input_ids.shape[0])
        if self.policy.compile:
            check_compiler(model.device)
        if self.policy.candidate_source == "draft" and (
            self.assistant is None or isinstance(self.assistant, DraftHead)
        ):
            raise UnsupportedRequestError(
                "`candidate_source='draft'` needs an `assistant_model` that can write by itself, but it is "
                f"{'none' if self.assistant is None else 'a draft head'}."
            )
        check_assistant(model, self.assistant, attachment.tokenizer, self.assistant_tokenizer)
        if input_ids.shape[0] > 1 and self.streamer is not None:
            raise UnsupportedRequestError(f"A streamer takes one row, but the batch has {input_ids.shape[0]}.")
        if input_ids.shape[0] > 1 and config._pad_token_tensor is None:
            raise UnsupportedRequestError("Rows of a batch end at different lengths: set `pad_token_id`.")

    def _plan(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        rows: list[Row],
    ) -> Plan:
        tokenizer, policy = attachment.tokenizer, self.policy
        assert tokenizer is not None
        ends = eos_ids(criteria)
        given = (policy.num_draft_tokens, config.prompt_lookup_num_tokens, self.num_assistant_tokens)
        refusal = tokenizer.encode(policy.refusal, add_special_tokens=False)
        return Plan(
            policy=policy,
            monitor=RiskMonitor(attachment.head) if self.is_monitored else None,
            risk_threshold=policy.risk_threshold or attachment.head.config.risk_threshold,
            num_draft_tokens=next((num for num in given if num is not None), DEFAULT_NUM_DRAFT_TOKENS),
            do_sample=bool(config.do_sample),
            eos_ids=frozenset(ends),
            criteria=other_criteria(criteria, config.max_length),
            reflection_ids=tokenizer.encode(policy.reflection, add_special_tokens=False) if policy.reflection else [],
            refusal_ids=refusal + ends[:1],
            separator_ids=tokenizer.encode("\n\n", add_special_tokens=False),
            max_context=max_context(model, rows),
            seeds=recovery_seeds(policy.seed, bool(config.do_sample), len(rows)),
        )


def recovery_seeds(seed: int | None, do_sample: bool, num_rows: int) -> list[int]:
    """One per row: the same for all, so that a row recovers as it would alone, but for samples without a seed."""
    if seed is not None or not do_sample:
        return [seed or 0] * num_rows
    return torch.randint(2**31, (num_rows,)).tolist()


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
