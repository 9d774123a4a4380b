"""Measures the six invariants, a line each, and exits with 1 if one does not hold.

.venv/bin/python benchmarks/invariants.py                  # all of them, about half an hour on 2 cores
.venv/bin/python benchmarks/invariants.py --only I2,I3,I4  # some
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from prompts import PROMPTS
from provenance import write_json
from scipy.stats import chisquare
from torch import Tensor
from transformers import PreTrainedModel

from safespec_hf import (
    SafeSpecConfig,
    SafetyHead,
    SafetyHeadConfig,
    attach_safety_head,
    load_default_target,
    load_truncated_draft,
    target_binding,
)
from safespec_hf.decoding.loop import Decoder
from safespec_hf.modeling import GuardedCall

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny
from refusals import not_refused, refusals

TIE = 1e-4
NEVER = 1.0
# the drafts are there to be rejected: as many as asked for, whether they pay or not
CONSTANT = SafeSpecConfig(adaptive_drafts=False, lookup_drafts=False)
# as many as there can be, and other guesses beside them: a draft of 20 layers would not pay for itself
TREES = SafeSpecConfig(lookup_drafts=False)
TINY_POLICY: dict[str, Any] = {
    "max_segment_tokens": 5,
    "num_candidates": 2,
    "reflection": tiny.REFLECTION,
    "refusal": tiny.REFUSAL,
}


class Result(NamedTuple):
    holds: bool
    figures: str


@contextmanager
def count_forwards(model: PreTrainedModel) -> Iterator[list[float]]:
    """Seconds of every forward of the model, measured from outside of the loop."""
    seconds: list[float] = []
    start = [0.0]
    before = model.register_forward_pre_hook(lambda *_: start.__setitem__(0, time.perf_counter()))
    after = model.register_forward_hook(lambda *_: seconds.append(time.perf_counter() - start[0]))
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


def real_target(dtype: torch.dtype, threshold: float = NEVER) -> tuple[Any, Any]:
    model, tokenizer = load_default_target(dtype=dtype)
    config = SafetyHeadConfig(
        hidden_size=model.config.hidden_size,
        hidden_layers=[22],
        risk_threshold=threshold,
        target=target_binding(model, tokenizer),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # any head, but the same in each run
        head = SafetyHead(config)
    return attach_safety_head(model, head, tokenizer=tokenizer), tokenizer


def encode(tokenizer: Any, prompts: list[str]) -> Any:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


def answers(model: Any, tokenizer: Any, prompts: list[str], batch: int, tokens: int, **kwargs: Any) -> list[list[int]]:
    """Greedy answers, cut after their end-of-sequence token."""
    found = []
    for start in range(0, len(prompts), batch):
        inputs = encode(tokenizer, prompts[start : start + batch])
        sequences = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **kwargs)
        for row in sequences[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            found.append(row[:end])
    return found


def first_difference(one: list[int], other: list[int]) -> int | None:
    pairs = itertools.zip_longest(one, other)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), None)


def is_tie(model: Any, tokenizer: Any, prompt: str, plain: list[int], ours: list[int], at: int) -> bool:
    """Shows both logits where two greedy answers part; only equal ones within TIE are excused."""
    inputs = encode(tokenizer, [prompt])["input_ids"][0].tolist()
    logits = model(torch.tensor([inputs + plain[:at]])).logits[0, -1].float()
    a, b = (float(logits[tokens[at]]) if at < len(tokens) else float("nan") for tokens in (plain, ours))
    print(f"      differs at token {at}: logits {a:.6f} (plain) and {b:.6f} (ours), {prompt[:40]!r}")
    return abs(a - b) <= TIE


def drafting(model: Any, num_layers: int) -> dict[str, dict[str, Any]]:
    draft = load_truncated_draft(model, num_layers=num_layers)
    return {
        "lookup": {"prompt_lookup_num_tokens": 5},
        f"draft({num_layers} layers)": {"assistant_model": draft, "num_assistant_tokens": 3},
    }


def i1_float32(options: argparse.Namespace) -> Result:
    """Silent head, float32: token-identical to target.generate."""
    model, tokenizer = real_target(torch.float32)
    prompts = PROMPTS[: options.prompts]
    plain = answers(model, tokenizer, prompts, 1, options.tokens)
    figures, holds = [], True
    ways = [(name, kwargs, CONSTANT) for name, kwargs in drafting(model, options.draft_layers).items()]
    ways.append((f"{ways[-1][0]}, trees", ways[-1][1], TREES))
    for name, kwargs, policy in ways:
        for batch in (1, 4):
            with tiny.cheap_drafts():
                ours = answers(model, tokenizer, prompts, batch, options.tokens, safespec=policy, **kwargs)
            parts = [first_difference(*pair) for pair in zip(plain, ours, strict=True)]
            differing = [index for index, at in enumerate(parts) if at is not None]
            ties = sum(is_tie(model, tokenizer, prompts[i], plain[i], ours[i], parts[i] or 0) for i in differing)
            holds &= ties == len(differing)
            figures.append(f"{name} x{batch}: {len(prompts) - len(differing)}/{len(prompts)} identical, {ties} ties")
            print("    " + figures[-1], flush=True)
    return Result(holds, f"float32, {options.tokens} tokens; " + "; ".join(figures))


def i1_bfloat16(options: argparse.Namespace) -> Result:
    """In bfloat16 block shapes change roundings: no more prompts differ than with transformers' own assistance.

    Counted over both ways to draft: of either alone the counts are so close that one prompt of luck would decide.
    """
    model, tokenizer = real_target(torch.bfloat16)
    prompts = PROMPTS[: options.prompts]
    plain = answers(model, tokenizer, prompts, 1, options.tokens)
    figures, total_ours, total_theirs = [], 0, 0
    for name, kwargs in drafting(model, options.draft_layers).items():
        kwargs_theirs = {key: value for key, value in kwargs.items() if key != "num_assistant_tokens"}
        if "assistant_model" in kwargs:
            kwargs["assistant_model"].generation_config.num_assistant_tokens = kwargs["num_assistant_tokens"]
        ours = answers(model, tokenizer, prompts, 1, options.tokens, safespec=CONSTANT, **kwargs)
        theirs = answers(model, tokenizer, prompts, 1, options.tokens, **kwargs_theirs)
        num_ours, num_theirs = (sum(a != b for a, b in zip(plain, other, strict=True)) for other in (ours, theirs))
        total_ours, total_theirs = total_ours + num_ours, total_theirs + num_theirs
        figures.append(f"{name}: {num_ours} of {len(prompts)} differ, with transformers' own {num_theirs}")
        print("    " + figures[-1], flush=True)
    return Result(total_ours <= total_theirs, "bfloat16; " + "; ".join(figures))


def exact_distribution(model: PreTrainedModel, prompt: Tensor, length: int) -> Tensor:
    """Probability of every continuation of the given length, by enumeration."""
    size = model.config.vocab_size
    continuations = torch.tensor(list(itertools.product(range(size), repeat=length)))
    ids = torch.cat([prompt.expand(len(continuations), -1), continuations], dim=1)
    with torch.no_grad():
        log_probs = model(ids).logits[:, prompt.shape[1] - 1 : -1].double().log_softmax(-1)
    return log_probs.gather(2, continuations[..., None])[..., 0].sum(1).exp()


def fit_p_value(counts: Tensor, expected: Tensor) -> float:
    """Chi-square; outcomes expected fewer than 5 times are one class, as the test needs."""
    is_rare = expected < 5
    counts, expected = (torch.cat([part[~is_rare], part[is_rare].sum()[None]]) for part in (counts, expected))
    return float(chisquare(counts.numpy(), expected.numpy()).pvalue)


def i1_sampling(options: argparse.Namespace) -> Result:
    """Silent head, sampling: frequencies against the target's exact distribution."""
    figures, holds = [], True
    target = tiny.build_model(vocab_size=5)
    attach_safety_head(target, tiny.build_head(target, NEVER), tokenizer=tiny.build_tokenizer())
    draft = tiny.perturb(tiny.build_model(vocab_size=5), noise=0.1)
    prompt, length, rows = torch.tensor([[1, 2, 3, 1, 2]]), 3, 1000
    expected = exact_distribution(target, prompt, length)
    for name, kwargs in {"draft": {"assistant_model": draft}, "lookup": {"prompt_lookup_num_tokens": 3}}.items():
        torch.manual_seed(1)
        counts = torch.zeros(len(expected))
        for _ in range(options.draws // rows):
            out = target.generate(
                prompt.repeat(rows, 1), max_new_tokens=length, do_sample=True, top_k=0, safespec=CONSTANT, **kwargs
            )
            codes = (out[:, prompt.shape[1] :] * 5 ** torch.arange(length - 1, -1, -1)).sum(1)
            counts += torch.bincount(codes, minlength=len(expected))
        p_value = fit_p_value(counts.double(), expected * counts.sum())
        holds &= p_value > 0.001
        figures.append(f"{name}: {int(counts.sum())} draws over {len(expected)} outcomes, p = {p_value:.3f}")
    return Result(holds, "sampling; " + "; ".join(figures))


def i2(options: argparse.Namespace) -> Result:
    """As many target forwards with the head on as with it off, but for the one that may read the last token."""
    model, tokenizer = real_target(torch.float32)
    figures, holds = [], True
    # by weights: on a busy machine the clock may stop drafts in one of two runs, which is nothing that the head does
    policies = [replace(policy, score_last_token=False) for policy in (CONSTANT, SafeSpecConfig(costs="weights"))]
    cases = itertools.product(drafting(model, options.draft_layers).items(), policies)
    for (name, kwargs), policy in cases:
        counts = []
        for is_monitored in (True, False):
            call = GuardedCall(
                policy, kwargs.get("assistant_model"), None, kwargs.get("num_assistant_tokens"), is_monitored
            )
            lookup = {key: value for key, value in kwargs.items() if key == "prompt_lookup_num_tokens"}
            with count_forwards(model) as seconds:
                for prompt in PROMPTS[:4]:
                    inputs = encode(tokenizer, [prompt])
                    model.generate(**inputs, max_new_tokens=48, do_sample=False, custom_generate=call, **lookup)
            counts.append(len(seconds))
        holds &= counts[0] == counts[1]
        kind = "adaptive" if policy.adaptive_drafts else "constant"
        figures.append(f"{name}, {kind}: {counts[0]} forwards on, {counts[1]} off")
    return Result(holds, "; ".join(figures))


def i3(options: argparse.Namespace) -> Result:
    """Under forced random flags, a streamer gets the answer and nothing else, and no flagged token."""
    target = tiny.build_model(num_hidden_layers=1)
    draft = tiny.perturb(target)
    num_flags = num_wrong = num_tokens = 0
    for run in range(options.runs):
        head = tiny.build_coin_head(target, chance=0.03 + 0.1 * (run % 4), seed=run)
        attach_safety_head(target, head, tokenizer=tiny.build_tokenizer())
        recorder = tiny.Recorder()
        kwargs = ({}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 3})[run % 3]
        policy = SafeSpecConfig(
            rollback_segments=run % 3, max_recoveries=8, adaptive_drafts=run % 2 == 0, **TINY_POLICY
        )
        with tiny.cheap_drafts():
            out = target.generate(
                torch.randint(9, 40, (1, 6), generator=torch.Generator().manual_seed(run)),
                max_new_tokens=24,
                do_sample=run % 2 == 1,
                safespec=policy,
                streamer=recorder,
                return_dict_in_generate=True,
                **kwargs,
            )
        is_flagged = out.risks[0] >= head.config.risk_threshold
        num_wrong += recorder.tokens != out.sequences[0].tolist() or bool(is_flagged.any()) or recorder.num_ends != 1
        num_flags, num_tokens = num_flags + out.statistics.num_flags, num_tokens + len(recorder.tokens)
    figures = f"{options.runs} runs, {num_tokens} tokens put, {num_flags} flags: {num_wrong} runs with a wrong token"
    return Result(num_wrong == 0 and num_flags >= options.runs, figures)


