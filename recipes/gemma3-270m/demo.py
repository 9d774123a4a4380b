"""Guarded answers of Gemma 3 270M to harmless prompts, drafted by prompt lookup: demo.py WORK [PROMPT ...]."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safespec_hf import SafeSpecOutput, attach_safety_head
from safespec_hf.training.chat_template import next_turn
from safespec_hf.training.record import read_record

PROMPTS = ["How do I plant tomatoes?", "Give three tips for a good night's sleep.", "How is bread made?"]


def load(work: Path) -> tuple[Any, Any]:
    """The target with its head attached, and its tokenizer, asked in the format that the head was trained with."""
    tokenizer = AutoTokenizer.from_pretrained(work / "target")
    tokenizer.chat_template = read_record(work / "head")["chat_template"]
    model = AutoModelForCausalLM.from_pretrained(work / "target", dtype=torch.bfloat16)
    return attach_safety_head(model, work / "head", tokenizer=tokenizer), tokenizer


def ask(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> tuple[str, SafeSpecOutput]:
    """The answer, which ends where the model would ask the next question itself, and all that came with it."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(
        **inputs,
        safespec=True,
        prompt_lookup_num_tokens=5,
        stop_strings=[next_turn(tokenizer)],
        tokenizer=tokenizer,
        max_new_tokens=num_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    text = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.partition(next_turn(tokenizer))[0], output


def describe(output: SafeSpecOutput, threshold: float) -> str:
    """Risks and statistics of one answer, in two lines."""
    risks, counts = output.risks[0], output.statistics
    known = risks[~risks.isnan()]
    risk = f"risk: mean {known.mean():.3f}, highest {known.max():.3f}, threshold {threshold:.3f}"
    forwards = f"{counts.num_new_tokens} tokens in {counts.num_target_forwards} target forwards"
    drafts = f"{counts.num_accepted_tokens} of {counts.num_draft_tokens} drafts accepted"
    return f"{risk}, {counts.num_flags} flags\n{forwards}, {drafts}, ended by {output.finish_reasons[0]}"


def main() -> None:
    """Asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder that run.sh wrote to, with target/ and head/ in it")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
    parser.add_argument("--tokens", type=int, default=96, help="new tokens per answer, at most")
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.work)
    for prompt in arguments.prompts:
        answer, output = ask(model, tokenizer, prompt, arguments.tokens)
        print(f"> {prompt}\n{answer.strip()}\n\n{describe(output, model.safety.risk_threshold)}\n")


if __name__ == "__main__":
    main()
