"""Pairs of random weights whose agreement is set by construction, to see speed against size, acceptance and gamma.

Construction. `cycle` is a random order of the whole vocabulary; the successor of a token is the next one on it. The
target is a Llama with random dense layers, whose output projections are scaled down until what they add to the
residual stream is small beside the token's embedding, which thus reaches the last norm nearly as it was. Row j of the
LM head is the embedding of the token before j on the cycle. Random embeddings are nearly orthogonal, so the argmax
after token t is its successor: greedy text walks along the cycle and repeats nothing. All layers still do all of their
work.

The draft is a smaller model built in the same way, but for a chosen share 1 - a of the tokens its LM head knows
another successor (the rows of those tokens are rotated among themselves). Each token carries a random number in
[0, 1), and the draft is right after the token iff the number is below a. The cycle is random, so along the text these
are independent draws: drafts are accepted with probability a each, as theory assumes, and no engine can guess which.

Theory. With c = raw draft step / raw target step and v = raw target forward of g + 1 tokens / raw target step:
speedup = tokens per round / (v + g c), tokens per round = (1 - a^(g+1)) / (1 - a). A round's forwards are timed in the
same run and in the order of a round, since a draft step takes longer after the target has filled the processor's
caches; in inference mode, as our arm runs. The step that they are compared with is timed as `generate` runs. `a` is
the share on the stretch that was decoded; stretches are chosen to have nearly the nominal one.
`tokens_per_round_perfect` is what a perfect engine gets from just these tokens, which tells chance from overhead.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from speed_arms import Arm, Bench, Prompt, fill_cache, time_blocks, time_forward
from speed_log import Log
from speed_statistics import (
    bootstrap_median,
    count_rounds,
    divide,
    expected_tokens_per_round,
    ratios,
    theoretical_speedup,
)
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from safespec_hf import SafeSpecConfig, attach_safety_head

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny

SIZES = {"tiny": (64, 2), "0.1": (768, 10), "0.4": (1280, 15), "1.5": (2048, 24)}  # hidden size, layers
# Hidden size and layers of the drafts that are tried; the one whose cost comes nearest to DRAFT_COST is used.
DRAFTS = [(2, 4), (2, 3), (2, 2), (2, 1), (3, 2), (3, 1), (4, 2), (4, 1)]
DRAFT_COST = 0.075
RESIDUAL_SCALE = 0.05
TILE = 1_000_003  # large weights repeat a random block of prime length: drawing 1.5e9 numbers would take minutes
NUM_PROMPT_TOKENS = 8
NUM_STARTS_TRIED = 400
CONTEXT_TOKENS, CHOICE_GAMMA = 64, 5  # at which the draft is chosen
RAW_ROUNDS = 7


class Settings(NamedTuple):
    sizes: Sequence[str]
    acceptances: Sequence[float]
    gammas: Sequence[int]
    tokens: int
    starts: int
    vocab_size: int
    dtype: torch.dtype
    device: str


class Text(NamedTuple):
    """The cycle, and for each token how sure a draft must be to be right after it."""

    cycle: Tensor
    difficulty: Tensor

    def stretch(self, start: int, length: int) -> list[int]:
        return [int(token) for token in self.cycle[torch.arange(start, start + length) % len(self.cycle)]]

    def agreements(self, tokens: Sequence[int], acceptance: float) -> list[bool]:
        return (self.difficulty[list(tokens)] < acceptance).tolist()


def make_text(vocab_size: int, seed: int = 0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    return Text(torch.randperm(vocab_size, generator=generator), torch.rand(vocab_size, generator=generator))


def successors(text: Text, acceptance: float = 1.0) -> Tensor:
    """The successor of each token as a model of this acceptance knows it."""
    following = torch.empty_like(text.cycle)
    following[text.cycle] = text.cycle.roll(-1)
    wrong = torch.nonzero(text.difficulty >= acceptance)[:, 0]
    following[wrong] = following[wrong.roll(1)]  # of several tokens, each gets another's
    return following


@torch.no_grad()
def build_model(hidden_size: int, num_layers: int, following: Tensor, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A Llama that says `following[token]` after each token."""
    head_dim = 64 if hidden_size >= 128 else 16
    num_heads = hidden_size // head_dim
    config = LlamaConfig(
        vocab_size=len(following),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=next(num for num in (num_heads // 4, 1) if num and num_heads % num == 0),
        head_dim=head_dim,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with no_init_weights():
        model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    block = torch.randn(TILE, generator=torch.Generator().manual_seed(hidden_size))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_output = name.endswith(("o_proj", "down_proj"))
            scale = RESIDUAL_SCALE / num_layers**0.5 if is_output else 1.0
            fill(module.weight, block * (scale / module.in_features**0.5))
    embeddings = torch.randn(len(following), hidden_size, generator=torch.Generator().manual_seed(1))
    model.get_input_embeddings().weight.copy_(embeddings)
    set_successors(model, following)
    return model.to(device).eval()


def fill(weight: Tensor, block: Tensor) -> None:
    flat = weight.view(-1)
    for start in range(0, flat.numel(), block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])


@torch.no_grad()
def set_successors(model: Any, following: Tensor) -> None:
    """Row `following[t]` of the LM head becomes the embedding of t."""
    embeddings = model.get_input_embeddings().weight
    model.lm_head.weight[following.to(embeddings.device)] = embeddings / embeddings.shape[1] ** 0.5


def choose_draft(target: Any, hidden_size: int, following: Tensor, settings: Settings) -> tuple[Any, dict[str, float]]:
    """The draft whose step, measured in rounds, costs nearest to DRAFT_COST of the target's."""
    ids = torch.arange(CONTEXT_TOKENS, device=target.device)[None] % len(following)
    best: tuple[float, Any] = (float("inf"), None)
    costs = {}
    for divisor, num_layers in DRAFTS:
        size = max(hidden_size // divisor // 64 * 64, 32)  # whole attention heads
        draft = build_model(size, num_layers, following, settings.dtype, settings.device)
        blocks, step = time_rounds(target, draft, ids, [1, CHOICE_GAMMA + 1])
        cost = step / blocks[1]
        costs[f"{num_layers} layers of {size}"] = cost
        if abs(cost - DRAFT_COST) < best[0]:
            best = (abs(cost - DRAFT_COST), draft)
    return best[1], costs


def choose_starts(text: Text, settings: Settings) -> list[int]:
    """Of some random starts, those whose stretch comes nearest to the nominal agreement, at each acceptance."""

    def deviation(start: int) -> float:
        tokens = text.stretch(start + NUM_PROMPT_TOKENS - 1, settings.tokens)
        shares = [sum(text.agreements(tokens, a)) / len(tokens) for a in settings.acceptances]
        return max(abs(share - a) for share, a in zip(shares, settings.acceptances, strict=True))

    tried = random.Random(0).sample(range(len(text.cycle)), min(NUM_STARTS_TRIED, len(text.cycle)))
    return sorted(tried, key=deviation)[: settings.starts]


def arm_name(acceptance: float, gamma: int) -> str:
    return f"a={acceptance:g} gamma={gamma or 'auto'}"


def make_arms(draft: Any, text: Text, settings: Settings) -> list[Arm]:
    """Plain, and ours with the head on for every acceptance and gamma; 0 leaves gamma to the engine."""
    arms = [Arm("plain")]
    for acceptance in settings.acceptances:
        set_draft = partial(set_successors, draft, successors(text, acceptance))
        for gamma in settings.gammas:
            fixed: dict[str, Any] = (
                {"num_draft_tokens": gamma, "adaptive_drafts": False, "lookup_drafts": False} if gamma else {}
            )
            # theory is about speculation alone
            policy = SafeSpecConfig(risk_threshold=1.0, pack_weights=False, **fixed)
            prepare = partial(lambda _, set_draft: set_draft(), set_draft=set_draft)
            arms.append(Arm(arm_name(acceptance, gamma), {}, True, policy, draft, prepare=prepare))
    return arms


def measure_size(size: str, settings: Settings, log: Log) -> dict[str, Any]:
    """One target with its draft."""
    hidden_size, num_layers = SIZES[size]
    text = make_text(settings.vocab_size)
    target = build_model(hidden_size, num_layers, successors(text), settings.dtype, settings.device)
    draft, costs = choose_draft(target, hidden_size, successors(text), settings)
    num_parameters = sum(weight.numel() for weight in target.parameters())
    attach_safety_head(target, tiny.build_head(target), tokenizer=tiny.build_tokenizer(settings.vocab_size))
    starts = choose_starts(text, settings)
    prompts = [Prompt(f"{size} from {start}", size, str(start)) for start in starts]

    def encode(start: str) -> dict[str, Tensor]:
        ids = torch.tensor([text.stretch(int(start), NUM_PROMPT_TOKENS)], device=target.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    common = {"max_new_tokens": settings.tokens, "do_sample": False}
    bench = Bench(target, encode, log, "constructed", described(settings, size), common)
    bench.time_raw = lambda prompt_ids, answers, _: time_raw(target, draft, prompt_ids, answers["plain"], settings)
    records = bench.interleave(make_arms(draft, text, settings), prompts)
    return {
        "num_parameters": num_parameters,
        "num_draft_parameters": sum(weight.numel() for weight in draft.parameters()),
        "draft_costs_tried": costs,
        "draft_cost": statistics.median(
            record["raw"]["draft_step"] / record["raw"]["blocks"]["1"] for record in records
        ),
        "points": [make_point(text, records, a, gamma) for a in settings.acceptances for gamma in settings.gammas],
    }


def time_raw(target: Any, draft: Any, prompt_ids: Tensor, tokens: Sequence[int], settings: Settings) -> dict[str, Any]:
    """Target forwards of all block sizes and a draft step, at the middle of the answer."""
    half = torch.tensor([tokens[: len(tokens) // 2]], device=prompt_ids.device)
    context_ids = torch.cat([prompt_ids, half], dim=1)
    sizes = sorted({1, *(gamma + 1 for gamma in settings.gammas)})
    blocks, step = time_rounds(target, draft, context_ids, sizes)
    return {"blocks": blocks, "draft_step": step, "plain_block": time_blocks(target, context_ids, [1], RAW_ROUNDS)[1]}


@torch.inference_mode()
def time_rounds(target: Any, draft: Any, context_ids: Tensor, sizes: Sequence[int]) -> tuple[dict[int, float], float]:
    """Median seconds of raw target forwards of so many tokens each, and of the draft steps between them."""
    caches = [fill_cache(model, context_ids) for model in (target, draft)]
    blocks: dict[int, list[float]] = {size: [] for size in sizes}
    steps: list[float] = []
    for _ in range(RAW_ROUNDS):
        for size in sizes:
            steps += [time_forward(draft, context_ids[:, :1], caches[1]) for _ in range(size - 1)]
            blocks[size].append(time_forward(target, context_ids[:, :size], caches[0]))
    return {size: statistics.median(values) for size, values in blocks.items()}, statistics.median(steps)


def described(settings: Settings, size: str) -> dict[str, Any]:
    return {**settings._asdict(), "dtype": str(settings.dtype), "sizes": size}


class Theory(NamedTuple):
    """Of one stretch: with the costs measured right after it, and its own share of agreement."""

    share: float
    gamma: int
    draft_cost: float
    verify_cost: float
    speedup: float
    num_perfect_rounds: int


def theory_of(text: Text, record: dict[str, Any], acceptance: float, gamma: int) -> Theory:
    """Where the engine chose gamma itself, theory is that of the best gamma that was timed."""
    num_tokens = record["arms"]["plain"]["num_tokens"]
    agreed = text.agreements(
        text.stretch(int(record["key"].split()[-1]) + NUM_PROMPT_TOKENS - 1, num_tokens), acceptance
    )
    share = sum(agreed) / len(agreed)
    blocks = {int(size): seconds for size, seconds in record["raw"]["blocks"].items()}
    cost = record["raw"]["draft_step"] / blocks[1]
    faster = record["raw"]["plain_block"] / blocks[1]
    speedups = {
        size - 1: faster * theoretical_speedup(share, size - 1, cost, blocks[size] / blocks[1])
        for size in ([gamma + 1] if gamma else blocks)
    }
    best = max(speedups, key=lambda g: speedups[g])
    return Theory(share, best, cost, blocks[best + 1] / blocks[1], speedups[best], count_rounds(agreed, best))


def make_point(text: Text, records: Sequence[dict[str, Any]], acceptance: float, gamma: int) -> dict[str, Any]:
    """Measured beside theory: medians over the stretches."""
    name = arm_name(acceptance, gamma)
    measured = ratios(records, name, "plain")
    theories = [theory_of(text, record, acceptance, gamma) for record in records]
    runs = [record["arms"][name] for record in records]
    totals = {
        field: sum(run[field] for run in runs)
        for field in ("num_tokens", "num_target_forwards", "num_drafted", "num_accepted", "is_as_plain")
    }
    middle = {
        field: statistics.median(getattr(theory, field) for theory in theories)
        for field in ("share", "gamma", "draft_cost", "verify_cost")
    }
    return {
        "acceptance": acceptance,
        "gamma": gamma,
        "acceptance_of_stretches": middle["share"],
        "gamma_of_theory": middle["gamma"],
        "draft_cost": middle["draft_cost"],
        "verify_cost": middle["verify_cost"],
        "speedup": bootstrap_median(measured)._asdict(),
        "theory": statistics.median(theory.speedup for theory in theories),
        "measured_over_theory": bootstrap_median(
            [own / theory.speedup for own, theory in zip(measured, theories, strict=True)]
        )._asdict(),
        "tokens_per_round": divide(totals["num_tokens"], totals["num_target_forwards"]),
        "tokens_per_round_theory": expected_tokens_per_round(middle["share"], int(middle["gamma"])),
        "tokens_per_round_perfect": totals["num_tokens"] / sum(theory.num_perfect_rounds for theory in theories),
        "acceptance_rate": divide(totals["num_accepted"], totals["num_drafted"]),
        "num_identical_to_plain": int(totals["is_as_plain"]),
        "num_runs": len(runs),
    }


def measure(settings: Settings, log: Log) -> dict[str, Any]:
    """All sizes, smallest first."""
    return {size: measure_size(size, settings, log) for size in settings.sizes}
