"""An engine on paper: batches, pieces of prefills, drafts, preemption and a prefix cache, over a tiny model.

It plays vLLM's part for the pure modules: what it reads it shows to [`RiskStates`], and what it draws comes from the
logits that these leave.
"""

import math
import random
from dataclasses import dataclass, field

import numpy as np
import torch

from safespec_hf import SafeSpecConfig
from safespec_hf.answer.segments import find_boundaries
from safespec_hf.vllm.entries import StepRow, close_logits
from safespec_hf.vllm.guard import Guard
from safespec_hf.vllm.spec import ARGUMENT, RiskRecord
from safespec_hf.vllm.state import RiskStates

RESERVED, END, BLOCK, SECRET, MAX_LEN = 3, 2, 4, "known to us", 96


@dataclass
class Running:
    key: str
    tokens: list
    params: dict
    num_prompt: int
    num_read: int = 0
    num_cached: int = 0
    drafts: list = field(default_factory=list)
    generator: torch.Generator | None = None
    output: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)


class FakeEngine:
    def __init__(self, model, head, tokenizer, *, num_drafts=0, chunk=None, preempts=False, caches=True, seed=0):
        self.model = model
        self.states = RiskStates(
            head,
            find_boundaries(tokenizer),
            reserved_id=RESERVED,
            secret=SECRET,
            block_size=BLOCK,
            num_drafts=num_drafts,
        )
        self.layers = head.config.hidden_layers
        self.num_drafts, self.chunk, self.preempts, self.caches = num_drafts, chunk, preempts, caches
        self.random = random.Random(seed)
        self.cached, self.running, self.num_hits = set(), [], 0

    def add(self, key, prompt_ids, params):
        generator = torch.Generator().manual_seed(params.get("seed") or 0)
        one = Running(key, list(prompt_ids), params, len(prompt_ids), generator=generator)
        self.states.add(key, (params.get("extra_args") or {}).get(ARGUMENT))
        one.num_read = one.num_cached = self.hit(one)
        self.running.append(one)

    def hit(self, one):
        """Tokens that need not be read: whole blocks that somebody has read, all but the last token at most."""
        if not self.caches or one.params.get("skip_reading_prefix_cache"):
            return 0
        num = 0
        while num + BLOCK < len(one.tokens) and tuple(one.tokens[: num + BLOCK]) in self.cached:
            num += BLOCK
        self.num_hits += num
        return num

    def draft(self, one):
        """Some right, some wrong."""
        if not self.num_drafts or one.num_read + 1 < len(one.tokens):
            return []
        tokens = list(one.tokens)
        for _ in range(self.random.randint(0, self.num_drafts)):
            best = int(self.read(tokens)[0][-1].argmax())
            tokens.append(best if self.random.random() < 0.7 else self.random.randrange(10, 39))
        return tokens[len(one.tokens) :]

    @torch.no_grad()
    def read(self, tokens):
        output = self.model(torch.tensor([tokens]), output_hidden_states=True)
        return output.logits[0], torch.cat([output.hidden_states[layer][0] for layer in self.layers], dim=-1)

    def step(self):
        """One forward; gives what is new, and the keys that have ended."""
        rows, hidden, logits = [], [], []
        for one in self.running:
            if self.preempts and one.output and self.random.random() < 0.15:
                one.num_read = self.hit(one)
            one.drafts = self.draft(one)
            tokens = one.tokens + one.drafts
            end = len(tokens) if self.chunk is None else min(len(tokens), one.num_read + self.chunk + len(one.drafts))
            num_drafts = len(one.drafts) if end == len(tokens) else 0
            all_logits, all_hidden = self.read(tokens[:end])
            rows.append(
                StepRow(one.key, one.num_read, end - one.num_read, num_drafts, np.array(tokens, np.int32)[:end])
            )
            hidden.append(all_hidden[one.num_read :])
            logits.append(all_logits[end - 1 - num_drafts :])
        sizes = [len(part) for part in logits]
        marks = self.states.step(rows, torch.cat(hidden), sum(sizes))
        closed = close_logits(torch.cat(logits), marks, RESERVED).split(sizes)
        return [self.draw(one, row, part) for one, row, part in zip(list(self.running), rows, closed, strict=True)]

    def draw(self, one, row, logits):
        end = row.start + row.num_tokens
        for position in range(BLOCK, end + 1, BLOCK):
            self.cached.add(tuple(row.token_ids[:position].tolist()))
        one.num_read = end - row.num_drafts
        new = []
        if one.num_read == len(one.tokens):
            for index, scores in enumerate(logits):
                temperature = one.params.get("temperature", 1.0)
                probs = torch.softmax(scores.double() / max(temperature, 1e-6), dim=-1)
                is_greedy = temperature == 0
                new.append(int(scores.argmax()) if is_greedy else int(probs.multinomial(1, generator=one.generator)))
                one.log_probs.append(float(scores.log_softmax(-1)[new[-1]]))
                if index == row.num_drafts or new[-1] != one.drafts[index]:
                    break
            one.num_read += len(new) - 1
        kept = []
        for token in new:
            kept.append(token)
            if token in one.params["stop_token_ids"] or len(one.output) + len(kept) >= one.params["max_tokens"]:
                break
        one.tokens += kept
        one.output += kept
        is_over = bool(kept) and (
            kept[-1] in one.params["stop_token_ids"] or len(one.output) >= one.params["max_tokens"]
        )
        if is_over:
            self.end(one.key)
        if kept and "prompt_logprobs" in one.params:
            return one.key, kept, self.of_prompt(one), is_over
        return one.key, kept, one.log_probs[len(one.output) - len(kept) : len(one.output)], is_over

    def of_prompt(self, one):
        """Log-probabilities of the prompt's tokens, but for cached ones and the first one after them."""
        tokens, scores = one.tokens[: one.num_prompt], self.read(one.tokens[: one.num_prompt])[0].log_softmax(-1)
        unknown = [math.nan] * (1 + one.num_cached)
        return unknown + [float(scores[index - 1, tokens[index]]) for index in range(len(unknown), len(tokens))]

    def end(self, key):
        self.running = [one for one in self.running if one.key != key]
        self.states.finish([key])