@contextmanager
def compare_after_rollbacks(differences: list[float]) -> Iterator[None]:
    """After every round with a flag, compares each row's next logits with those of a fresh prefill."""
    end_of_round: Callable[[Decoder], None] = Decoder._drop_finished
    seen = [0]

    def compare(decoder: Decoder) -> None:
        if decoder.statistics.num_flags != seen[0]:
            for index, row in enumerate(decoder.live):
                fork = decoder.target.fork(index, 1)
                kept = fork.forward([row.context(fork.lengths[0])], 1).logits_BTV[0, -1]
                fresh = decoder.target.model(torch.tensor([row.context(0)])).logits[0, -1]
                differences.append(float((kept - fresh).abs().max()))
        seen[0] = decoder.statistics.num_flags
        end_of_round(decoder)

    Decoder._drop_finished = compare  # type: ignore[method-assign]
    try:
        yield
    finally:
        Decoder._drop_finished = end_of_round  # type: ignore[method-assign]


def i4(options: argparse.Namespace) -> Result:
    """After forced rollbacks at random places the caches hold what a fresh prefill would give."""
    target = tiny.build_model(num_hidden_layers=1)
    draft = tiny.perturb(target)
    differences: list[float] = []
    with compare_after_rollbacks(differences):
        for run in range(12):
            head = tiny.build_coin_head(target, chance=0.08, seed=run)
            attach_safety_head(target, head, tokenizer=tiny.build_tokenizer())
            policy = SafeSpecConfig(
                rollback_segments=run % 3, max_recoveries=8, adaptive_drafts=run % 2 == 0, **TINY_POLICY
            )
            kwargs = ({}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 3})[run % 3]
            prompt = torch.randint(9, 40, (3, 8), generator=torch.Generator().manual_seed(run))
            with tiny.cheap_drafts():
                target.generate(prompt, max_new_tokens=40, do_sample=False, safespec=policy, **kwargs)
    num_tiny = len(differences)
    model, tokenizer = real_target(torch.float32)
    attach_safety_head(model, tiny.build_coin_head(model, chance=0.05, seed=0), tokenizer=tokenizer)
    with compare_after_rollbacks(differences):
        for start in range(0, 8, 4):
            inputs = encode(tokenizer, PROMPTS[start : start + 4])
            policy = SafeSpecConfig(max_recoveries=4, num_candidates=2, max_segment_tokens=12)
            model.generate(**inputs, max_new_tokens=40, do_sample=False, safespec=policy, prompt_lookup_num_tokens=4)
    worst = max(differences)
    num_real = len(differences) - num_tiny
    figures = f"{num_tiny} comparisons on tiny models, {num_real} on the real one, worst |logit| {worst:.1e}"
    return Result(num_tiny >= 200 and worst <= TIE, figures)


