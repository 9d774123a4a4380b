"""Ways of generating (arms), timed from outside and interleaved prompt by prompt; raw forwards of their shapes."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from rich.progress import track
from speed_log import Log
from speed_statistics import ours_raw_seconds, plain_raw_seconds
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from safespec_hf import SafeSpecConfig, SafeSpecOutput
from safespec_hf.engine.cache import CACHE_NAME
from safespec_hf.engine.fusing import fast_layers
from safespec_hf.modeling import GuardedCall

RAW_REPEATS = 3
Encode = Callable[[str], dict[str, Tensor]]


class Prompt(NamedTuple):
    key: str
    category: str
    text: str


class Forward(NamedTuple):
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Arm:
    """Arguments of `generate`.

    Attributes:
        kwargs: As a user would pass them.
        is_ours: Decode with `GuardedCall`, as `generate(..., safespec=policy)` does.
        assistant: Our draft, of any kind.
        is_monitored: The head is on.
        prepare: Called before every prompt with its number.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_ours: bool = False
    policy: SafeSpecConfig = field(default_factory=SafeSpecConfig)
    assistant: Any = None
    is_monitored: bool = True
    prepare: Callable[[int], None] | None = None

    def arguments(self) -> dict[str, Any]:
        if not self.is_ours:
            return dict(self.kwargs)
        call = GuardedCall(
            self.policy, self.assistant, None, self.kwargs.get("num_assistant_tokens"), self.is_monitored
        )
        return {**self.kwargs, "custom_generate": call}


@dataclass
class Run:
    """One answer. `seconds` is the whole call; blocks are the target's forwards after the first, by their size."""

    seconds: float
    num_tokens: int
    num_target_forwards: int
    num_drafted: int
    num_accepted: int
    blocks: dict[int, int]
    num_draft_forwards: int = 0
    draft_forward_seconds: float = 0.0
    num_plain_rounds: int = 0
    num_flags: int = 0
    num_discarded: int = 0
    engine: dict[str, Any] | None = None
    is_as_plain: bool = False


@contextmanager
def watch(module: nn.Module | None) -> Iterator[list[Forward]]:
    """Every forward of a module, seen from outside of the loop."""
    seen: list[Forward] = []
    start = [0.0]
    if not isinstance(module, nn.Module):
        yield seen
        return

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        width = ids.shape[-1] if isinstance(ids, Tensor) else 0
        seen.append(Forward(width, time.perf_counter() - start[0]))

    before = module.register_forward_pre_hook(lambda *_: start.__setitem__(0, time.perf_counter()))
    after = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        before.remove()
        after.remove()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def run_arm(model: Any, arm: Arm, inputs: Mapping[str, Tensor], **common: Any) -> tuple[Run, list[int]]:
    """Generates one answer; returns it with what it took."""
    num_prompt = inputs["input_ids"].shape[1]
    arguments = {**common, **arm.arguments(), "return_dict_in_generate": True}
    # hooks would be compiled too
    is_watched = not (arm.is_ours and arm.policy.compile)
    with watch(model if is_watched else None) as forwards, watch(arm.assistant if is_watched else None) as drafting:
        synchronize(model.device)
        start = time.perf_counter()
        output = model.generate(**inputs, **arguments)
        synchronize(model.device)
        seconds = time.perf_counter() - start
    tokens = without_padding(model, output.sequences[:, num_prompt:].tolist())
    if isinstance(output, SafeSpecOutput):
        run = our_run(output, seconds, forwards)
        run.draft_forward_seconds = sum(forward.seconds for forward in drafting)
        return run, tokens
    # the first block holds the prompt, every later one a token that was not read yet; the rest are drafts
    num_drafted = sum(forward.num_tokens for forward in forwards) - num_prompt - (len(forwards) - 1)
    num_accepted = len(tokens) - len(forwards) if num_drafted else 0
    blocks = dict(Counter(forward.num_tokens for forward in forwards[1:]))
    return Run(seconds, len(tokens), len(forwards), num_drafted, num_accepted, blocks), tokens


