"""What is decided once per engine: the head, checked against its target, and what every answer needs. Pure."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..answer.rows import Row
from ..answer.segments import Boundaries, find_boundaries
from ..config import SafeSpecConfig
from ..decoding.attachment import find_threshold
from ..decoding.monitor import RiskMonitor
from ..decoding.plan import Plan
from ..decoding.request import recovery_seeds
from ..engine.private_names import commit_hash
from ..errors import SafeSpecError, UnsupportedRequestError
from ..heads.safety_head import SafetyHead, check_binding
from ..heads.tokenizers import is_extension, tokenizer_fingerprint
from .request import GuardedRequest
from .sampling import Sampling, StopTexts

CPU_WORKER = "safespec_hf.vllm.cpu_worker.GuardedCPUWorker"
GPU_WORKER = "safespec_hf.vllm.worker.GuardedWorker"
MOST_TEMPERATURE = 2.0
"""Of vLLM's."""


def find_binding(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, name: str) -> dict[str, Any]:
    """What ties a head to a target that was not loaded: see [`target_binding`]."""
    text = config.get_text_config(decoder=True)
    return {
        "model_id": None if os.path.isdir(name) else name,
        "revision": commit_hash(config),
        "architecture": next(iter(config.architectures or []), None),
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }


def find_reserved_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_ids: Sequence[int]) -> int:
    """A token that no answer has, for the worker to say "stop" with.

    The last of the vocabulary's places without a token, else the last special token that ends nothing.

    Raises:
        UnsupportedRequestError: If there is none.
    """
    if vocab_size > len(tokenizer):
        return vocab_size - 1
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - set(end_ids))
    usable = [token for token in special if token < vocab_size]
    if not usable:
        raise UnsupportedRequestError(
            "The tokenizer has no special token to spare, with which flagged answers could be stopped: pass "
            "`reserved_id=`, a token that no answer has."
        )
    return usable[-1]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """All that guarded answers of one engine have in common. Made by [`Guard.load`].

    Attributes:
        model (`str`): The target, as the engine is told.
        head ([`SafetyHead`]): The head; the worker loads its own copy from `head_name`.
        head_name (`str`): Folder or Hub id of it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        end_ids (`tuple[int, ...]`): Tokens that end an answer.
        reserved_id (`int`): The token that stops what was flagged; no answer has it.
        max_model_len (`int`): Tokens of prompt and answer, at most.
        policy ([`SafeSpecConfig`]): Of answers that bring none.
        secret (`str`): Tells our own requests from others: what does not know it gets no text.
    """

    model: str
    head: SafetyHead
    head_name: str
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    reserved_id: int
    max_model_len: int
    policy: SafeSpecConfig
    ignore_mismatches: tuple[str, ...] = ()
    secret: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        head: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        policy: SafeSpecConfig | None = None,
        max_model_len: int | None = None,
        reserved_id: int | None = None,
        ignore_mismatches: tuple[str, ...] = (),
    ) -> Guard:
        """Loads the head, and checks it against the target's files; no engine is needed, nor vLLM.

        Args:
            model (`str` or `os.PathLike`): Folder or Hub id of the target.
            head (`str` or `os.PathLike`): Folder or Hub id of a head that was trained for it.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*): Default: the target's.
            policy ([`SafeSpecConfig`], *optional*): What follows a flag. Default: a recovery.
            max_model_len (`int`, *optional*): As the engine's. Default: what the target was made for.
            reserved_id (`int`, *optional*): A token that no answer has. Default: one is found.
            ignore_mismatches (`tuple[str, ...]`): Fields of the head's binding to excuse.

        Raises:
            HeadFileError: If the head can't be loaded.
            HeadMismatchError: If it was trained for another target.
            UnsupportedRequestError: If the policy can't be had in an engine.
        """
        name, policy = str(model), policy or SafeSpecConfig()
        check_policy(policy)
        loaded = SafetyHead.from_pretrained(head)
        config = AutoConfig.from_pretrained(name)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer or name)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        found, bound = find_binding(config, tokenizer, name), loaded.config.target or {}
        if is_extension(tokenizer, bound.get("tokenizer")):
            found |= {"tokenizer": bound["tokenizer"], "vocab_size": bound.get("vocab_size")}
        check_binding(loaded, found, ignore_mismatches)
        text = config.get_text_config(decoder=True)
        longest = int(getattr(text, "max_position_embeddings", None) or 2**20)
        end_ids = find_end_ids(name, config, tokenizer)
        reserved = find_reserved_id(tokenizer, text.vocab_size, end_ids) if reserved_id is None else reserved_id
        if not 0 <= reserved < text.vocab_size or reserved in end_ids:
            raise UnsupportedRequestError(
                f"`reserved_id` must be one of {text.vocab_size} tokens, and none that ends an answer, but "
                f"it is {reserved}; those are {sorted(end_ids)}."
            )
        guard = cls(
            model=name,
            head=loaded,
            head_name=str(head),
            tokenizer=tokenizer,
            end_ids=end_ids,
            reserved_id=reserved,
            max_model_len=max_model_len or longest,
            policy=policy,
            ignore_mismatches=ignore_mismatches,
        )
        find_threshold(policy, loaded)  # the policy's operating point may be none of the head's
        return guard

    @cached_property
    def boundaries(self) -> Boundaries:
        """Which tokens can end a line, and which are no whole characters."""
        return find_boundaries(self.tokenizer)

    def engine_args(self, device: str = "auto", **given: Any) -> dict[str, Any]:
        """Arguments for `vllm.LLM`, `EngineArgs` or `AsyncEngineArgs`, so that the engine is guarded.

        Args:
            device (`"auto"`, `"cpu"` or `"gpu"`): Which worker. `"auto"` asks vLLM for its platform.
            given: The caller's own.

        Raises:
            UnsupportedRequestError: For an option under which the promise can't be kept.
        """
        check_options(given)
        if device == "auto":
            from vllm.platforms import current_platform

            device = "cpu" if current_platform.is_cpu() else "gpu"
        settings = {
            "head": self.head_name,
            "model": self.model,
            "secret": self.secret,
            "reserved_id": self.reserved_id,
            "ignore_mismatches": list(self.ignore_mismatches),
        }
        return given | {
            "model": self.model,
            "max_model_len": self.max_model_len,
            "worker_cls": CPU_WORKER if device == "cpu" else GPU_WORKER,
            "async_scheduling": False,
            "additional_config": {**(given.get("additional_config") or {}), "safespec": settings},
        }

    def encode_policy(self, text: str) -> list[int]:
        """A text of the policy, as tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def request(
        self,
        key: str,
        prompt_ids: Sequence[int],
        sampling: Sampling | Mapping[str, Any] | object | None = None,
        policy: SafeSpecConfig | None = None,
    ) -> GuardedRequest:
        """Begins a guarded answer.

        Args:
            key (`str`): Unique as long as the engine lives.
            prompt_ids (`Sequence[int]`): The prompt.
            sampling ([`Sampling`], `vllm.SamplingParams` or `dict`, *optional*): How it is sampled.
            policy ([`SafeSpecConfig`], *optional*): What follows a flag. Default: the guard's.

        Raises:
            UnsupportedRequestError: If it can't be guarded, or does not fit into the context.
        """
        if not isinstance(sampling, Sampling):
            sampling = Sampling.from_params(sampling or {}, self.reserved_id)
        policy = policy or self.policy
        check_policy(policy)
        room = self.max_model_len - 1 - len(prompt_ids)
        if not prompt_ids or room < 1:
            raise UnsupportedRequestError(
                f"A prompt must have 1 to {self.max_model_len - 2} tokens here, but it has {len(prompt_ids)}."
            )
        if not all(sampling.stop):
            raise UnsupportedRequestError("`stop` may have no empty text: every answer would end at once.")
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise UnsupportedRequestError(f"`max_tokens` must be >= 1, but it is {sampling.max_tokens}.")
        plan = self._plan(policy, sampling, len(prompt_ids))
        ids = torch.tensor(list(prompt_ids), dtype=torch.long)
        row = Row(
            0,
            ids,
            torch.ones_like(ids),
            max_new_tokens=min(sampling.max_tokens or room, room),
            policy=plan.policy,
            newline_ids=self.boundaries.newline_ids,
            pieces=self.boundaries.pieces,
        )
        return GuardedRequest(
            key, plan=plan, row=row, sampling=sampling, reserved_id=self.reserved_id, secret=self.secret
        )

    def _plan(self, policy: SafeSpecConfig, sampling: Sampling, num_prompt: int) -> Plan:
        policy = policy.resolved()
        ends = (*self.end_ids, *sampling.stop_token_ids)
        stops = [StopTexts(self.tokenizer, sampling, num_prompt)] if sampling.stop else []
        return Plan(
            policy=policy,
            monitor=RiskMonitor(self.head),
            risk_threshold=find_threshold(policy, self.head),
            num_draft_tokens=0,
            do_sample=not sampling.is_greedy,
            eos_ids=frozenset(ends),
            criteria=StoppingCriteriaList(stops),
            reflection_ids=self.encode_policy(policy.reflection),
            refusal_ids=self.encode_policy(policy.refusal) + list(self.end_ids[:1]),
            separator_ids=self.encode_policy("\n\n"),
            # the engine reads one token less than it has places for, and every token that leaves has been read
            max_context=self.max_model_len - 1,
            max_positions=self.max_model_len - 1,
            seeds=recovery_seeds(sampling.seed if policy.seed is None else policy.seed, not sampling.is_greedy, 1),
        )


def find_end_ids(name: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer of a target, those of its generation config first, as plain decoding has it."""
    try:
        found = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:  # it has none
        found = config.get_text_config(decoder=True).eos_token_id
    ids = [] if found is None else found if isinstance(found, list) else [found]
    own = tokenizer.eos_token_id
    ids = [*ids, *([own] if isinstance(own, int) else [])]
    return tuple(dict.fromkeys(token for token in ids if token >= 0))  # some configs say -1, which is no token


