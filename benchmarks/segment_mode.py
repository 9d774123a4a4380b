"""Measures segment mode on the default target; the draft is its own first layers. Exits with 1 if a bar is missed.

.venv/bin/python benchmarks/segment_mode.py              # half an hour on 2 cores
.venv/bin/python benchmarks/segment_mode.py --only I3,I5 # some

S   at least 200 segments: risks and grades are those of separate passes, digit by digit; accepted are exactly those
    whose risks are all below the threshold and whose grade reaches its own; forwards are one for each segment, those
    in which the target wrote, and those of recoveries
I2  as many target forwards with the head on as with it off
I3  under forced random flags, a streamer gets the answer and nothing else, and no flagged token
I4  after forced rollbacks the caches hold what a fresh prefill would give
I5  what segment mode can't do is refused before any forward
I6  head, grade and bookkeeping of a round do not grow with the sequence
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from invariants import (
    TIE,
    TINY_POLICY,
    Result,
    compare_after_rollbacks,
    count_forwards,
    encode,
    real_target,
    run_parts,
    tiny,
)
from prompts import PROMPTS
from refusals import not_refused, segment_refusals
from segments import Judged, recorded_segments, separate_grades, separate_risks
from tqdm import tqdm

from safespec_hf import SafeSpecConfig, attach_safety_head, load_truncated_draft
from safespec_hf.decoding.safety_mode import SafetyMode
from safespec_hf.decoding.segment_mode import SegmentDecoder
from safespec_hf.modeling import GuardedCall

# short segments: there are more of them to judge in as many tokens
SEGMENTS = SafeSpecConfig(verification="segment", seed=0, max_segment_tokens=16)
TINY_SEGMENTS = SafeSpecConfig(
    **TINY_POLICY, verification="segment", quality_prompt="pause w12 w13", quality_threshold=4, max_recoveries=8
)


def answer(model: Any, tokenizer: Any, draft: Any, prompt: str, policy: SafeSpecConfig, num_tokens: int) -> Any:
    return model.generate(
        **encode(tokenizer, [prompt]),
        assistant_model=draft,
        safespec=policy,
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )


@contextmanager
def written_rounds() -> Iterator[list[int]]:
    """How many rounds there were in which the target wrote, of single rows."""
    found, judge = [0], SegmentDecoder._judge

    def count(decoder: SegmentDecoder, turns: Any) -> Any:
        found[0] += not turns[0].is_judged
        return judge(decoder, turns)

    with patch.object(SegmentDecoder, "_judge", count):
        yield found


@contextmanager
def during_recoveries(forwards: list[float]) -> Iterator[list[int]]:
    """How many of the forwards were part of a recovery, tests of flags included."""
    found, recover = [0], SafetyMode.recover

    def count(mode: SafetyMode, *args: Any) -> None:
        before = len(forwards)
        recover(mode, *args)
        found[0] += len(forwards) - before

    with patch.object(SafetyMode, "recover", count):
        yield found


def judge_all(
    model: Any, tokenizer: Any, draft: Any, policy: SafeSpecConfig, options: Any
) -> tuple[list[Judged], str]:
    """Answers all prompts; gives the segments that were judged, and raises unless forwards are as many as they may."""
    num_forwards, counts = 0, Counter[str]()
    with recorded_segments() as judged, written_rounds() as written:
        for prompt in tqdm(PROMPTS[: options.prompts], desc="answers", disable=None):
            with count_forwards(model) as forwards, during_recoveries(forwards) as of_recoveries:
                output = answer(model, tokenizer, draft, prompt, policy, options.tokens)
            num_forwards += len(forwards)
            counts["forwards of recoveries"] += of_recoveries[0]
            counts["segments"] += output.statistics.num_segments
            counts["attempts"] += output.statistics.num_recovery_attempts
            counts["by the target"] += output.statistics.num_segments_by_target
            counts.update(segment.outcome for row in output.segments for segment in row)
    expected = counts["segments"] + written[0] + counts["forwards of recoveries"]
    assert num_forwards == expected, f"{num_forwards} forwards, not {expected}: {dict(counts)}"
    parts = [f"{num} {name}" for name, num in counts.items() if num]
    return judged, f"{', '.join(parts)}; {num_forwards} forwards, in {written[0]} of them the target wrote"


def check_passes(
    model: Any, tokenizer: Any, judged: list[Judged], policy: SafeSpecConfig
) -> tuple[Counter[str], list[float]]:
    """Counts segments of which the one forward said something else than separate ones, or whose outcome is wrong.

    Gives the expected grades as well, whatever the policy reads.
    """
    wrong, expected, threshold = Counter[str](), [], policy.risk_threshold or 1.0
    for segment in tqdm(judged, desc="separate passes", disable=None):
        grades = separate_grades(model, tokenizer, segment, policy.quality_prompt)
        risks = separate_risks(model, model.safety.head, segment)
        is_safe = max(segment.risks) < threshold
        is_good = segment.quality >= policy.quality_threshold
        outcome = "flagged" if not is_safe else "accepted" if is_good else "rewritten"
        difference = abs(grades[policy.quality_reading] - segment.quality)
        wrong["grades"] += difference > (0 if policy.quality_reading == "argmax" else 1e-3)
        wrong["risks"] += max(abs(one - other) for one, other in zip(segment.risks, risks, strict=True)) > TIE
        wrong["outcomes"] += outcome != segment.outcome
        expected.append(grades["expected"])
    return +wrong, expected


def segments(options: argparse.Namespace) -> Result:
    """What one forward says of a segment is what separate ones say, and what becomes of it is what follows."""
    model, tokenizer = real_target(torch.float32)
    draft = load_truncated_draft(model, num_layers=options.draft_layers)
    figures: list[str] = []

    def run(policy: SafeSpecConfig) -> tuple[list[Judged], Counter[str], list[float]]:
        judged, counts = judge_all(model, tokenizer, draft, policy, options)
        grades = dict(sorted(Counter(round(segment.quality) for segment in judged).items()))
        figures.append(f"{policy.quality_reading} >= {policy.quality_threshold:.2f}: {counts}; grades {grades}")
        print("    " + figures[-1], flush=True)
        return judged, *check_passes(model, tokenizer, judged, policy)

    first, wrong, expected = run(replace(SEGMENTS, risk_threshold=1.0))
    # and once more so that some are accepted, some are not, and some are flagged
    risk_threshold = sorted(max(segment.risks) for segment in first)[len(first) * 9 // 10]
    middle = replace(SEGMENTS, quality_threshold=statistics.median(expected), risk_threshold=risk_threshold)
    second, more, _ = run(replace(middle, quality_reading="expected"))
    num, wrong = len(first) + len(second), wrong + more
    figures.append(f"{num} compared with separate passes, wrong: {dict(wrong) or 'none'}")
    return Result(num >= 200 and not wrong, "; ".join(figures))


def i2(options: argparse.Namespace) -> Result:
    """As many target forwards with the head on as with it off, but for the one that may read the last token."""
    model, tokenizer = real_target(torch.float32)
    draft = load_truncated_draft(model, num_layers=options.draft_layers)
    counts = []
    for is_monitored in (True, False):
        call = GuardedCall(replace(SEGMENTS, score_last_token=False), draft, is_monitored=is_monitored)
        with count_forwards(model) as forwards:
            for prompt in PROMPTS[:4]:
                inputs = encode(tokenizer, [prompt])
                model.generate(**inputs, max_new_tokens=48, do_sample=False, custom_generate=call)
        counts.append(len(forwards))
    return Result(counts[0] == counts[1], f"{counts[0]} forwards on, {counts[1]} off")


def i3(options: argparse.Namespace) -> Result:
    """Under forced random flags, a streamer gets the answer and nothing else, and no flagged token."""
    target, words = tiny.build_model(num_hidden_layers=1), tiny.build_tokenizer(has_digits=True)
    draft = tiny.perturb(target, 0.05)
    counts = Counter[str]()
    for run in range(options.runs):
        head = tiny.build_coin_head(target, chance=0.03 + 0.1 * (run % 4), seed=run)
        attach_safety_head(target, head, tokenizer=words)
        recorder = tiny.Recorder()
        torch.manual_seed(run)
        out = target.generate(
            torch.randint(9, 28, (1, 6)),
            assistant_model=draft,
            max_new_tokens=24,
            do_sample=run % 2 == 1,
            safespec=replace(TINY_SEGMENTS, rollback_segments=run % 3, quality_threshold=(0, 4, 9)[run % 5 % 3]),
            streamer=recorder,
            return_dict_in_generate=True,
        )
        is_flagged = out.risks[0] >= head.config.risk_threshold
        counts["wrong"] += recorder.tokens != out.sequences[0].tolist() or bool(is_flagged.any())
        counts["flags"] += out.statistics.num_flags
        counts["tokens"] += len(recorder.tokens)
    figures = (
        f"{options.runs} runs, {counts['tokens']} tokens put, {counts['flags']} flags: {counts['wrong']} wrong runs"
    )
    return Result(counts["wrong"] == 0 and counts["flags"] >= options.runs, figures)


def i4(options: argparse.Namespace) -> Result:
    """After forced rollbacks at random places the caches hold what a fresh prefill would give."""
    target, words = tiny.build_model(num_hidden_layers=1), tiny.build_tokenizer(has_digits=True)
    draft, differences = tiny.perturb(target, 0.05), list[float]()
    with compare_after_rollbacks(differences):
        for run in range(24):
            attach_safety_head(target, tiny.build_coin_head(target, chance=0.08, seed=run), tokenizer=words)
            prompt = torch.randint(9, 28, (3, 8), generator=torch.Generator().manual_seed(run))
            policy = replace(TINY_SEGMENTS, rollback_segments=run % 3)
            target.generate(prompt, assistant_model=draft, max_new_tokens=40, do_sample=False, safespec=policy)
    num_tiny = len(differences)
    model, tokenizer = real_target(torch.float32)
    real_draft = load_truncated_draft(model, num_layers=options.draft_layers)
    attach_safety_head(model, tiny.build_coin_head(model, chance=0.05, seed=0), tokenizer=tokenizer)
    policy = replace(SEGMENTS, max_recoveries=4, num_candidates=2, max_segment_tokens=12, quality_threshold=5)
    with compare_after_rollbacks(differences):
        for start in range(0, 8, 4):
            inputs = encode(tokenizer, PROMPTS[start : start + 4])
            model.generate(**inputs, assistant_model=real_draft, max_new_tokens=40, do_sample=False, safespec=policy)
    num_real, worst = len(differences) - num_tiny, max(differences)
    figures = f"{num_tiny} comparisons on tiny models, {num_real} on the real one, worst |logit| {worst:.1e}"
    return Result(len(differences) >= 200 and worst <= TIE, figures)


def i5(options: argparse.Namespace) -> Result:
    """What segment mode can't do raises, before any forward."""
    cases = segment_refusals()
    missed = not_refused(cases)
    figures = f"{len(cases) - len(missed)} of {len(cases)} refused before a forward: "
    figures += ", ".join(name for name, _ in cases)
    return Result(not missed, figures + (f"; NOT refused: {missed}" if missed else ""))