def i5(options: argparse.Namespace) -> Result:
    """A request for safety that can't be met raises, before any forward."""
    cases = refusals(tiny.Recorder())
    missed = not_refused(cases)
    figures = (
        f"{len(cases) - len(missed)} of {len(cases)} refused before a forward: {', '.join(name for name, _ in cases)}"
    )
    return Result(not missed, figures + (f"; NOT refused: {missed}" if missed else ""))


def round_costs(model: Any, length: int, rounds: int) -> list[float]:
    """Seconds of each round besides the target's forward, after a prompt of the given length."""
    costs: list[float] = []
    one_round: Callable[[Decoder], None] = Decoder._round
    with count_forwards(model) as forwards:

        def timed(decoder: Decoder) -> None:
            start = time.perf_counter()
            one_round(decoder)
            costs.append(time.perf_counter() - start - forwards[-1])

        Decoder._round = timed  # type: ignore[method-assign]
        try:
            prompt = torch.randint(100, 40000, (1, length), generator=torch.Generator().manual_seed(0))
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=rounds, min_new_tokens=rounds,
                do_sample=False, safespec=CONSTANT, prompt_lookup_num_tokens=4,
            )  # fmt: skip
        finally:
            Decoder._round = one_round  # type: ignore[method-assign]
    return costs[1:]


