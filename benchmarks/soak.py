"""Guarded generations by the thousand, some of them broken off: nothing may pile up, break or stay behind.

.venv/bin/python benchmarks/soak.py            # 10,000 generations and an answer of 10,000 tokens
.venv/bin/python benchmarks/soak.py --num 500  # a short run, too short to say anything about the memory of the process

Tiny random models, with prompts, lengths, drafts, flags and ends that are drawn from a seed. Exits with 1 if memory
grows, an answer breaks its promises, an exception gets lost, or a model is left changed.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from safespec_hf import SafeSpecConfig

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny

MAX_GROWTH = 0.02
LEAST_FOR_MEMORY = 1000
"""Generations from which on the memory of the process says something: allocators take a while to come to rest."""
KINDS = ("llama", "sliding", "alternating", "gpt2")
BREAKS = ("streamer", "criterion", "processor", "forward")
ERRORS = (KeyboardInterrupt, GeneratorExit, RuntimeError)
FAILURES = (TypeError, ValueError, LookupError, AttributeError, AssertionError)
PAGE = 4096


class Fault(NamedTuple):
    """What broke its promise, in which generation."""

    number: int
    what: str


class Breaker(tiny.Recorder, StoppingCriteria):
    """Raises an error when it has been called so often, wherever it was put."""

    def __init__(self, after: int, error: type[BaseException]):
        super().__init__()
        self.num_left, self.error = after, error

    def note(self) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise self.error("broken off")

    def put(self, value: Tensor) -> None:
        self.note()
        super().put(value)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.note()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class BreakingProcessor(LogitsProcessor):
    """Lets a breaker know that it is called, and changes nothing."""

    def __init__(self, breaker: Breaker):
        self.breaker = breaker

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.breaker.note()
        return scores


class Stop(StoppingCriteria):
    """Ends answers after a token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == self.token


def state_of(model: Any) -> list[Any]:
    """All that a call could leave behind in a model."""
    modules = [(sorted(vars(one)), one.training, *map(len, hooks_of(one))) for one in model.modules()]
    return [type(model), sorted(vars(model)), modules, model.config.to_dict(), model.generation_config.to_dict()]


def hooks_of(module: torch.nn.Module) -> list[Any]:
    return [value for name, value in vars(module).items() if name.endswith("_hooks")]


