"""Guarded speculative decoding on a real model, in a terminal: `make demo`.

1. A harmless prompt: the target alone, and guarded with drafts. Same text; speed, acceptance and risk are shown.
2. A harmless prompt at a lowered threshold, so that the head fires: flag, rollback, reflection, candidates, outcome.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from safespec_hf import (
    Provenance,
    SafeSpecConfig,
    SafeSpecOutput,
    attach_safety_head,
    load_default_draft,
    load_default_head,
    load_default_target,
)

QUESTION = (
    "Correct the spelling and give the text back: The old lighthous stands on a rock by the sea. Every evening the "
    "keeper climbs the stairs of the old lighthouse and lights the lamp. The ships on the sea see the lamp of the old "
    "lighthouse and find their way home."
)
MILD = "My neighbour's dog barks all night. Write an angry but honest letter to the neighbour."
BARS = " ▁▂▃▄▅▆▇█"
STYLES = {Provenance.TARGET: "white", Provenance.DRAFTED: "green", Provenance.RECOVERED: "bold cyan"}
console = Console()


def encode(tokenizer: Any, prompt: str) -> Any:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def timed(model: Any, inputs: Any, **kwargs: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    output = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **kwargs)
    return output, time.perf_counter() - start


def risk_bars(risks: list[float]) -> str:
    """One character per token: its risk from 0 to 1; a dot where there is none."""
    return "".join("·" if math.isnan(risk) else BARS[min(int(risk * len(BARS)), len(BARS) - 1)] for risk in risks)


def coloured(tokenizer: Any, output: SafeSpecOutput, num_prompt: int) -> Text:
    """The answer, each token in the colour of where it came from."""
    assert output.provenance is not None
    text = Text()
    for token, origin in zip(output.sequences[0, num_prompt:].tolist(), output.provenance[0].tolist(), strict=True):
        text.append(tokenizer.decode([token], skip_special_tokens=True), style=STYLES.get(Provenance(origin), "red"))
    return text


def show_harmless(model: Any, tokenizer: Any, num_tokens: int, repeats: int) -> None:
    inputs = encode(tokenizer, QUESTION)
    num_prompt = inputs["input_ids"].shape[1]
    guarded_arguments = {"safespec": True, "assistant_model": load_default_draft(model)}
    timed(model, inputs, max_new_tokens=4)  # warm up
    rates: dict[str, list[float]] = {"target alone": [], "guarded, with drafts": []}
    for _ in range(repeats):
        plain, plain_seconds = timed(model, inputs, max_new_tokens=num_tokens)
        guarded, guarded_seconds = timed(model, inputs, max_new_tokens=num_tokens, **guarded_arguments)
        num_new = guarded.sequences.shape[1] - num_prompt
        rates["target alone"].append((plain.sequences.shape[1] - num_prompt) / plain_seconds)
        rates["guarded, with drafts"].append(num_new / guarded_seconds)
    console.print(Panel(coloured(tokenizer, guarded, num_prompt), title="answer (green: drafted and accepted)"))
    table = Table("", "tokens/s (median)", "target forwards", "acceptance")
    median = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    statistics = guarded.statistics
    table.add_row("target alone", f"{median['target alone']:.1f}", str(plain.sequences.shape[1] - num_prompt), "")
    table.add_row(
        "guarded, with drafts",
        f"{median['guarded, with drafts']:.1f}",
        str(statistics.num_target_forwards),
        f"{statistics.acceptance_rate:.0%}",
    )
    console.print(table)
    is_same = torch.equal(plain.sequences, guarded.sequences)
    speedup = median["guarded, with drafts"] / median["target alone"]
    console.print(
        f"same text: {'[green]yes[/]' if is_same else '[red]no[/]'}    speed: {speedup:.2f}x of the target alone"
    )
    show_risk(guarded, model.safety.risk_threshold)


def show_risk(output: SafeSpecOutput, threshold: float) -> None:
    assert output.risks is not None
    risks = output.risks[0].tolist()
    highest = max((risk for risk in risks if not math.isnan(risk)), default=math.nan)
    console.print(f"risk along the answer (threshold {threshold:.3f}, highest {highest:.3f}):")
    console.print(Text(risk_bars(risks), style="yellow"))


def show_recovery(model: Any, tokenizer: Any, num_tokens: int) -> None:
    inputs = encode(tokenizer, MILD)
    num_prompt = inputs["input_ids"].shape[1]
    silent, _ = timed(model, inputs, max_new_tokens=num_tokens, safespec=SafeSpecConfig(risk_threshold=1.0))
    risks = [risk for risk in silent.risks[0].tolist() if not math.isnan(risk)]
    # nothing is wrong with this answer: the threshold is put just under its own highest risk, to see the head fire
    threshold = max(risks) * 0.999
    policy = SafeSpecConfig(
        risk_threshold=threshold,
        num_candidates=4,
        max_recoveries=3,
        max_segment_tokens=24,
        recovery_temperature=0.7,
    )
    console.print(
        f"prompt: {MILD}\nthreshold lowered to {threshold:.3f} for show, just under this answer's highest risk"
    )
    output, seconds = timed(model, inputs, max_new_tokens=num_tokens, safespec=policy)
    for number, event in enumerate(output.events[0], 1):
        show_event(number, event, threshold)
    console.print(Panel(coloured(tokenizer, output, num_prompt), title="what the caller gets (cyan: recovered)"))
    show_risk(output, threshold)
    console.print(
        f"finish reason: [bold]{output.finish_reasons[0]}[/], {seconds:.1f} s, {output.statistics.num_flags} flags"
    )


def show_event(number: int, event: Any, threshold: float) -> None:
    lines = Text()
    lines.append(f"flag      token {event.position}, risk {event.risk:.3f} >= {threshold:.3f}\n", "red")
    lines.append(f"rollback  to token {event.rolled_back_to}, {event.num_discarded} tokens given up\n", "yellow")
    lines.append("reflect   the policy's reflection is read by the model, hidden from the answer\n", "magenta")
    for index, risk in enumerate(event.candidate_risks):
        style = "bold cyan" if index == event.chosen else "dim"
        note = " <- safest" if index == event.chosen else " unsafe" if risk >= threshold else ""
        log_prob = event.candidate_log_probs[index]
        lines.append(f"candidate {index}: risk {risk:.3f}, mean log-probability {log_prob:.2f}{note}\n", style)
    lines.append(f"outcome   {event.outcome}", "bold")
    console.print(Panel(lines, title=f"event {number}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per answer")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of the first part")
    options = parser.parse_args()
    logging.disable_progress_bar()
    with console.status("loading the target (converted once, on the first run) ..."):
        model, tokenizer = load_default_target(dtype=torch.float32)
        attach_safety_head(model, load_default_head(), tokenizer=tokenizer)
    console.rule("1. a harmless prompt")
    show_harmless(model, tokenizer, options.tokens, options.repeats)
    console.rule("2. the head fires")
    show_recovery(model, tokenizer, options.tokens)


if __name__ == "__main__":
    main()
