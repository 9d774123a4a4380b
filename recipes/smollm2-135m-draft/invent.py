"""Lets the target make up prompts: given the header of a user's turn, a chat model writes what users ask it.

The idea is Magpie's (https://arxiv.org/abs/2406.08464). Prompts of a kind that the target was trained on are the
cheapest way to cover what it is asked. A batch is written at once, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import set_seed

from safespec_hf import load_default_target

BATCH_SIZE = 192


def user_header(tokenizer: Any) -> str:
    """What the chat template puts before a user's words."""
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": "@@"}], tokenize=False))
    return text[: text.index("@@")]


@torch.inference_mode()
def invent(model: Any, tokenizer: Any, seed: int, max_tokens: int) -> list[str]:
    """One batch of prompts; those that did not come to an end are left out."""
    encoded = tokenizer([user_header(tokenizer)] * BATCH_SIZE, add_special_tokens=False, return_tensors="pt")
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 64}
    tokens = model.generate(**encoded.to(model.device), max_new_tokens=max_tokens, **sampling)
    rows = tokens[:, encoded["input_ids"].shape[1] :].tolist()
    ended = [row[: row.index(tokenizer.eos_token_id)] for row in rows if tokenizer.eos_token_id in row]
    return [text for text in (tokenizer.decode(row).strip() for row in ended) if len(text) >= 12]


def main() -> None:
    """Appends batches until there are enough prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON lines, appended to")
    parser.add_argument("--num-batches", type=int, default=10, help=f"of {BATCH_SIZE} prompts")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a prompt; longer ones are left out")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.open(encoding="utf-8")] if arguments.out.exists() else []
    done = {row["batch"] for row in rows}
    model, tokenizer = load_default_target(dtype=torch.bfloat16)
    for batch in tqdm(range(arguments.num_batches), desc="prompts", unit="batch"):
        if batch in done:
            continue
        prompts = invent(model, tokenizer, batch, arguments.max_tokens)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"prompt": text, "batch": batch}) + "\n" for text in prompts))


if __name__ == "__main__":
    main()