class Soak:
    """Models, each with a head, and what was found wrong."""

    def __init__(self, seed: int = 0, kinds: Sequence[str] = KINDS):
        self.choose = random.Random(seed)
        self.tokenizer = tiny.build_tokenizer()
        self.models: list[tuple[Any, Any, bool]] = []
        for kind in kinds:
            silent, flagging = tiny.build_model(kind), tiny.build_model(kind)
            tiny.attach(silent, self.tokenizer)
            tiny.attach(flagging, self.tokenizer, tiny.build_coin_head(flagging, 0.1, seed))
            draft = tiny.perturb(silent)
            self.models += [(silent, draft, True), (flagging, draft, False)]
        self.models[-1][0].train()  # whichever mode a model is in, it stays in it
        for model, draft, _ in self.models:
            # at the first forward transformers puts hooks on that stay, and we make packed weights that stay
            model.generate(tiny.PROMPT, assistant_model=draft, max_new_tokens=12, safespec=True)
            model.generate(tiny.PROMPT.repeat(3, 1), assistant_model=draft, max_new_tokens=12, safespec=True)
        self.states = [state_of(model) for model, _, _ in self.models]
        self.outcomes: Counter[str] = Counter()
        self.faults: list[Fault] = []

    def run(self, number: int) -> None:
        """One generation."""
        place = self.choose.randrange(len(self.models))
        model, draft, is_silent = self.models[place]
        arguments = self.draw(draft)
        breaker = self.draw_breaker(arguments)
        hook = None
        if breaker is not None and breaker[0] == "forward":
            hook = model.register_forward_pre_hook(lambda *_: breaker[1].note())
        try:
            output = model.generate(**arguments)
        except ERRORS as error:
            self.outcomes["broken off"] += 1
            if breaker is None or type(error) is not breaker[1].error or "broken off" not in str(error):
                self.faults.append(Fault(number, f"{type(error).__name__}: {error}"))
        except FAILURES as error:  # whatever it is, it is what this looks for
            self.faults.append(Fault(number, f"{type(error).__name__}: {error}"))
        else:
            if hook is not None:
                hook.remove()  # it counts the forwards of this generation only
            self.faults += [Fault(number, what) for what in self.check(model, is_silent, arguments, output)]
        finally:
            if hook is not None:
                hook.remove()
        if state_of(model) != self.states[place]:
            self.faults.append(Fault(number, "the model was left changed"))

    def draw(self, draft: Any) -> dict[str, Any]:
        """The arguments of a generation."""
        choose = self.choose
        lengths = [choose.randint(1, 9) for _ in range(choose.choice([1, 1, 2, 3]))]
        ids = [
            [0] * (max(lengths) - num) + [choose.randrange(10, tiny.VOCAB_SIZE) for _ in range(num)] for num in lengths
        ]
        policy = SafeSpecConfig(
            **tiny.FIELDS,
            adaptive_drafts=choose.random() < 0.5,
            rollback_segments=choose.randrange(3),
            keep_reflection=choose.random() < 0.3,
        )
        arguments: dict[str, Any] = {
            "input_ids": torch.tensor(ids),
            "attention_mask": (torch.tensor(ids) != 0).long(),
            "max_new_tokens": choose.randint(1, 16),
            "do_sample": choose.random() < 0.4,
            "safespec": policy,
            "return_dict_in_generate": True,
        }
        arguments |= choose.choice([{}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}])
        if "assistant_model" in arguments and choose.random() < 0.3:
            arguments["safespec"] = replace(policy, candidate_source="target")
        if choose.random() < 0.3:
            arguments["stopping_criteria"] = StoppingCriteriaList([Stop(choose.randrange(10, tiny.VOCAB_SIZE))])
        if len(lengths) == 1 and choose.random() < 0.4:
            arguments["streamer"] = tiny.Recorder()
        return arguments

    def draw_breaker(self, arguments: dict[str, Any]) -> tuple[str, Breaker] | None:
        """Has a fifth of the generations broken off somewhere, if they get so far."""
        if self.choose.random() > 0.2:
            return None
        where, breaker = self.choose.choice(BREAKS), Breaker(self.choose.randrange(6), self.choose.choice(ERRORS))
        if where == "streamer" and len(arguments["input_ids"]) == 1:
            arguments["streamer"] = breaker
        elif where == "processor":
            arguments["logits_processor"] = LogitsProcessorList([BreakingProcessor(breaker)])
        elif where == "criterion":
            arguments["stopping_criteria"] = StoppingCriteriaList([breaker])
        return where, breaker

    def check(self, model: Any, is_silent: bool, arguments: dict[str, Any], output: Any) -> list[str]:
        """What is wrong with an answer."""
        ids, threshold = arguments["input_ids"], model.safety.risk_threshold
        self.outcomes.update(output.finish_reasons)
        self.outcomes["flags"] += sum(map(len, output.events))
        faults = []
        if not torch.equal(output.sequences[:, : ids.shape[1]], ids):
            faults.append("the prompt was changed")
        if output.sequences.shape[1] > ids.shape[1] + arguments["max_new_tokens"]:
            faults.append("the answer is too long")
        if bool((output.risks >= threshold).any()):
            faults.append("what was flagged was returned")
        if (streamer := arguments.get("streamer")) is not None and streamer.tokens != output.sequences[0].tolist():
            faults.append("what was streamed is not what was returned")
        if is_silent and not arguments["do_sample"]:
            names = ("input_ids", "attention_mask", "max_new_tokens", "do_sample", "stopping_criteria")
            given = {name: arguments[name] for name in names if name in arguments}
            criterion = (given.get("stopping_criteria") or [None])[0]
            # without an end token, plain decoding writes on after the end of a row while others go on
            is_other = isinstance(criterion, Breaker) or (criterion is not None and len(ids) > 1)
            if not is_other and not torch.equal(model.generate(**given), output.sequences):
                faults.append("a silent head changed greedy text")
        return faults


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def num_tensors() -> int:
    """Tensors that Python knows of."""
    gc.collect()
    return sum(issubclass(type(one), Tensor) for one in gc.get_objects())


