"""Whether the conversion is right, and whether the guard changes what a silent head should not: check.py WORK."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from safespec_hf import SafeSpecConfig, SafetyHead, attach_safety_head
from safespec_hf.training.chat_template import PLAIN_TEMPLATE

LICENSE = Path(__file__).parents[2] / "LICENSE"  # plain English, longer than the window of 512 tokens
ODD_TEXTS = (
    "Two  spaces\n\n\nand lines,\ta tab",
    " leading and trailing ",
    "é 漢字 🙂 ñ",
    "<b>bold</b>",
    "x = [1,  2]\n",
)
PROMPTS = (
    "How do I plant tomatoes?",
    "Give three tips for a good night's sleep.",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Count from one to thirty in words.",
    "Explain how rain forms.",
    "List the months of the year, then list them again in reverse order.",
    "How is bread made?",
)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Of the first 6,000 characters of this project's licence, some 1,200 tokens."""
    ids = tokenizer(LICENSE.read_text(encoding="utf-8")[:6000], return_tensors="pt")["input_ids"]
    return float(model(ids, labels=ids).loss.exp())


def gives_back(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether text is the same after it was tokens."""
    return bool(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text)


def compare(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> tuple[bool, float, float]:
    """Whether a greedy answer is the same with prompt lookup and a head that never flags, and the seconds of both."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    arguments = {"max_new_tokens": num_tokens, "do_sample": False}
    guard = {"prompt_lookup_num_tokens": 5, "safespec": SafeSpecConfig(risk_threshold=1.0)}
    start = time.perf_counter()
    plain = model.generate(**inputs, **arguments)
    middle = time.perf_counter()
    guarded = model.generate(**inputs, **arguments, **guard)
    return torch.equal(plain, guarded), middle - start, time.perf_counter() - middle


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder that run.sh wrote to, with target/ and head/ in it")
    parser.add_argument("--tokens", type=int, default=96, help="of each answer")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.work / "target")
    tokenizer.chat_template = PLAIN_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(arguments.work / "target", dtype=torch.float32)
    figures = {
        "perplexity": round(perplexity(model, tokenizer), 2),
        "texts_given_back": f"{sum(gives_back(tokenizer, text) for text in ODD_TEXTS)} of {len(ODD_TEXTS)}",
    }
    attach_safety_head(model, SafetyHead.from_pretrained(arguments.work / "head"), tokenizer=tokenizer)
    compare(model, tokenizer, PROMPTS[0], 8)  # warm up
    found = [compare(model, tokenizer, prompt, arguments.tokens) for prompt in PROMPTS]
    figures["same_answers"] = f"{sum(is_same for is_same, _, _ in found)} of {len(found)}"
    figures["speedups"] = [round(plain / guarded, 2) for _, plain, guarded in found]
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
