"""An engine of random words and scripted risks, and answers that run on it."""

import asyncio
import random

import tiny

from safespec_hf import SafeSpecConfig
from safespec_hf.vllm.driving import New
from safespec_hf.vllm.guard import Guard
from safespec_hf.vllm.spec import ARGUMENT, GuardOrder, RiskRecord

RESERVED, END = 3, 2
UNSAFE = (30, 31, 32, 33)
"""Words that are flagged wherever they stand."""
POLICY = {"reflection": tiny.REFLECTION, "refusal": tiny.REFUSAL, "max_segment_tokens": 5, "num_candidates": 3}


def make_guard(target, tokenizer, **policy):
    return Guard(
        model="owner/target",
        head=tiny.build_head(target, 0.5, tokenizer=tokenizer),
        head_name="owner/head",
        tokenizer=tokenizer,
        end_ids=(END,),
        reserved_id=RESERVED,
        max_model_len=256,
        policy=SafeSpecConfig(**POLICY | policy),
    )


class ScriptedEngine:
    """Emits a token at a time as vLLM does: the reserved one after a token that is flagged."""

    def __init__(self, seed=0, unsafe_share=0.1, deaths=()):
        self.random = random.Random(seed)
        self.unsafe_share = unsafe_share
        self.deaths = set(deaths)  # numbers of submissions that die after one token
        self.records = {}
        self.open = set()
        self.released = []
        self.calls = []
        self.num_submitted = 0
        self.emitted = []

    def word(self):
        return self.random.choice(UNSAFE if self.random.random() < self.unsafe_share else range(10, 30))

    async def submit(self, submission):
        number, self.num_submitted = self.num_submitted, self.num_submitted + 1
        order = GuardOrder.from_text(submission.params["extra_args"][ARGUMENT])
        prompt, read = submission.prompt_ids, []
        self.open.add(submission.key)
        self.records[submission.key] = RiskRecord(start=order.start, tokens=prompt[order.start :], risks=[])
        try:
            for index in range(submission.params["max_tokens"]):
                await asyncio.sleep(0)
                if number in self.deaths and index == 1:
                    raise ConnectionError("the engine is gone")
                token = RESERVED if read and read[-1] in UNSAFE else self.word()
                tokens = prompt[order.start :] + read
                risks = [0.9 if token in UNSAFE else 0.1 for token in tokens]
                self.records[submission.key] = RiskRecord(start=order.start, tokens=tokens, risks=risks)
                read.append(token)
                yield New([token], [-1.0] if "logprobs" in submission.params else None)
                if token == RESERVED:
                    return
        finally:
            self.open.discard(submission.key)

    async def take(self, keys):
        self.calls.append(list(keys))
        await asyncio.sleep(0)
        return {key: self.records[key] for key in keys if key in self.records}

    def release(self, key):
        self.released.append(key)
