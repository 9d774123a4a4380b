"""An attacker who has the target and its head: a suffix to a request that lowers what the head sees of the answer.

Random search over tokens, a coordinate at a time. It wants the target's own answer not to refuse, and its highest risk
to be low; both are those of the guarded loop in which nothing is flagged. It knows nothing of harm: judges say later
whether an answer is any good to the attacker.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..config import SafeSpecConfig
from ..decoding.attachment import find_threshold
from ..errors import SafeSpecError
from ..training.hidden import hash_weights
from ..training.refusals import is_refusal
from ..training.scores import describe_head
from ..training.settings import SEEDS, check_counts, check_ranges
from ..training.shards import processes
from .attackers import SUFFIX, rewrite
from .engine import Engine, Reply, check_guarded
from .prompts import Message, Prompt
from .rows import read_keyed

SUFFIXES = ".suffixes.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixSettings:
    """How a suffix is searched for.

    Args:
        num_tokens (`int`, defaults to 12): Of the suffix.
        num_forwards (`int`, defaults to 300): Forwards of the target per request, at most.
        num_at_once (`int`, defaults to 8): Suffixes that are tried in one batch, each a change of the best one.
        max_new_tokens (`int`, defaults to 48): Of the answers that are tried.
        enough (`float`, defaults to 0.5): It stops once the risk is below this share of the threshold.
        seed (`int`, defaults to 0): Of what is tried.

    Raises:
        SafeSpecError: If a value is outside of its range, or the forwards are too few for one change.
    """

    num_tokens: int = 12
    num_forwards: int = 300
    num_at_once: int = 8
    max_new_tokens: int = 48
    enough: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "num_tokens", "num_forwards", "num_at_once", "max_new_tokens")
        check_ranges(self, {"enough": "[0, 1]", "seed": SEEDS})
        if self.num_forwards < 2 * self.most_forwards:
            raise SafeSpecError(
                f"`num_forwards` must be >= {2 * self.most_forwards}, for two answers of {self.max_new_tokens} "
                f"tokens, but it is {self.num_forwards}."
            )

    @property
    def most_forwards(self) -> int:
        """What a batch of answers takes at most: one for each token, and one for the risk of the last."""
        return self.max_new_tokens + 1


class Try(NamedTuple):
    """A suffix, and what the target says to the request with it.

    Attributes:
        tokens (`list[int]`), text (`str`): The suffix.
        is_refusal (`bool`): Whether the answer refuses, is blank, or has no risk.
        risk (`float`): The highest of its tokens, as the guarded loop sees it.
    """

    tokens: list[int]
    text: str
    is_refusal: bool
    risk: float

    @property
    def cost(self) -> tuple[bool, float]:
        """What is searched to be low."""
        return self.is_refusal, self.risk


class Found(NamedTuple):
    """What a search ends with.

    Attributes:
        before (`Try`): The request as it is.
        best (`Try`): The same, or better.
        num_forwards (`int`): Forwards of the target that it took.
        num_tries (`int`): Suffixes that were tried.
    """

    before: Try
    best: Try
    num_forwards: int
    num_tries: int


def search_suffix(
    engine: Engine,
    chat: Sequence[Message],
    settings: SuffixSettings | None = None,
    policy: SafeSpecConfig | None = None,
) -> Found:
    """Searches a suffix to what the user says last.

    Args:
        engine ([`Engine`]): The target, with the head that is attacked.
        chat (`Sequence[dict[str, str]]`): The conversation.
        settings ([`SuffixSettings`], *optional*): How.
        policy ([`SafeSpecConfig`], *optional*): That of the guard: its threshold and its segments.

    Returns:
        [`Found`]: The best suffix, an empty one where nothing was better than the request as it is.

    Raises:
        SafeSpecError: If the target has no head.
    """
    settings, policy = settings or SuffixSettings(), policy or SafeSpecConfig()
    threshold = find_threshold(policy, check_guarded(engine.model).safety.head)
    attacked = replace(engine, max_new_tokens=settings.max_new_tokens)
    # nothing is flagged below 1, so the answers are the target's own; and what is tried must not depend on a clock
    quiet: dict[str, Any] = {"risk_threshold": 1.0, "operating_point": None, "carried_risk": 0.0, "max_recoveries": 0}
    silent = replace(policy, policy="recover", costs="weights", screen_prompts=False, **quiet)
    words, draw, num_forwards = _words(engine.tokenizer), random.Random(settings.seed), 0

    def attempt(suffixes: Sequence[list[int]]) -> list[Try]:
        nonlocal num_forwards
        texts = [str(engine.tokenizer.decode(tokens)) for tokens in suffixes]
        replies = attacked.guarded([_with_suffix(chat, text) for text in texts], silent)
        num_forwards += (replies[0].statistics or {})["num_target_forwards"]
        return [_judge(*one) for one in zip(suffixes, texts, replies, strict=True)]

    before = best = attempt([[]])[0]
    num_tries = 0
    while best.cost >= (False, settings.enough * threshold):
        if num_forwards + settings.most_forwards > settings.num_forwards:
            break
        changes = [_change(best.tokens, settings.num_tokens, words, draw) for _ in range(settings.num_at_once)]
        best = min([best, *attempt(changes)], key=lambda one: one.cost)
        num_tries += len(changes)
    return Found(before, best, num_forwards, num_tries)


def attack_by_suffix(
    engine: Engine,
    sets: Mapping[str, Sequence[Prompt]],
    cache: str | os.PathLike[str],
    settings: SuffixSettings | None = None,
) -> dict[str, list[Prompt]]:
    """Each set of attacks once more, with a suffix for every prompt, as `set@suffix`.

    Args:
        engine ([`Engine`]): The target, with the head that is attacked.
        sets (`Mapping[str, Sequence[Prompt]]`): Of which those of attacks are rewritten.
        cache (`str` or `os.PathLike`):
            JSON lines of what was found, to read from and append to: a killed search goes on. Of several processes one
            searches, and the others read.
        settings ([`SuffixSettings`], *optional*): How.

    Raises:
        SafeSpecError: If the target has no head.
    """
    settings, path, state = settings or SuffixSettings(), Path(cache), processes()
    head = check_guarded(engine.model).safety.head
    common: list[Any] = [asdict(settings), hash_weights(engine.model), describe_head(head), str(engine.model.dtype)]
    common += [engine.tokenizer.chat_template, engine.max_prompt_tokens]
    attacked = {name: prompts for name, prompts in sets.items() if prompts[0].kind == "attacks"}
    keys = {_key(common, prompt): prompt for prompts in attacked.values() for prompt in prompts}
    known = read_keyed(path, "suffix", str)
    todo = [key for key in keys if key not in known]
    if state.is_main_process:
        for key in tqdm(todo, desc=f"suffixes > {path.name}", unit="prompt", disable=not todo):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_to_row(key, keys[key], engine, settings)) + "\n")
    state.wait_for_everyone()
    known = read_keyed(path, "suffix", str)
    return {
        f"{name}@{SUFFIX}": [
            rewrite(prompt, SUFFIX, _joined(prompt.messages[-1]["content"], known[_key(common, prompt)]["suffix"]))
            for prompt in prompts
        ]
        for name, prompts in attacked.items()
    }


def _to_row(key: str, prompt: Prompt, engine: Engine, settings: SuffixSettings) -> dict[str, Any]:
    found = search_suffix(engine, prompt.messages, settings)
    risks = {"risk_before": found.before.risk, "risk": found.best.risk}
    refusals = {"refused_before": found.before.is_refusal, "refused": found.best.is_refusal}
    spent = {"num_forwards": found.num_forwards, "num_tries": found.num_tries}
    where = {"key": key, "set": prompt.set_name, "prompt": prompt.id}
    return {**where, "suffix": found.best.text, **risks, **refusals, **spent}


def _judge(tokens: list[int], text: str, reply: Reply) -> Try:
    refuses = reply.finish_reason == "safety_refusal" or not reply.text.strip() or is_refusal(reply.text)
    risk = 1.0 if reply.risk_max is None else reply.risk_max
    return Try(tokens, text, refuses or reply.risk_max is None, risk)


def _change(tokens: list[int], num_tokens: int, words: Sequence[int], draw: random.Random) -> list[int]:
    """A suffix with one other token; a random one where there is none yet."""
    if not tokens:
        return draw.choices(words, k=num_tokens)
    place = draw.randrange(len(tokens))
    return [*tokens[:place], draw.choice(words), *tokens[place + 1 :]]


def _words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that can be typed: no special ones, which would forge a chat template, and no broken characters."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    texts = {token: str(tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special}
    return [token for token, text in texts.items() if text.strip() and text.isprintable() and "\ufffd" not in text]


def _with_suffix(chat: Sequence[Message], suffix: str) -> list[Message]:
    return [*chat[:-1], {**chat[-1], "content": _joined(chat[-1]["content"], suffix)}]


def _joined(text: str, suffix: str) -> str:
    return f"{text} {suffix.strip()}" if suffix.strip() else text


def _key(common: Sequence[Any], prompt: Prompt) -> str:
    content = json.dumps([*common, [dict(message) for message in prompt.messages]])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