def check_policy(policy: SafeSpecConfig) -> None:
    """Raises for a policy that can't be had in an engine. What it says of drafts has no part there.

    Raises:
        UnsupportedRequestError: Names the field, its value and what to use instead.
    """
    for name, refused, instead in (
        ("verification", "segment", "'token': the engine verifies its own drafts"),
        ("candidate_source", "draft", "'auto' or 'target': the engine's drafts are its own"),
        ("score_last_token", False, "None: in an engine it costs nothing to score it"),
    ):
        if getattr(policy, name) == refused and getattr(policy, name) is not None:
            raise UnsupportedRequestError(
                f"Guarded decoding in vLLM does not support {name}={refused!r}. Use {instead}."
            )
    for name in ("recovery_temperature", "test_temperature"):
        if (temperature := getattr(policy, name)) > MOST_TEMPERATURE:
            raise UnsupportedRequestError(
                f"vLLM samples at temperatures up to {MOST_TEMPERATURE:g}, but `{name}` is {temperature:g}."
            )


def check_options(given: Mapping[str, Any]) -> None:
    """Raises for options of an engine under which nothing can be promised.

    Raises:
        UnsupportedRequestError: Names the option, its value and what to use instead.
    """
    refused: tuple[tuple[str, tuple[Any, ...], str], ...] = (
        ("async_scheduling", (None, False), "False: tokens would be made past a flag"),
        ("pipeline_parallel_size", (None, 1), "1: the layers that the head reads lie in other processes"),
        ("worker_cls", (None, "auto", CPU_WORKER, GPU_WORKER), "the default: the guard is the worker"),
        ("kv_transfer_config", (None,), "none: tokens that others read have no state here"),
        ("enable_lora", (None, False), "False: the head knows the target without adapters"),
        ("runner", (None, "auto", "generate"), "'generate'"),
        ("worker_extension_cls", (None, ""), "none"),
        ("logits_processors", (None, []), "none: they come after the guard, and could let through what it closed"),
    )
    for name, neutral, instead in refused:
        if given.get(name) not in neutral:
            raise UnsupportedRequestError(
                f"Guarded decoding in vLLM does not support {name}={given[name]!r}. Use {instead}."
            )
    if "safespec" in (given.get("additional_config") or {}):
        raise SafeSpecError("`additional_config` may not hold `safespec`: the guard sets it.")