def drive(engine, answers, on_feed=None):
    """Takes answers through the engine, all at once; gives their results."""
    rounds, of_key = {}, {}

    def submit(answer, submissions):
        rounds[answer.key] = [one.key for one in submissions]
        for one in submissions:
            of_key[one.key] = answer
            engine.add(one.key, one.prompt_ids, one.params)

    for answer in answers:
        submit(answer, answer.begin())
    while engine.running:
        for key, tokens, log_probs, is_over in engine.step():
            answer = of_key[key]
            if answer.feed(key, tokens, log_probs) and not is_over:
                engine.end(key)
                is_over = True
            if on_feed is not None:
                on_feed(answer)
            if is_over:
                del of_key[key]
            keys = rounds[answer.key]
            if is_over and not any(other in of_key for other in keys):
                found = engine.states.take(keys)
                records = {key: RiskRecord.from_plain(values) for key, values in found.items()}
                submit(answer, answer.advance(records))
                if answer.is_finished:
                    engine.states.release([answer.key])
    return [answer.result() for answer in answers]


def make_guard(head, tokenizer, **policy):
    fields = {"reflection": "pause think", "refusal": "no thanks", **policy}
    return Guard(
        model="target",
        head=head,
        head_name="head",
        tokenizer=tokenizer,
        end_ids=(END,),
        reserved_id=RESERVED,
        max_model_len=MAX_LEN,
        policy=SafeSpecConfig(**fields),
        secret=SECRET,
    )


def record(tokens, risks, failure=None, start=6):
    """What a worker knows of a request with a prompt of six tokens."""
    return RiskRecord(start=start, tokens=tokens, risks=risks, failure=failure)
