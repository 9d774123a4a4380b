"""The parts of the speed benchmark on the real pair: what is compared on which prompts."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from prompts import PROMPTS
from speed_arms import Arm, Bench, Prompt, run_arm, time_raw_forwards
from speed_drafts import Draft, is_usable_by_transformers, load_draft, load_hopeless_draft
from speed_log import Log
from speed_statistics import (
    EFFICIENCY_FORMULA,
    bootstrap_median,
    divide,
    engine_efficiency,
    ratios,
    summarise_arm,
    tokens_per_second,
)
from torch import Tensor

from safespec_hf import (
    SafeSpecConfig,
    SafetyHead,
    attach_safety_head,
    load_default_head,
    load_default_target,
    load_truncated_draft,
)
from safespec_hf.decoding.safety_mode import SafetyMode

TUNING_TOKENS = 64
PARITY_PER_CATEGORY = 2
LOOKUP_SETTINGS = [(3, 2), (5, 2), (10, 2), (10, 3)]  # prompt_lookup_num_tokens, max_matching_ngram_size
FIRST_FORCED_ROUND = 3
MAX_FORCED_FLAGS = 4
NUM_COMPILED_WARM_UPS = 4


class Target:
    """The default target with its head and a draft, in one dtype."""

    def __init__(self, options: argparse.Namespace, dtype: str):
        self.options, self.dtype = options, dtype
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load_default_target(dtype=getattr(torch, dtype), device=options.device)
        self.head = load_default_head().to(self.model.device)
        attach_safety_head(self.model, self.head, tokenizer=self.tokenizer)
        self.draft: Draft = load_draft(options.draft, self.model)

    def encode(self, prompt: str) -> dict[str, Tensor]:
        chat = [{"role": "user", "content": prompt}]
        inputs: Any = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def encode_batch(self, prompts: str) -> dict[str, Tensor]:
        """Of a JSON list of prompts."""
        chats = [[{"role": "user", "content": prompt}] for prompt in json.loads(prompts)]
        inputs: Any = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def ours(self, name: str, **fields: Any) -> Arm:
        """Our arm with the draft that was asked for."""
        lookup = {"prompt_lookup_num_tokens": self.options.lookup_tokens} if self.draft.is_lookup else {}
        policy = fields.pop("policy", self.policy())
        return Arm(name, lookup, True, policy, self.draft.model, **fields)

    def policy(self, **fields: Any) -> SafeSpecConfig:
        """The default one, but for what was asked for."""
        fields = {"lookup_drafts": not self.options.no_lookup, **fields}
        return SafeSpecConfig(
            num_draft_tokens=self.options.draft_tokens, adaptive_drafts=not self.options.no_adaptive, **fields
        )

    def bench(self, log: Log, part: str, tokens: int, **common: Any) -> Bench:
        settings = {
            "dtype": self.dtype,
            "draft": self.draft.name,
            "draft_tokens": self.options.draft_tokens,
            "lookup_tokens": self.options.lookup_tokens,
            "policy": {"lookup_drafts": not self.options.no_lookup, "adaptive_drafts": not self.options.no_adaptive},
            "tokens": tokens,
            "generate": common,
            "data": self.options.data is not None,
        }
        return Bench(
            self.model, self.encode, log, part, settings, {"do_sample": False, "max_new_tokens": tokens, **common}
        )


def load_prompts(options: argparse.Namespace, per_category: int) -> list[Prompt]:
    """First turns of Spec-Bench, so many of each category; without data, the benchmarks' own prompts."""
    if options.data is None:
        return [Prompt(f"own {index}", "own", text) for index, text in enumerate(PROMPTS[: options.prompts])]
    return [row for rows in by_category(options.data) for row in rows[:per_category]]


def tuning_prompts(options: argparse.Namespace) -> list[Prompt]:
    """A few that are not measured: the last ones of the largest categories."""
    if options.data is None:
        return [Prompt(f"own {index}", "own", text) for index, text in enumerate(PROMPTS)][-options.tuning_prompts :]
    largest = sorted(by_category(options.data), key=len, reverse=True)
    return [rows[-1] for rows in largest[: options.tuning_prompts]]


