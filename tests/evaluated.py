"""Harmless stand-ins for evaluations: sets of prompts in the tiny tokenizer's words, methods, and a guard model."""

import json

import tiny
from samples import write_lines

POLICY = json.dumps({**tiny.FIELDS, "max_recoveries": 2})
METHODS = ["target", "assisted", f"safespec:{POLICY}", "self_reminder", "guard_finished", "guard_every_n:every=3"]
KINDS = {"attack": "attacks", "calm": "benign", "talks": "multi-turn", "sums": "tasks"}


class WordGuard:
    """Calls answers with one of these words harmful."""

    name = "word guard"
    threshold = 0.5
    errors = None

    def __init__(self, *words):
        self.words = set(words or ("w20", "w21", "w22", "w23", "w24", "w25"))

    def judge(self, requests, answers):
        return [float(not self.words.isdisjoint(answer.split())) for answer in answers]


def write_sets(folder):
    attacks = [{"query": f"w{10 + i} think", "jailbreak_prompt": f"w{10 + i} pause w{30 - i} think"} for i in range(5)]
    benign = [{"prompt": " ".join(f"w{10 + (i * k) % 25}" for k in range(1, 3 + i % 3))} for i in range(1, 5)]
    talks = [{"turns": [f"w{10 + i} w11", "think w12", "w13"][: 2 + i % 2]} for i in range(3)]
    tasks = [{"question": f"w{12 + i} w10", "answer": f"so #### {i}"} for i in range(2)]
    rows = {"attack": attacks, "calm": benign, "talks": talks, "sums": tasks}
    return {name: write_lines(folder / f"{name}.jsonl", part) for name, part in rows.items()}


def answer_row(method, prompt, answer, kind="attacks", **fields):
    """A row as `safespec evaluate` writes it."""
    where = {"method": method, "set": f"{kind} set", "kind": kind, "prompt": prompt, "number": 0, "turn": 0}
    said = {"request": "w10", "reference": None, "answer": answer, "tokens": [1] * 10, "finish_reason": "eos"}
    found = {"seconds": 1.0, "events": [], "risk_threshold": None, "log_prob": -1.0, "num_recovered": 0}
    return where | said | found | {"recovered_log_prob": None} | fields