def soak(num: int, seed: int = 0, kinds: Sequence[str] = KINDS) -> list[str]:
    """Runs so many generations; returns what does not hold."""
    run, start, warm, curve = Soak(seed, kinds), time.perf_counter(), max(num // 5, 1), list[str]()
    for number in range(num):
        run.run(number)
        if number + 1 == warm:
            memory, tensors = resident(), num_tensors()
        if (number + 1) % max(num // 10, 1) == 0:
            curve.append(f"{resident() / 2**20:.1f}")
    growth, more = resident() / memory - 1, num_tensors() - tensors
    print(f"{num} generations in {time.perf_counter() - start:.0f} s: {dict(run.outcomes)}")
    print(f"resident memory after each tenth, in MiB: {', '.join(curve)}")
    print(f"since generation {warm}: resident memory {growth:+.2%}, tensors {more:+d}")
    wrong = [f"generation {number}: {what}" for number, what in run.faults]
    if num >= LEAST_FOR_MEMORY and growth >= MAX_GROWTH:
        wrong.append(f"resident memory grew by {growth:.1%}, and not by less than {MAX_GROWTH:.0%}")
    if more > 0:
        wrong.append(f"{more} tensors are left")
    return wrong


class Sampler(StoppingCriteria):
    """Counts what Python holds at some lengths of an answer."""

    def __init__(self, lengths: list[int]):
        self.lengths, self.found = lengths, list[tuple[int, int]]()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if len(self.found) < len(self.lengths) and input_ids.shape[1] >= self.lengths[len(self.found)]:
            gc.collect()
            self.found.append((sys.getallocatedblocks(), len(gc.get_objects())))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def long_answer(num_tokens: int, drafting: str) -> list[str]:
    """Generates one answer; returns what does not hold: what Python holds per token stays what it was at first."""
    model = tiny.build_model("llama", max_position_embeddings=2 * num_tokens + 64)
    tiny.attach(model, tiny.build_tokenizer())
    quarters = [num_tokens * part // 4 for part in (1, 2, 3, 4)]
    sampler, start = Sampler([1 + length - 8 for length in quarters]), time.perf_counter()
    arguments: dict[str, Any] = {} if drafting == "none" else {"prompt_lookup_num_tokens": 3}
    ids = torch.tensor([[12]])
    model.generate(
        ids,
        max_new_tokens=num_tokens,
        do_sample=True,
        safespec=SafeSpecConfig(**tiny.FIELDS),
        stopping_criteria=StoppingCriteriaList([sampler]),
        **arguments,
    )
    blocks, objects = zip(*sampler.found, strict=True)
    quarter = num_tokens / 4
    first, last = (blocks[1] - blocks[0]) / quarter, (blocks[3] - blocks[2]) / quarter
    more = (objects[3] - objects[1]) / (num_tokens / 2)
    print(
        f"an answer of {num_tokens} tokens, drafts: {drafting}, {time.perf_counter() - start:.0f} s: "
        f"{first:.2f} blocks of memory a token in the second quarter, {last:.2f} in the last; {more:.3f} objects"
    )
    # a number for the token and one for its risk, and some room for what lists do
    wrong = [] if last <= max(first, 2.0) + 1 else [f"a token takes {last:.1f} blocks, and not {first:.1f} as before"]
    return wrong if more < 0.05 else [*wrong, f"{more:.2f} objects are left of a token"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000, help="generations")
    parser.add_argument("--tokens", type=int, default=10_000, help="of the long answers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    wrong = [what for drafting in ("none", "lookup") for what in long_answer(args.tokens, drafting)]
    wrong += soak(args.num, args.seed)
    print(*wrong or ["all holds"], sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
