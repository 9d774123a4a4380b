"""Tries the guarded server with many clients at once, on the default target. Exits with 1 if a bar is missed.

.venv-vllm/bin/python benchmarks/engine_server.py                # ten minutes on 2 cores
.venv-vllm/bin/python benchmarks/engine_server.py --tiny --only load --minutes 1   # a tiny random target

streams  at least 100 streams through OpenAI's own client, a third of which are hung up somewhere in the middle:
         nothing flagged in any of them, every other answer comes to its end, and no state is left in the workers
load     64 clients, each of which asks again as soon as it has its answer; in the middle the worker is killed, and the
         server, which ends itself then, is started again: no request hangs, nothing that is flagged is in any answer,
         what is answered 503 or cut says so, and memory does not grow

Which words are flagged is known beforehand: the head reads a token's embedding and nothing else. So what the server
lets out is looked at without any of its own figures.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from engine_parts import Bar, hold
from prompts import PROMPTS
from transformers import AutoTokenizer

from safespec_hf import SafeSpecConfig
from safespec_hf.defaults.default_target import find_target
from safespec_hf.engine.speeds import cache_root

sys.path.append(str(Path(__file__).parent.parent / "tests" / "vllm"))
sys.path.append(str(Path(__file__).parent.parent / "tests"))

from tiny_server import POLICY as TINY_POLICY
from tiny_server import Server, save_target, save_word_head

SHARE = 0.01  # of the vocabulary is flagged
TINY_SHARE = 0.05
ARGUMENTS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--disable-uvicorn-access-log")
POLICY = {"num_candidates": 4, "max_recoveries": 2}
WATCH_SECONDS = 2


@dataclass
class Answer:
    """What a client got."""

    tokens: list[int] = field(default_factory=list)
    end: str = ""  # a finish reason, "hung up", "503", "cut", "refused" or "hangs"
    seconds: float = 0.0


class Run:
    """A served default target, and what may not leave it."""

    def __init__(self, folder: Path, is_tiny: bool):
        self.target = folder / "target" if is_tiny else Path(find_target(cache_root(None)))
        if is_tiny:
            save_target(self.target)
        self.folder = folder
        self.policy = TINY_POLICY if is_tiny else POLICY
        self.flagged = save_word_head(folder / "head", self.target, TINY_SHARE if is_tiny else SHARE)
        tokenizer = AutoTokenizer.from_pretrained(self.target)
        refusal = SafeSpecConfig(**self.policy).refusal
        ids = [*tokenizer.encode(refusal, add_special_tokens=False), tokenizer.eos_token_id]
        self.endings = [ids, [*tokenizer.encode("\n\n", add_special_tokens=False), *ids]]

    def start(self) -> Server:
        return Server(self.target, self.folder / "head", self.folder / "log", *ARGUMENTS, policy=self.policy).wait()

    def num_flagged(self, tokens: list[int]) -> int:
        """Tokens that the model said itself and should not have said; those of the refusal are ours."""
        longest = 0
        for ending in self.endings:
            for length in range(1, 1 + min(len(tokens), len(ending))):
                if tokens[-length:] == ending[:length]:
                    longest = max(longest, length)
        return sum(token in self.flagged for token in tokens[: len(tokens) - longest])


async def ask(client: openai.AsyncOpenAI, seed: int, max_tokens: int, most: int | None = None) -> Answer:
    """One stream, hung up after `most` tokens."""
    answer, start = Answer(), time.monotonic()
    chat = [{"role": "user", "content": PROMPTS[seed % len(PROMPTS)]}]
    options = {"max_tokens": max_tokens, "seed": seed, "temperature": 0.8, "extra_body": {"return_token_ids": True}}
    try:
        stream = await client.chat.completions.create(model="target", messages=chat, stream=True, **options)
        async for part in stream:
            for choice in part.choices:
                answer.tokens += getattr(choice, "token_ids", None) or []
                answer.end = choice.finish_reason or answer.end
            if most is not None and len(answer.tokens) >= most:
                answer.end = answer.end or "hung up"
                await stream.close()
                break
        answer.end = answer.end or "cut"
    except openai.APITimeoutError:
        answer.end = "hangs"
    except openai.APIStatusError as error:
        answer.end = str(error.status_code)
    except openai.APIConnectionError:
        answer.end = "refused"
    except (openai.APIError, httpx.TransportError):  # the stream says itself that it ends early, or is cut
        answer.end = "cut"
    answer.seconds = time.monotonic() - start
    return answer


def client_of(server: Server, options: argparse.Namespace) -> openai.AsyncOpenAI:
    url = f"{server.url}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=options.hang_seconds)


def entries_left(server: Server, seconds: float = 60) -> float:
    """Requests of which the workers keep anything, once it is quiet."""
    end = time.monotonic() + seconds
    while (left := server.count("safespec_state_entries")) and time.monotonic() < end:
        time.sleep(1)
    return left


def streams(run: Run, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    async def main(server: Server) -> list[Answer]:
        gate = asyncio.Semaphore(options.clients)
        async with client_of(server, options) as client:

            async def one(seed: int) -> Answer:
                chance = random.Random(seed)
                most = chance.randint(1, options.tokens // 2) if seed % 3 == 0 else None
                async with gate:
                    return await ask(client, seed, options.tokens, most)

            return await asyncio.gather(*(one(seed) for seed in range(options.streams)))

    server = run.start()
    try:
        answers = asyncio.run(main(server))
        left, flags = entries_left(server), server.count("safespec_flags_total")
        failures = server.count("safespec_fail_closed_total")
    finally:
        server.stop()
    ends = Counter(answer.end for answer in answers)
    wrong = sum(run.num_flagged(answer.tokens) for answer in answers)
    figures = {"ends": dict(ends), "num_tokens": sum(len(answer.tokens) for answer in answers), "num_flags": flags}
    proper = {"stop", "length", "content_filter", "hung up"}
    return figures, [
        Bar(f"{len(answers)} streams, nothing flagged in any", f"{wrong} tokens", wrong == 0),
        Bar("flags were forced", f"{flags:.0f}", flags >= len(answers) / 4),
        Bar("all come to a proper end", str(dict(ends)), set(ends) <= proper and failures == 0),
        Bar("no state is left", f"{left:.0f} entries", left == 0),
    ]


class Supervisor:
    """Starts the server again when it has ended, as whoever runs one would; and writes down its memory."""

    def __init__(self, run: Run):
        self.run = run
        self.server = run.start()
        self.num_starts = 1
        self.num_killed = 0
        self.memory: list[list[tuple[float, dict[str, float]]]] = [[]]
        self.answers: list[Answer] = []

    async def watch(self, end: float) -> None:
        while time.monotonic() < end:
            if self.server.process.poll() is not None:
                self.server.stop()
                self.memory.append([])
                self.server = await asyncio.to_thread(self.run.start)
                self.num_starts += 1
            self.memory[-1].append((time.monotonic(), memory_of(self.server)))
            await asyncio.sleep(WATCH_SECONDS)

    async def ask(self, number: int, end: float, options: argparse.Namespace) -> None:
        """One client, again and again."""
        turn = 0
        while time.monotonic() < end:
            async with client_of(self.server, options) as client:
                answer = await ask(client, number + turn * options.clients, options.tokens)
            self.answers.append(answer)
            turn += 1
            if answer.end in ("refused", "503"):
                await asyncio.sleep(1)

    async def kill_worker(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while not (workers := self.server.workers()):  # it is being started
            await asyncio.sleep(1)
        for worker in workers:
            worker.kill()
        self.num_killed += len(workers)


def memory_of(server: Server) -> dict[str, float]:
    """MiB of the front and of all that it started."""
    try:
        front = psutil.Process(server.process.pid)
        rest = sum(child.memory_info().rss for child in front.children(recursive=True))
        return {"front": front.memory_info().rss / 2**20, "engine": rest / 2**20}
    except psutil.NoSuchProcess:
        return {}


def growth(memory: list[tuple[float, dict[str, float]]], part: str) -> float:
    """MiB that were added in the second half of a server's life; the first half fills caches."""
    sizes = [size[part] for _, size in memory if part in size]
    return sizes[-1] - sizes[len(sizes) // 2] if len(sizes) >= 4 else 0.0


def load(run: Run, options: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    async def main() -> Supervisor:
        supervisor = Supervisor(run)
        end = time.monotonic() + 60 * options.minutes
        tasks = [supervisor.watch(end), supervisor.kill_worker(30 * options.minutes)]
        await asyncio.gather(*tasks, *(supervisor.ask(number, end, options) for number in range(options.clients)))
        return supervisor

    supervisor = asyncio.run(main())
    try:
        left = entries_left(supervisor.server)
    finally:
        supervisor.server.stop()
    answers = supervisor.answers
    ends = Counter(answer.end for answer in answers)
    wrong = sum(run.num_flagged(answer.tokens) for answer in answers)
    proper = {"stop", "length", "content_filter", "cut", "503", "refused"}
    fronts = [growth(memory, "front") for memory in supervisor.memory]
    figures = {
        "ends": dict(ends),
        "num_tokens": sum(len(answer.tokens) for answer in answers),
        "slowest_seconds": max(answer.seconds for answer in answers),
        "front_mib": [memory[-1][1].get("front") for memory in supervisor.memory if memory],
        "front_growth_mib": fronts,
        "engine_growth_mib": [growth(memory, "engine") for memory in supervisor.memory],
    }
    num = f"{options.clients} clients, {options.minutes:g} minutes, {len(answers)} requests"
    return figures, [
        Bar(f"{num}: no request hangs", str(dict(ends)), set(ends) <= proper),
        Bar("none is answered unguarded", f"{wrong} flagged tokens", wrong == 0),
        Bar(
            "the worker was killed once, and the server started again as often",
            f"{supervisor.num_killed} killed, {supervisor.num_starts} starts",
            supervisor.num_killed == 1 and supervisor.num_starts == 2,
        ),
        Bar("memory of the front is flat, within 10 MiB", f"{fronts}", max(fronts) <= 10),
        Bar("no state is left", f"{left:.0f} entries", left == 0),
    ]


PARTS = {"streams": streams, "load": load}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--streams", type=int, default=120)
    parser.add_argument("--clients", type=int, default=64, help="at once")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, at most")
    parser.add_argument("--minutes", type=float, default=5, help="of load")
    parser.add_argument("--hang-seconds", type=float, default=120, help="without a word: it hangs")
    parser.add_argument("--tiny", action="store_true", help="a tiny random target instead")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine_server.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), options.tiny)
        parts = {name: partial(part, run, options) for name, part in PARTS.items()}
        return hold(parts, options.only, options.out)


if __name__ == "__main__":
    sys.exit(main())