def by_category(data: Path) -> list[list[Prompt]]:
    """Shuffled once and for all, so that a larger `--per-category` only adds prompts."""
    categories: dict[str, list[Prompt]] = {}
    with (data / "benign" / "spec_bench_even.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            prompt = Prompt(f"{row['category']} {row['question_id']}", row["category"], row["turns"][0])
            categories.setdefault(prompt.category, []).append(prompt)
    for rows in categories.values():
        random.Random(0).shuffle(rows)
    return list(categories.values())


def their_arms(target: Target) -> tuple[list[Arm], list[Arm]]:
    """transformers' own prompt lookup, and its own assisted decoding with each draft that it can use."""
    lookup = [
        Arm(f"hf lookup {num} n<={size}", {"prompt_lookup_num_tokens": num, "max_matching_ngram_size": size})
        for num, size in LOOKUP_SETTINGS
    ]
    pairs = [part.split(":") for part in target.options.their_drafts.split(",") if part]
    drafts = [
        (f"first {layers} layers", load_truncated_draft(target.model, int(layers)), num) for layers, num in pairs
    ]
    if is_usable_by_transformers(target.draft.model):
        drafts += [(target.draft.name, target.draft.model, num) for num in ("3", "5")]
    assisted = []
    for name, draft, num in drafts:
        prepare = partial(set_num_assistant_tokens, draft, int(num))
        assisted.append(Arm(f"hf assistant {name} x{num}", {"assistant_model": draft}, prepare=prepare))
    return lookup, assisted


def set_num_assistant_tokens(draft: Any, num: int, _: int) -> None:
    draft.generation_config.num_assistant_tokens = num


def tune(target: Target, log: Log, part: str, **common: Any) -> tuple[list[Arm], dict[str, float]]:
    """The best of each kind of theirs, by tokens per second on other prompts; and what all of them reached."""
    kinds = their_arms(target)
    bench = target.bench(log, f"{part} tuning", min(TUNING_TOKENS, target.options.tokens), **common)
    records = bench.interleave([Arm("plain"), *kinds[0], *kinds[1]], tuning_prompts(target.options))
    speeds = {
        arm.name: divide(*(sum(r["arms"][arm.name][field] for r in records) for field in ("num_tokens", "seconds")))
        for arm in (Arm("plain"), *kinds[0], *kinds[1])
    }
    return [max(kind, key=lambda arm: speeds[arm.name]) for kind in kinds if kind], speeds


def measure_real(target: Target, log: Log, part: str, **common: Any) -> dict[str, Any]:
    """(a) plain, (b) transformers' best, (c) ours with the head off, (d) ours with the head on."""
    options = target.options
    theirs, tuning = tune(target, log, part, **common)
    plain, off, on = Arm("plain"), target.ours("ours, head off", is_monitored=False), target.ours("ours, head on")
    # what speculation alone gives: weights as transformers' own decoding reads them
    unpacked = target.ours("ours, head on, not packed", policy=target.policy(pack_weights=False))
    arms = [plain, *theirs, off, on, unpacked]
    bench = target.bench(log, part, options.tokens, **common)
    bench.time_raw = partial(time_raw_forwards, target.model, plain, on)
    records = bench.interleave(arms, load_prompts(options, options.per_category))
    best = max(
        theirs, key=lambda arm: bootstrap_median([tokens_per_second(r["arms"][arm.name]) for r in records], 1).median
    )
    return {
        "settings": bench.settings,
        "tuning_tokens_per_second": tuning,
        "arms": {arm.name: summarise_arm(records, arm.name, "plain") for arm in arms},
        "on_over_plain": bootstrap_median(ratios(records, on.name, "plain"))._asdict(),
        "least_on_over_plain": min(ratios(records, on.name, "plain")),
        "unpacked_over_plain": bootstrap_median(ratios(records, unpacked.name, "plain"))._asdict(),
        "on_over_off": bootstrap_median(ratios(records, on.name, off.name))._asdict(),
        "on_over_best_of_theirs": bootstrap_median(ratios(records, on.name, best.name))._asdict(),
        "best_of_theirs": best.name,
        "efficiency": summarise_efficiency(records, on.name),
    }


def summarise_efficiency(records: Sequence[dict[str, Any]], ours: str) -> dict[str, Any]:
    """Over the answers without a flag, since recovery is not part of the formula."""
    efficiencies, shares = [], []
    for record in records:
        own, plain, raw = record["arms"][ours], record["arms"]["plain"], record["raw"]
        if own["num_flags"]:
            continue
        raw_speedup = (own["num_tokens"] / raw["ours_seconds"]) / (plain["num_tokens"] / raw["plain_seconds"])
        efficiencies.append(engine_efficiency(tokens_per_second(own) / tokens_per_second(plain), raw_speedup))
        shares.append(raw["ours_seconds"] / own["seconds"])
    return {
        "formula": EFFICIENCY_FORMULA,
        "engine_efficiency": bootstrap_median(efficiencies)._asdict(),
        "raw_share": bootstrap_median(shares)._asdict(),
        "draft_sources": sorted({record["raw"]["draft_source"] for record in records}),
        "plain_raw_share": bootstrap_median(
            [record["raw"]["plain_seconds"] / record["arms"]["plain"]["seconds"] for record in records]
        )._asdict(),
    }


def measure_parity(target: Target, log: Log) -> dict[str, Any]:
    """I1: with a head that never fires, float32 answers are token-identical to target.generate."""
    silent = target.ours("ours", policy=target.policy(risk_threshold=1.0))
    bench = target.bench(log, "parity", target.options.tokens)
    records = bench.interleave([Arm("plain"), silent], load_prompts(target.options, PARITY_PER_CATEGORY))
    differing = [record["key"] for record in records if not record["arms"]["ours"]["is_as_plain"]]
    return {
        "settings": bench.settings,
        "num_prompts": len(records),
        "num_identical": len(records) - len(differing),
        "differing": differing,
        "num_flags": sum(record["arms"]["ours"]["num_flags"] for record in records),
    }


def measure_compiled(target: Target, log: Log) -> dict[str, Any]:
    """Ours through torch.compile. What compiling takes is in the warm-up: whole answers, until one is fast."""
    compiled = target.ours("ours, compiled", policy=target.policy(compile=True))
    prompts = load_prompts(target.options, 1)
    tokens = target.options.tokens
    warm_up = [
        run_arm(target.model, compiled, target.encode(prompt.text), do_sample=False, max_new_tokens=tokens)[0].seconds
        for prompt in prompts[:NUM_COMPILED_WARM_UPS]
    ]
    arms = [Arm("plain"), target.ours("ours"), compiled]
    bench = target.bench(log, "compiled", tokens)
    records = bench.interleave(arms, prompts)
    return {
        "settings": bench.settings,
        "warm_up_seconds": warm_up,
        "arms": {arm.name: summarise_arm(records, arm.name, "plain") for arm in arms},
        "compiled_over_plain": bootstrap_median(ratios(records, compiled.name, "plain"))._asdict(),
        "compiled_over_ours": bootstrap_median(ratios(records, compiled.name, "ours"))._asdict(),
    }


class ForcedHead(SafetyHead):  # type: ignore[no-untyped-call]
    """Scores with the real head, but calls one token unsafe in each of given rounds: the first that waits for a risk.

    Risks below the threshold keep their order, so that recovery has candidates to choose from as usual. For a single
    row, which is scored once per round; what is scored during a recovery is left alone.
    """

    def force(self, rounds: Sequence[int]) -> None:
        self.rounds, self.round, self.is_recovering = set(rounds), 0, False

    def risk(self, features: Tensor) -> Tensor:
        risks = super().risk(features) * 0.99 * self.config.risk_threshold
        if self.is_recovering:
            return risks
        self.round += 1
        if self.round in self.rounds and risks.numel():
            risks[0] = 1.0
        return risks


@contextmanager
def told_of_recoveries(head: ForcedHead) -> Any:
    """Tells the head when a row recovers."""
    recover = SafetyMode.recover

    def watched(mode: SafetyMode, *args: Any) -> None:
        head.is_recovering = True
        recover(mode, *args)
        head.is_recovering = False

    SafetyMode.recover = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        SafetyMode.recover = recover  # type: ignore[method-assign]


def force_flags(head: ForcedHead, tokens: int, number: int) -> None:
    """1 to 4 rounds at random, early enough for most answers to get that far."""
    last = max(tokens // 4, FIRST_FORCED_ROUND + MAX_FORCED_FLAGS)
    choices = range(FIRST_FORCED_ROUND, last)
    head.force(random.Random(number).sample(choices, 1 + number % MAX_FORCED_FLAGS))


def measure_recovery(target: Target, log: Log) -> dict[str, Any]:
    """The head is made to fire 1 to 4 times per answer."""
    options = target.options
    head = ForcedHead(target.head.config).to(target.model.device).eval()
    head.load_state_dict(target.head.state_dict())
    attach_safety_head(target.model, head, tokenizer=target.tokenizer)
    num_categories = 1 if options.data is None else len(by_category(options.data))
    prompts = load_prompts(options, -(-options.recovery_prompts // num_categories))
    bench = target.bench(log, "recovery", options.tokens)
    forced = target.ours("ours", prepare=partial(force_flags, head, options.tokens))
    try:
        with told_of_recoveries(head):
            records = bench.interleave([Arm("plain"), forced], prompts)
    finally:
        attach_safety_head(target.model, target.head, tokenizer=target.tokenizer)
    counts = [record["arms"]["ours"]["num_flags"] for record in records]
    flagged = [record for record, num in zip(records, counts, strict=True) if 1 <= num <= MAX_FORCED_FLAGS]
    return {
        "settings": bench.settings,
        "num_prompts": len(flagged),
        "num_prompts_by_flags": {num: counts.count(num) for num in sorted(set(counts))},
        "num_discarded_tokens": sum(record["arms"]["ours"]["num_discarded"] for record in flagged),
        "arms": {name: summarise_arm(flagged, name, "plain") for name in ("plain", "ours")},
        "ratio_tokens_per_second": bootstrap_median(ratios(flagged, "ours", "plain"))._asdict(),
        "ratio_seconds_per_answer": bootstrap_median(ratios(flagged, "ours", "plain", "seconds"))._asdict(),
        "ratio_tokens_per_second_by_flags": {
            num: bootstrap_median(
                ratios([r for r in flagged if r["arms"]["ours"]["num_flags"] == num], "ours", "plain")
            )._asdict()
            for num in sorted({num for num in counts if 1 <= num <= MAX_FORCED_FLAGS})
        },
    }


@contextmanager
def endless(model: Any) -> Any:
    """Answers go on past their end, so that all are equally long without a logits processor."""
    eos = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = eos


def measure_hopeless(target: Target, log: Log) -> dict[str, Any]:
    """A draft model of random weights; and prompt lookup where no token ever comes twice, so that it finds nothing."""
    options = target.options
    unique = {"no_repeat_ngram_size": 1}
    random_draft = load_hopeless_draft(target.model, options.hopeless_layers)
    # a lookup would help even a hopeless draft, as text repeats itself; text in which no token comes twice is nonsense
    # that the head flags, and recovery is not what is measured here
    policy = target.policy(lookup_drafts=False, risk_threshold=1.0)
    lookup = {"prompt_lookup_num_tokens": options.lookup_tokens, **unique}
    arms = [
        Arm("plain"),
        Arm("random draft", {}, True, policy, random_draft),
        Arm("plain, no token twice", unique),
        Arm("lookup that never matches", lookup, True, policy),
    ]
    prompts = load_prompts(options, 1)[: options.hopeless_prompts]
    bench = target.bench(log, "hopeless", options.hopeless_tokens)
    bench.settings = {**bench.settings, "draft": f"random, {options.hopeless_layers} layers"}
    with endless(target.model):
        records = bench.interleave(arms, prompts)
    pairs = {"random draft": "plain", "lookup that never matches": "plain, no token twice"}
    return {
        "settings": bench.settings,
        "arms": {name: summarise_arm(records, name, base) for name, base in pairs.items()},
    }


def smoke(target: Target) -> None:
    """One short answer, so that a draft that does not fit fails before the long run."""
    run_arm(target.model, target.ours("ours"), target.encode(PROMPTS[0]), do_sample=False, max_new_tokens=2)
