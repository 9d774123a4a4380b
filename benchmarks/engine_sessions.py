"""Engines for benchmarks/engine.py: each session is a process with one engine, asked to do things in turn."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

from safespec_hf import SafeSpecConfig
from safespec_hf.answer.recovery import Choice, choose
from safespec_hf.defaults.default_target import DEFAULT_HEAD, cache_root, find_target

MAX_LEN, BATCH, BLOCK, NUM_DRAFTS = 1024, 8, 32, 4
ROUNDING = 1e-4
"""What risks, of themselves, and mean log-probabilities, in nats, of two engines may be apart."""


@cache
def target_folder() -> str:
    return str(find_target(cache_root(None)))


@cache
def draft_folder() -> str:
    """The target's first two layers, as a draft model: a weak one, so that drafts are rejected as well."""
    from transformers import AutoTokenizer

    from safespec_hf import load_default_target, load_truncated_draft

    folder = cache_root(None) / "engine-draft"
    if not (folder / "model.safetensors").is_file():
        target, _ = load_default_target()
        load_truncated_draft(target).save_pretrained(folder)
        AutoTokenizer.from_pretrained(target_folder()).save_pretrained(folder)
    return str(folder)


def engine_options(setting: str) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": BATCH,
        "block_size": BLOCK,
        "max_model_len": MAX_LEN,
        "enforce_eager": True,
        "disable_log_stats": False,
        "seed": 0,
    }
    if setting == "ngram":
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": NUM_DRAFTS,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 2,
        }
    elif setting == "draft":
        options["speculative_config"] = {
            "method": "draft_model",
            "model": draft_folder(),
            "num_speculative_tokens": NUM_DRAFTS,
        }
    elif setting == "chunked":
        options |= {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    elif setting == "preempted":
        # a few requests have room until they have grown by a block or two
        options |= {"num_gpu_blocks_override": 10, "max_model_len": 8 * BLOCK}
    return options


class PlainSession:
    """vLLM without us."""

    def __init__(self, setting: str):
        from vllm import LLM

        options = engine_options(setting)
        self.llm = LLM(model=target_folder(), async_scheduling=False, **options)

    def answer(self, prompts: list[list[int]], params: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from vllm import SamplingParams

        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(given, [SamplingParams(**one) for one in params], use_tqdm=False)
        return [{"tokens": list(output.outputs[0].token_ids)} for output in outputs]

    def metrics(self) -> dict[str, Any]:
        """Counts that are not zero."""
        counts = {one.name.removeprefix("vllm:"): getattr(one, "value", None) for one in self.llm.get_metrics()}
        return {"num_preemptions": 0} | {name: value for name, value in counts.items() if value}


class GuardedSession(PlainSession):
    """vLLM with us."""

    def __init__(self, setting: str):
        from safespec_hf.vllm.controller import GuardedLLM

        self.llm: Any = GuardedLLM(target_folder(), DEFAULT_HEAD, **engine_options(setting))
        self.largest = 0
        self.candidates: dict[str, list[list[list[int]]]] = {}
        self._watch()

    def _watch(self) -> None:
        """Looks at the state in every step, and takes down all candidates."""
        from safespec_hf.vllm.request import GuardedRequest

        engine_step, score = self.llm.llm_engine.step, GuardedRequest._score

        def step() -> Any:
            outputs = engine_step()
            self.largest = max(self.largest, self.llm.report()[0]["largest_state_bytes"])
            return outputs

        def note(answer: Any, recovery: Any, is_reread: bool = False) -> Any:
            if not is_reread:
                self.candidates.setdefault(answer.key, []).append([list(one) for one in recovery.tried[-1].segments])
            return score(answer, recovery, is_reread)

        self.llm.llm_engine.step = step
        GuardedRequest._score = note  # type: ignore[method-assign]

    def unwatch(self) -> None:
        del self.llm.llm_engine.step

    def answer(
        self, prompts: list[list[int]], params: list[dict[str, Any]], policies: list[dict[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        silent = [{"risk_threshold": 1.0}] * len(prompts)
        self.candidates.clear()
        policy = [SafeSpecConfig(**one) for one in policies or silent]
        outputs = self.llm.generate(prompts, params, safespec=policy, use_tqdm=False)
        tried = {int(key.rpartition("-")[2]): found for key, found in self.candidates.items()}
        return [
            {
                "tokens": output.token_ids,
                "risks": output.risks,
                "reason": output.finish_reason,
                "failure": output.failure,
                "events": output.events,
                "provenance": [int(one) for one in output.provenance],
                "candidates": tried.get(index, []),
            }
            for index, output in enumerate(outputs)
        ]

    def report(self) -> dict[str, Any]:
        return {**self.llm.report()[0], "largest": self.largest}


class OwnSession:
    """Our own forwards, without vLLM."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from safespec_hf import SafetyHead, attach_safety_head

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(target_folder())
        self.model = AutoModelForCausalLM.from_pretrained(target_folder(), dtype=torch.float32)
        self.head = SafetyHead.from_pretrained(DEFAULT_HEAD)
        attach_safety_head(self.model, self.head, tokenizer=self.tokenizer)

    def risks(self, prompt: list[int], tokens: list[int]) -> list[float]:
        """Of tokens that follow a prompt, nothing inserted among them."""
        import torch

        from safespec_hf.answer.pooling import pool_block

        config = self.head.config
        with torch.no_grad():
            states = self.model.model(torch.tensor([prompt + tokens]), output_hidden_states=True).hidden_states
            hidden_TH = torch.cat([states[layer][0, len(prompt) :] for layer in config.hidden_layers], dim=-1)
            pooled = pool_block(None, hidden_TH, range(len(tokens)), config.pooling, config.ewma_decay)
            return self.head.risk(pooled).tolist()

    def all_risks(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
        return [self.risks(prompt, tokens) for prompt, tokens in zip(prompts, answers, strict=True)]

    def recover(
        self,
        prompt: list[int],
        num_tokens: int,
        policy: dict[str, Any],
        tried: list[list[list[int]]],
        picked: list[Any],
    ) -> Any:
        """Our own decoding, whose candidates are given: the tokens, what it did, and near-ties, taken as `picked`."""
        from unittest.mock import patch

        import torch

        from safespec_hf.decoding import safety_mode
        from safespec_hf.decoding.safety_mode import SafetyMode

        left, near_ties, others = list(tried), list[str](), iter(picked)

        def choose_alike(risks: Any, log_probs: Any, threshold: float, safe_enough: float | None = None) -> Choice:
            choice, other = choose(risks, log_probs, threshold, safe_enough), next(others, None)
            if other in (None, choice.candidate) or not is_near_tie(other, risks, log_probs, threshold, safe_enough):
                return choice
            near_ties.append(f"{choice.candidate} or {other} of risks {risks}, log-probabilities {log_probs}")
            return Choice(other, risks[other], risks[other] < threshold)

        def sample(mode: Any, index: int, row: Any, flag: Any, max_tokens: int, scores: Any, num: int) -> Any:
            if not left:
                raise LookupError("our own decoding wants more candidates than the engine's")
            return watch_and_read(mode, index, row, scores, left.pop(0))

        with patch.object(SafetyMode, "_sample", sample), patch.object(safety_mode, "choose", choose_alike):
            output = self.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                safespec=SafeSpecConfig(**policy),
                max_new_tokens=num_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
        tokens = output.sequences[0, len(prompt) :].tolist()
        return tokens, output.events[0], output.finish_reasons[0], len(left), near_ties


def is_near_tie(
    other: int, risks: list[float], log_probs: list[float], threshold: float, safe_enough: float | None
) -> bool:
    """Whether a candidate would be chosen if all figures were off by what two engines round differently."""
    signs = [-1 if index == other else 1 for index in range(len(risks))]
    # risks are as exact as their logits: relative to themselves, however low
    rounded = [risk * (1 + sign * ROUNDING) for risk, sign in zip(risks, signs, strict=True)]
    likely = [value - sign * ROUNDING for value, sign in zip(log_probs, signs, strict=True)]
    return choose(rounded, likely, threshold, safe_enough).candidate == other


def watch_and_read(mode: Any, index: int, row: Any, scores: Any, segments: list[list[int]]) -> Any:
    """Has candidates scored as our own decoding does: as they were sampled, after the reflection, then without it."""
    import torch

    aside, nums = mode.plan.reflection_ids, [len(tokens) for tokens in segments]
    scorer = mode.target.fork(index, len(segments))
    waiting = row.context(scorer.lengths[0])
    output = scorer.forward([[*waiting, *aside, *tokens] for tokens in segments], 1 + max(nums), num_drafts=nums)
    hidden_BTF = torch.zeros_like(output.hidden_BTF)  # with the reflection's cut out
    for k, num in enumerate(nums):
        end = hidden_BTF.shape[1] - num
        before = output.hidden_BTF[k, end - len(aside) - len(waiting) : end - len(aside)]
        hidden_BTF[k, -len(waiting) - num :] = torch.cat([before, output.hidden_BTF[k, end:]])
    scores.read(segments, len(waiting), output._replace(hidden_BTF=hidden_BTF))
    scorer = mode.target.fork(index, len(segments))
    output = scorer.forward([[*waiting, *tokens] for tokens in segments], 1 + max(nums), num_drafts=nums)
    scores.read(segments, len(waiting), output)
    return scorer


def _serve(connection: Connection, kind: str, setting: str | None) -> None:
    session: Any = {"plain": PlainSession, "guarded": GuardedSession, "own": OwnSession}[kind](
        *([] if setting is None else [setting])
    )
    connection.send("ready")
    while (order := connection.recv()) is not None:
        name, args = order
        connection.send(getattr(session, name)(*args))


class Session:
    """The near end of a session."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def __call__(self, name: str, *args: Any) -> Any:
        self._connection.send((name, args))
        return self._connection.recv()


@contextmanager
def session(kind: str, setting: str | None = None) -> Iterator[Session]:
    """A process with an engine of that kind, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, kind, setting), daemon=True)
    process.start()
    far.close()
    try:
        assert near.recv() == "ready"
        yield Session(near)
        near.send(None)
        process.join(30)
    finally:
        if process.is_alive():
            process.kill()


def encode_prompts(prompts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target_folder())
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [
        list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False))
        for chat in chats
    ]
