"""Guarded speculative decoding on a real model, in a terminal: `make demo`.

1. A harmless prompt: the target alone, and guarded with drafts. Same text; speed, acceptance and risk are shown.
2. A harmless prompt at a lowered threshold, so that the head fires: flag, rollback, candidates, outcome.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from safespec_hf import Provenance, SafeSpecConfig, SafeSpecEvent, SafeSpecOutput, load_default

QUESTION = "Give three tips for a good night's sleep."
OTHER_QUESTION = "Give three tips for speaking in front of people."
BARS = "▁▂▃▄▅▆▇█"
LOWEST_RISK = 1e-3  # of the lowest bar but one
STYLES = {Provenance.TARGET: "white", Provenance.DRAFTED: "green", Provenance.RECOVERED: "bold cyan"}
console = Console(highlight=False)


def encode(tokenizer: Any, prompt: str) -> Any:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def timed(model: Any, inputs: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    output = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **kwargs)
    return output, time.perf_counter() - start


def risk_bars(risks: list[float], threshold: float) -> str:
    """One character per token, a dot where there is no risk: from `LOWEST_RISK` up to the threshold, in equal ratios.

    The full block is for risks at the threshold or above it, and for no others.
    """
    steps = len(BARS) - 2  # between the lowest bar, which is all below the scale, and the full one
    ratio = math.log(threshold / LOWEST_RISK) / steps

    def bar(risk: float) -> str:
        if math.isnan(risk):
            return "·"
        if risk >= threshold:
            return BARS[-1]
        return BARS[0] if risk < LOWEST_RISK else BARS[min(1 + int(math.log(risk / LOWEST_RISK) / ratio), steps)]

    return "".join(map(bar, risks))


def coloured(tokenizer: Any, output: SafeSpecOutput, num_prompt: int) -> Text:
    """The answer, each token in the colour of where it came from."""
    assert output.provenance is not None
    text = Text()
    for token, origin in zip(output.sequences[0, num_prompt:].tolist(), output.provenance[0].tolist(), strict=True):
        text.append(tokenizer.decode([token], skip_special_tokens=True), style=STYLES.get(Provenance(origin), "red"))
    return text


def known(risks: list[float]) -> list[float]:
    return [risk for risk in risks if not math.isnan(risk)]


def show_risk(output: SafeSpecOutput, threshold: float) -> None:
    assert output.risks is not None
    risks = output.risks[0].tolist()
    console.print(
        f"Risk after each token, on a scale of equal ratios: {BARS[0]} is below {LOWEST_RISK}, {BARS[-1]} is the "
        f"threshold of {threshold:.3f}. The highest is {max(known(risks), default=math.nan):.3f}."
    )
    console.print(Text(risk_bars(risks, threshold), style="yellow"))


def show_harmless(model: Any, tokenizer: Any, draft: Any, num_tokens: int, repeats: int) -> None:
    inputs = encode(tokenizer, QUESTION)
    num_prompt = inputs["input_ids"].shape[1]
    arms: dict[str, dict[str, Any]] = {"alone": {}, "guarded": {"safespec": True, "assistant_model": draft}}
    for arguments in arms.values():  # warm up
        timed(model, inputs, max_new_tokens=8, **arguments)
    outputs: dict[str, Any] = {}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arguments in arms.items():
            outputs[name], seconds = timed(model, inputs, max_new_tokens=num_tokens, **arguments)
            rates[name].append((outputs[name].sequences.shape[1] - num_prompt) / seconds)
    alone, guarded = outputs["alone"], outputs["guarded"]
    console.print(f"Prompt: {QUESTION}")
    console.print(Panel(coloured(tokenizer, guarded, num_prompt), title="answer (green: drafted and accepted)"))
    table = Table("", "tokens/s (median)", "target forwards", "drafts accepted")
    median = {name: statistics.median(values) for name, values in rates.items()}
    table.add_row("target alone", f"{median['alone']:.1f}", str(alone.sequences.shape[1] - num_prompt), "")
    counts = guarded.statistics
    acceptance = f"{counts.num_accepted_tokens} of {counts.num_draft_tokens}"
    table.add_row("guarded, with drafts", f"{median['guarded']:.1f}", str(counts.num_target_forwards), acceptance)
    console.print(table)
    is_same = torch.equal(alone.sequences, guarded.sequences)
    console.print(f"Same text: {'[green]yes[/]' if is_same else '[red]no[/]'}")
    console.print(describe_speed(median["guarded"] / median["alone"], repeats))
    show_risk(guarded, model.safety.risk_threshold)


def describe_speed(speedup: float, repeats: int) -> str:
    """What was measured here, and no more than that."""
    verdict = "" if speedup >= 1 else " Here drafts and the head cost more than they save."
    return f"Speed: {speedup:.2f}x of the target alone, on this machine, in float32, {repeats} answers each.{verdict}"


def show_recovery(model: Any, tokenizer: Any, draft: Any, num_tokens: int) -> None:
    inputs = encode(tokenizer, OTHER_QUESTION)
    num_prompt = inputs["input_ids"].shape[1]
    arguments = {"assistant_model": draft, "max_new_tokens": num_tokens}
    silent, _ = timed(model, inputs, safespec=SafeSpecConfig(risk_threshold=1.0), **arguments)
    # nothing is wrong with this answer: the threshold is put just under its own highest risk, to see the head fire
    threshold = max(known(silent.risks[0].tolist())) * 0.999
    policy = SafeSpecConfig(
        risk_threshold=threshold,
        max_segment_tokens=64,  # a tip is a segment
        rollback_segments=0,
        num_candidates=6,
        max_recoveries=3,
        recovery_temperature=0.7,
        reflection="",  # a model as small as this one loses the thread over it
    )
    usual = model.safety.risk_threshold
    console.print(f"Prompt: {OTHER_QUESTION}")
    console.print(
        f"The answer is harmless, and its risk stays below the head's threshold of {usual:.3f}. "
        f"For show, the threshold is lowered to {threshold:.3f}, just under the highest risk."
    )
    output, seconds = timed(model, inputs, safespec=policy, **arguments)
    for number, event in enumerate(output.events[0], 1):
        show_event(number, event, threshold)
    console.print(Panel(coloured(tokenizer, output, num_prompt), title="what the caller gets (cyan: recovered)"))
    show_risk(output, threshold)
    console.print(
        f"Ended by: [bold]{output.finish_reasons[0]}[/]. {output.statistics.num_flags} flags, {seconds:.1f} s."
    )


def show_event(number: int, event: SafeSpecEvent, threshold: float) -> None:
    lines = Text()
    lines.append(f"flag      token {event.position}, risk {event.risk:.3f} >= {threshold:.3f}\n", "red")
    lines.append(f"rollback  {event.num_discarded} tokens given up, {event.rolled_back_to} kept\n", "yellow")
    for index, risk in enumerate(event.candidate_risks):
        style = "bold cyan" if index == event.chosen else "dim"
        note = ", the safest" if index == event.chosen else ", unsafe" if risk >= threshold else ""
        lines.append(f"candidate {index}: highest risk {risk:.3f}{note}\n", style)
    lines.append(f"outcome   {event.outcome}", "bold")
    console.print(Panel(lines, title=f"event {number}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=160, help="new tokens per answer, at most")
    parser.add_argument("--repeats", type=int, default=2, help="timed repeats of the first part")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with console.status("loading the target (converted once, on the first run) ..."):
        model, tokenizer, draft = load_default(dtype=torch.float32)
    console.rule("1. a harmless prompt")
    show_harmless(model, tokenizer, draft, options.tokens, options.repeats)
    console.rule("2. the head fires")
    show_recovery(model, tokenizer, draft, options.tokens)


if __name__ == "__main__":
    main()
