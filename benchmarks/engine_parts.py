"""The parts of benchmarks/engine.py."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine_sessions import BATCH, encode_prompts, session
from pages import update_page
from prompts import PROMPTS
from provenance import provenance, write_json

PAGE = Path(__file__).parents[1] / "docs" / "vllm.md"
SETTINGS = ("plain", "ngram", "draft", "chunked", "preempted")
GREEDY = {"temperature": 0.0}
_known: dict[str, Any] = {}  # answers that several parts look at


class Bar(NamedTuple):
    """Something that has to hold."""

    claim: str
    found: str
    is_kept: bool


def hold(parts: Mapping[str, Callable[[], tuple[dict[str, Any], list[Bar]]]], chosen: str, out: Path) -> int:
    """Runs the parts that are named, commas between them; writes and prints what came out; 1 if a bar is missed.

    Parts that the file has from earlier runs stay in it. A file of `benchmarks/results` is shown in `docs/vllm.md`.
    """
    names = chosen.split(",")
    if unknown := sorted(set(names) - set(parts)):
        raise SystemExit(f"no part {', '.join(unknown)}: there are {', '.join(parts)}")
    results = json.loads(out.read_text())["results"] if out.is_file() else dict[str, Any]()
    for name in names:
        figures, bars = parts[name]()
        where = {field: value for field, value in provenance().items() if field in ("argv", "git_sha", "time")}
        results[name] = {**where, "figures": figures, "bars": [bar._asdict() for bar in bars]}
        print(f"{name}: {figures}")
        for bar in bars:
            print(f"  {'ok  ' if bar.is_kept else 'MISS'} {bar.claim}: {bar.found}", flush=True)
        write_json(out, results)
    if out.resolve().parent == Path(__file__).parent / "results":
        update_page(PAGE, f"<!-- {out.stem}: begin -->\n", table(results), f"<!-- {out.stem}: end -->\n")
    return int(not all(bar["is_kept"] for name in names for bar in results[name]["bars"]))


def table(results: Mapping[str, Any]) -> str:
    """All bars, as Markdown."""
    lines = ["", "| part | bar | found | |", "|---|---|---|---|"]
    for name, part in results.items():
        for bar in part["bars"]:
            lines.append(
                f"| {name} | {bar['claim']} | {bar['found']} | {'held' if bar['is_kept'] else '**missed**'} |"
            )
    return "\n".join(lines) + "\n\n"


def greedy(options: Any) -> list[dict[str, Any]]:
    return [GREEDY | {"max_tokens": options.tokens}] * options.prompts


def mixed(options: Any) -> list[dict[str, Any]]:
    sampled = {"temperature": 0.8, "max_tokens": options.tokens}
    return [one if index % 2 == 0 else sampled | {"seed": index} for index, one in enumerate(greedy(options))]


def prompts_of(options: Any) -> list[list[int]]:
    return encode_prompts((PROMPTS * math.ceil(options.prompts / len(PROMPTS)))[: options.prompts])


def silent_answers(options: Any) -> dict[str, Any]:
    """Of every setting: without us, with us, and with us beside sampled requests."""
    if _known:
        return _known
    prompts = prompts_of(options)
    for setting in SETTINGS:
        with session("plain", setting) as plain:
            found = {"plain": plain("answer", prompts, greedy(options))}
            if setting in ("plain", "ngram", "draft"):
                found["plain mixed"] = plain("answer", prompts, mixed(options))
        with session("guarded", setting) as guarded:
            found["guarded"] = guarded("answer", prompts, greedy(options))
            found["num_preemptions"] = guarded("metrics")["num_preemptions"]
            if setting in ("plain", "ngram", "draft"):
                found["guarded mixed"] = guarded("answer", prompts, mixed(options))
            found["metrics"], found["report"] = guarded("metrics"), guarded("report")
        _known[setting] = found
        print(f"  answered: {setting}, failures {found['report']['failures']}", flush=True)
    return _known


def num_same(left: list[dict[str, Any]], right: list[dict[str, Any]], which: range) -> int:
    return sum(left[index]["tokens"] == right[index]["tokens"] for index in which)


def same(options: Any) -> tuple[dict[str, Any], list[Bar]]:
    known, bars, figures = silent_answers(options), [], dict[str, Any]()
    every, even = range(options.prompts), range(0, options.prompts, 2)
    for setting in SETTINGS:
        found = known[setting]
        num = num_same(found["plain"], found["guarded"], every)
        bars.append(Bar(f"{setting}: greedy tokens", f"{num} of {len(every)} the same", num == len(every)))
        figures[setting] = {"same": num, "metrics": found["metrics"], "report": found["report"]}
        if "guarded mixed" in found:
            # beside sampled requests the wheel's own greedy answers are wrong where it drafts: not what to be like
            num = num_same(found["plain"], found["guarded mixed"], even)
            own = num_same(found["plain"], found["plain mixed"], even)
            claim = f"{setting}: greedy tokens beside sampled requests"
            bars.append(Bar(claim, f"{num} of {len(even)} the same; without us {own}", num == len(even)))
    num = known["preempted"]["num_preemptions"]
    bars.append(Bar("preemptions", f"{num}", num >= 20))
    num = known["preempted"]["report"]["num_resumed"]
    bars.append(Bar("of which resumed in the answer, from the prefix cache", f"{num}", num > 0))
    return figures, bars


def risks(options: Any) -> tuple[dict[str, Any], list[Bar]]:
    known, prompts = silent_answers(options), prompts_of(options)
    bars, figures, total = [], dict[str, Any](), 0
    with session("own") as own:
        for setting in SETTINGS:
            for name in ("guarded", "guarded mixed"):
                answers = known[setting].get(name, [])
                expected = own("all_risks", prompts[: len(answers)], [answer["tokens"] for answer in answers])
                pairs = [
                    (risk, other)
                    for answer, others in zip(answers, expected, strict=True)
                    for risk, other in zip(answer["risks"], others, strict=True)
                    if not math.isnan(risk)
                ]
                if pairs:
                    worst = max(abs(risk - other) for risk, other in pairs)
                    unknown = sum(len(answer["risks"]) for answer in answers) - len(pairs)
                    figures[f"{setting}, {name}"] = {"tokens": len(pairs), "worst": worst, "unknown": unknown}
                    found = f"within {worst:.1e} on {len(pairs)} tokens, {unknown} end tokens have none"
                    is_kept = worst <= 1e-4 and unknown <= len(answers)
                    bars.append(Bar(f"risks, {setting}, {name}", found, is_kept))
                    total += len(pairs)
    return figures, [*bars, Bar("risks compared", str(total), total >= 2000)]


def peaks(risks: list[float]) -> list[int]:
    """Tokens that are riskier than all before them by a margin: a threshold can make them the first to be flagged."""
    found, highest = [], 0.0
    for index, risk in enumerate(risks):
        if risk > highest * 1.01 and risk > 1e-7:
            found.append(index)
        highest = max(highest, 0.0 if math.isnan(risk) else risk)
    return found


def forced(answers: list[dict[str, Any]], seed: int, least: int = 0) -> list[tuple[int, int, float]]:
    """For a random half of the requests where it is possible: which, at which token, and the threshold."""
    draw, found = random.Random(seed), []
    for index, answer in enumerate(answers):
        places = [place for place in peaks(answer["risks"]) if place >= least]
        if places and draw.random() < 0.6:
            place = draw.choice(places)
            found.append((index, place, answer["risks"][place] * (1 - 1e-3)))
    return found


def flags(options: Any) -> tuple[dict[str, Any], list[Bar]]:
    prompts, num, counts = prompts_of(options), options.prompts, dict[str, Any]()
    total = {"requests": 0, "flagged": 0, "exact": 0, "neighbours": 0, "unchanged": 0, "shown": 0, "left": 0}
    for setting in ("plain", "ngram", "draft", "chunked"):
        with session("guarded", setting) as guarded:
            silent = guarded("answer", prompts, greedy(options))
            for seed in range(4):
                policies = [{"risk_threshold": 1.0, "policy": "refuse"} for _ in range(num)]
                places = forced(silent, seed)
                for index, _, threshold in places:
                    policies[index]["risk_threshold"] = threshold
                answers = guarded("answer", prompts, greedy(options), policies)
                chosen = {index: (place, threshold) for index, place, threshold in places}
                for index, (answer, before) in enumerate(zip(answers, silent, strict=True)):
                    total["requests"] += 1
                    if index not in chosen:
                        total["neighbours"] += 1
                        total["unchanged"] += answer["tokens"] == before["tokens"] and not answer["events"]
                        continue
                    place, threshold = chosen[index]
                    event = answer["events"][0] if answer["events"] else None
                    total["flagged"] += 1
                    total["exact"] += event is not None and event.position == place
                    kept = event.rolled_back_to if event else 0
                    total["shown"] += any(risk >= threshold for risk in answer["risks"])
                    total["shown"] += answer["tokens"][:kept] != before["tokens"][:kept]
            report = guarded("report")
            total["left"] += report["num_entries"] + report["num_running"]
            counts[setting] = report
    bars = [
        Bar("requests", str(total["requests"]), total["requests"] >= 300),
        Bar(
            "stopped at the very token", f"{total['exact']} of {total['flagged']}", total["exact"] == total["flagged"]
        ),
        Bar(
            "neighbours unchanged",
            f"{total['unchanged']} of {total['neighbours']}",
            total["unchanged"] == total["neighbours"],
        ),
        Bar("flagged tokens in answers", str(total["shown"]), total["shown"] == 0),
        Bar("entries left", str(total["left"]), total["left"] == 0),
    ]
    return total | {"reports": counts}, bars


def compare_recoveries(
    done: Sequence[tuple[int, dict[str, Any], dict[str, Any]]], prompts: list[list[int]], num_tokens: int
) -> tuple[int, list[Any], list[str]]:
    """How many answers end as our own decoding lets them, with the same candidates; the others; and near-ties."""
    same_end, differences, near_ties = 0, list[Any](), list[str]()
    with session("own") as own:
        for index, chosen, answer in done:
            try:
                picked = [event.chosen for event in answer["events"]]
                found = own("recover", prompts[index], num_tokens, chosen, answer["candidates"], picked)
            except EOFError:
                differences.append((index, "our own decoding wanted other candidates"))
                break
            tokens, events, reason, num_left, ties = found
            near_ties += ties
            outcomes = [(event.outcome, event.chosen, event.position) for event in events]
            expected = [(event.outcome, event.chosen, event.position) for event in answer["events"]]
            is_same = (
                tokens == answer["tokens"] and reason == answer["reason"] and outcomes == expected and not num_left
            )
            same_end += is_same
            if not is_same:
                differences.append((index, outcomes, expected, tokens == answer["tokens"]))
    return same_end, differences, near_ties


def recovery(options: Any) -> tuple[dict[str, Any], list[Bar]]:
    prompts, num = prompts_of(options), options.prompts
    policy = {
        "num_candidates": 4,
        "max_recoveries": 3,
        "max_segment_tokens": 12,
        "seed": 0,
        "reflection_scope": "recovery",
        "false_alarm_margin": None,  # forced flags are believed: only so is there always a reflection
    }
    done, figures = [], dict[str, Any]()
    for setting in ("plain", "ngram"):
        with session("guarded", setting) as guarded:
            silent = guarded("answer", prompts, greedy(options))
            before = guarded("metrics")
            for seed in range(3):
                places = forced(silent, 100 + seed, least=4)
                choice = {"candidate_choice": ("likeliest_safe", "safest")[seed % 2]}
                policies = [policy | choice | {"risk_threshold": 1.0} for _ in range(num)]
                for index, _, threshold in places:
                    policies[index]["risk_threshold"] = threshold
                answers = guarded("answer", prompts, greedy(options), policies)
                done += [(index, policies[index], answers[index]) for index, _, _ in places]
            after, report = guarded("metrics"), guarded("report")
        queries, hits = (
            after.get(name, 0) - before.get(name, 0) for name in ("prefix_cache_queries", "prefix_cache_hits")
        )
        share = hits / max(queries, 1)
        figures[setting] = {"prefix_cache_hit_share": share, "failures": report["failures"]}
    num_recoveries = sum(event.outcome == "recovered" for _, _, answer in done for event in answer["events"])
    num_attempts = sum(len(answer["events"]) for _, _, answer in done)
    same_end, differences, near_ties = compare_recoveries(done, prompts, options.tokens)
    figures |= {"answers": len(done), "recoveries": num_recoveries, "events": num_attempts}
    figures["differences"] = [str(one) for one in differences]
    figures["near_ties"] = near_ties
    shares = ", ".join(f"{figures[one]['prefix_cache_hit_share']:.0%} {one}" for one in ("plain", "ngram"))
    return figures, [
        Bar("forced recoveries", f"{num_recoveries}, {num_attempts} events", num_recoveries >= 100),
        Bar(
            "answers that end as ours would",
            f"{same_end} of {len(done)}, {len(near_ties)} near-ties taken as the engine took them",
            same_end == len(done),
        ),
        Bar(
            "prefix-cache hits", shares, all(figures[one]["prefix_cache_hit_share"] > 0 for one in ("plain", "ngram"))
        ),
    ]


def speed(options: Any) -> tuple[dict[str, Any], list[Bar]]:
    prompts, tokens = prompts_of(options)[:BATCH], 64
    params = [GREEDY | {"max_tokens": tokens}] * BATCH  # of both: answers that end early leave a smaller batch
    rates: dict[str, list[float]] = {"plain": [], "guarded": []}
    with session("plain", "plain") as plain, session("guarded", "plain") as guarded:
        silent = [answer["tokens"] for answer in guarded("answer", prompts, params)]
        largest = guarded("report")["largest"]
        guarded("unwatch")
        sides = {"plain": plain, "guarded": guarded}
        for pair in range(options.pairs + 1):
            for name in ("plain", "guarded") if pair % 2 else ("guarded", "plain"):
                start = time.perf_counter()
                answers = sides[name]("answer", prompts, params)
                seconds = time.perf_counter() - start
                assert [answer["tokens"] for answer in answers] == silent, "not the same work"
                if pair > 0:  # the first one warms up
                    rates[name].append(sum(len(answer["tokens"]) for answer in answers) / seconds)
    ratios = [on / off for on, off in zip(rates["guarded"], rates["plain"], strict=True)]
    ratio = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    found = f"{ratio:.3f}, quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}, {len(ratios)} pairs"
    return {"rates": rates, "ratio": ratio, "largest_state_bytes": largest}, [
        Bar("head on over head off", found, ratio >= 0.95 and len(ratios) >= 20),
        Bar("bytes of state per request", str(largest), largest <= 64 * 1024),
    ]


PARTS: dict[str, Callable[[Any], tuple[dict[str, Any], list[Bar]]]] = {
    "same": same,
    "risks": risks,
    "flags": flags,
    "recovery": recovery,
    "speed": speed,
}