def seconds_of_round(model: Any, draft: Any, length: int, policy: SafeSpecConfig) -> float:
    """What a round of one answer took besides the models' forwards, after a prompt of the given length."""
    prompt = torch.randint(100, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    with count_forwards(model) as of_target, count_forwards(draft) as of_draft:
        start = time.perf_counter()
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), assistant_model=draft, max_new_tokens=256,
            min_new_tokens=256, do_sample=False, safespec=policy, return_dict_in_generate=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start - sum(of_target) - sum(of_draft)
    return float(seconds / out.statistics.num_rounds)


def i6(options: argparse.Namespace) -> Result:
    """What a round costs besides the models' forwards does not grow with the sequence."""
    model, _ = real_target(torch.float32)
    draft = load_truncated_draft(model, num_layers=2)
    policy = replace(SEGMENTS, quality_threshold=0)
    costs: dict[int, list[float]] = {128: [], 4096: []}
    seconds_of_round(model, draft, 128, policy)  # weights are packed in the first call, which is no round's cost
    for _ in range(options.repeats):
        for length, found in costs.items():
            found.append(seconds_of_round(model, draft, length, policy))
    short, long = (statistics.median(found) for found in costs.values())
    figures = f"{short * 1e3:.1f} ms a round at context 128, {long * 1e3:.1f} ms at 4096, ratio {long / short:.2f}"
    return Result(long / short <= 1.2, figures)


PARTS = {"S": segments, "I2": i2, "I3": i3, "I4": i4, "I5": i5, "I6": i6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated, of " + ", ".join(PARTS))
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts for S")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per prompt for S")
    parser.add_argument("--runs", type=int, default=300, help="runs for I3")
    parser.add_argument("--repeats", type=int, default=3, help="repeats for I6")
    parser.add_argument("--draft-layers", type=int, default=20, help="layers of the truncated draft")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return run_parts(PARTS, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