def without_padding(model: Any, rows: Sequence[list[int]]) -> list[int]:
    """All tokens of a batch, one row after the other; rows that end early are padded by what may be an end token."""
    ends = model.generation_config.eos_token_id
    ends = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    firsts = [next((index + 1 for index, token in enumerate(row) if token in ends), len(row)) for row in rows]
    return [token for row, end in zip(rows, firsts, strict=True) for token in row[:end]]


def our_run(output: SafeSpecOutput, seconds: float, forwards: Sequence[Forward]) -> Run:
    """From the statistics that come with the answer; only the shapes of the blocks are looked at from outside."""
    counts = output.statistics
    assert counts is not None
    if len(forwards) == counts.num_target_forwards:
        blocks = dict(Counter(forward.num_tokens for forward in forwards[1:]))
    else:  # a loop that does not go through the module's hooks
        rounds = max(counts.num_target_forwards - 1, 0)
        blocks = {1 + round(counts.num_draft_tokens / max(counts.num_rounds, 1)): rounds}
    return Run(
        seconds,
        counts.num_new_tokens,
        counts.num_target_forwards,
        counts.num_draft_tokens,
        counts.num_accepted_tokens,
        blocks,
        num_draft_forwards=counts.num_draft_forwards,
        num_plain_rounds=counts.num_plain_rounds,
        num_flags=counts.num_flags,
        num_discarded=counts.num_discarded_tokens,
        engine=asdict(counts),
    )


@torch.no_grad()
def time_forward(model: Any, ids: Tensor, cache: Any = None) -> float:
    """Seconds of one raw forward, with logits for all of its tokens if there is a cache, else for the last."""
    length = 0 if cache is None else cache.get_seq_length()
    cache = DynamicCache() if cache is None else cache
    synchronize(model.device)
    start = time.perf_counter()
    model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=ids.shape[1] if length else 1)
    synchronize(model.device)
    seconds = time.perf_counter() - start
    if length:
        cache.crop(length - cache.get_seq_length())
    return seconds