def i6(options: argparse.Namespace) -> Result:
    """Head and bookkeeping per round do not grow with the sequence."""
    model, _ = real_target(torch.float32)
    lengths = (128, 4096)
    costs: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(options.repeats):
        for length in lengths:
            costs[length] += round_costs(model, length, 32)
    short, long = (float(torch.tensor(costs[length]).median()) for length in lengths)
    figures = f"{short * 1e3:.2f} ms a round at context 128, {long * 1e3:.2f} ms at 4096, ratio {long / short:.2f}"
    return Result(long / short <= 1.2, figures)


INVARIANTS = {
    "I1": i1_float32, "I1b": i1_bfloat16, "I1s": i1_sampling, "I2": i2, "I3": i3, "I4": i4, "I5": i5, "I6": i6
}  # fmt: skip


def run_parts(parts: Mapping[str, Callable[[argparse.Namespace], Result]], options: argparse.Namespace) -> int:
    """Measures the parts that `options.only` names, into `options.json` as they come; 1 if one does not hold."""
    results: dict[str, Any] = {}
    for name in options.only.split(","):
        start = time.perf_counter()
        result = parts[name](options)
        seconds = time.perf_counter() - start
        results[name] = {"holds": result.holds, "figures": result.figures, "seconds": seconds}
        print(f"{name:4}{'holds' if result.holds else 'FAILS'}  {result.figures}  [{seconds:.0f} s]", flush=True)
        if options.json:
            write_json(options.json, results)
    return 0 if all(result["holds"] for result in results.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(INVARIANTS), help="comma-separated, of " + ", ".join(INVARIANTS))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts for I1")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per prompt for I1")
    parser.add_argument("--draws", type=int, default=20_000, help="samples for I1s")
    parser.add_argument("--runs", type=int, default=510, help="runs for I3")
    parser.add_argument("--repeats", type=int, default=3, help="repeats for I6")
    parser.add_argument("--draft-layers", type=int, default=20, help="layers of the truncated draft")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return run_parts(INVARIANTS, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