@torch.no_grad()
def fill_cache(model: Any, context_ids: Tensor) -> Any:
    cache: Any = DynamicCache()
    model(input_ids=context_ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
    return cache


def time_blocks(model: Any, context_ids: Tensor, sizes: Sequence[int], repeats: int = RAW_REPEATS) -> dict[int, float]:
    """Median seconds of raw forwards of so many tokens each, on a KV cache of this context; sizes interleaved."""
    cache = fill_cache(model, context_ids)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            ids = context_ids[:, torch.arange(size) % context_ids.shape[1]]
            seconds[size].append(time_forward(model, ids, cache))
    return {size: statistics.median(values) for size, values in seconds.items()}


def time_raw_forwards(
    model: Any,
    plain: Arm,
    ours: Arm,
    prompt_ids: Tensor,
    answers: Mapping[str, list[int]],
    runs: Mapping[str, Run],
) -> dict[str, Any]:
    """The raw forwards that two answers needed, timed here and now: see `EFFICIENCY_FORMULA`."""
    tokens, own = answers[plain.name], runs[ours.name]
    half = torch.tensor([tokens[: max(len(tokens) // 2, 1)]], device=prompt_ids.device)
    context_ids = torch.cat([prompt_ids, half], dim=1)
    plain_blocks, plain_prefill = time_blocks(model, context_ids, [1]), time_prefill(model, prompt_ids)
    drafts = [ours.assistant] if isinstance(ours.assistant, nn.Module) else []
    with torch.inference_mode(), fast_layers([model, *drafts], ours.policy.pack_weights):  # as our arm ran
        blocks, prefill = time_blocks(model, context_ids, sorted({1, *own.blocks})), time_prefill(model, prompt_ids)
        draft_seconds, source = raw_draft_seconds(ours.assistant, context_ids, own)
    return {
        "prefill": prefill,
        "blocks": blocks,
        "plain_block": plain_blocks[1],
        "draft_seconds": draft_seconds,
        "draft_source": source,
        "plain_seconds": plain_raw_seconds(len(tokens), plain_prefill, plain_blocks),
        "ours_seconds": ours_raw_seconds(own.blocks, prefill, blocks, draft_seconds),
    }


def time_prefill(model: Any, prompt_ids: Tensor) -> float:
    return statistics.median(time_forward(model, prompt_ids) for _ in range(RAW_REPEATS))


def raw_draft_seconds(draft: Any, context_ids: Tensor, ours: Run) -> tuple[float, str]:
    """Raw seconds of our draft's forwards, and how they were found."""
    if not ours.num_draft_forwards:
        return 0.0, "no draft model"
    if isinstance(draft, PreTrainedModel) and draft.can_generate():
        return ours.num_draft_forwards * time_blocks(draft, context_ids, [1])[1], "raw steps of one token"
    if ours.draft_forward_seconds:
        return ours.draft_forward_seconds, "forwards of the draft inside of the run, by hooks"
    assert ours.engine is not None
    return float(ours.engine["draft_seconds"]), "all of drafting, by the engine's statistics"


@dataclass
class Bench:
    """What the arms of a part have in common.

    Attributes:
        common: Arguments of every `generate`.
        time_raw: Times raw forwards after each prompt's arms, from its ids, answers and runs; for the record's `raw`.
        settings: What decides the figures; results with other settings are not taken over.
    """

    model: Any
    encode: Encode
    log: Log
    part: str
    settings: Mapping[str, Any]
    common: Mapping[str, Any]
    time_raw: Callable[[Tensor, Mapping[str, list[int]], Mapping[str, Run]], dict[str, Any]] | None = None

    def interleave(self, arms: Sequence[Arm], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """All arms on every prompt, in an order that changes from prompt to prompt."""
        self.settings = {**self.settings, "arms": [arm.name for arm in arms]}
        done = self.log.done(self.part, self.settings)
        left = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.key not in done]
        if left:
            self._warm_up(arms, left[0][1])
        for number, prompt in track(left, description=f"{self.part} ({len(arms)} arms)"):
            done[prompt.key] = self._measure(arms, number, prompt)
            self.log.append(done[prompt.key])
        return [done[prompt.key] for prompt in prompts]

    def _warm_up(self, arms: Sequence[Arm], prompt: Prompt) -> None:
        for arm in arms:
            if arm.prepare is not None:
                arm.prepare(0)
            run_arm(self.model, arm, self.encode(prompt.text), **{**self.common, "max_new_tokens": 4})

    def _measure(self, arms: Sequence[Arm], number: int, prompt: Prompt) -> dict[str, Any]:
        inputs = self.encode(prompt.text)
        runs: dict[str, Run] = {}
        answers: dict[str, list[int]] = {}
        for arm in random.Random(number).sample(list(arms), len(arms)):
            if arm.prepare is not None:
                arm.prepare(number)
            torch.manual_seed(number)
            runs[arm.name], answers[arm.name] = run_arm(self.model, arm, inputs, **self.common)
        for name, run in runs.items():
            run.is_as_plain = answers[name] == answers[arms[0].name]
        record = {
            "part": self.part,
            "key": prompt.key,
            "category": prompt.category,
            "settings": dict(self.settings),
            "num_prompt_tokens": inputs["input_ids"].shape[1],
            "arms": {name: asdict(run) for name, run in runs.items()},
        }
        if self.time_raw is not None:
            record["raw"] = self.time_raw(inputs["input_ids"], answers, runs)
        as_read: dict[str, Any] = json.loads(json.dumps(record))  # as it is after `--resume`: all keys are strings
        return as_read
