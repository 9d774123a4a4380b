"""Methods answer prompts, batch by batch, into a file that a killed run goes on with and processes share."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import set_seed

from ..errors import SafeSpecError
from ..modeling import GuardedModel
from ..training.files import check_writable_file
from ..training.hidden import hash_weights
from ..training.scores import describe_head
from ..training.settings import SEEDS, check_counts, check_ranges
from ..training.shards import processes
from .engine import Engine, Reply, check_guarded
from .methods import Method, Turn
from .prompts import Message, Prompt, hash_prompts
from .rows import AnswerFile, Key, Row, key_of, to_reply

UNDEFENDED = "target"
WARM_UP = "When to prune roses?"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How prompts are answered.

    Args:
        batch_size (`int`, defaults to 8): Prompts answered at once. Padding moves logits a little.
        seed (`int`, defaults to 0): Of what methods draw, together with the prompts.
    """

    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "batch_size")
        check_ranges(self, {"seed": SEEDS})


class Unit(NamedTuple):
    """What is answered at once, and what a kill can lose.

    Which prompts go together depends on the set and the batch size only, not on what was done before nor by how many
    processes: so the answers don't, either.
    """

    method: Method
    prompts: tuple[Prompt, ...]

    def rows(self) -> list[Key]:
        """Keys of the rows that it gives."""
        return [
            Key(self.method.name, prompt.set_name, prompt.id, turn)
            for prompt in self.prompts
            for turn in range(prompt.num_turns)
        ]


def run_evaluation(
    engine: Engine,
    methods: Sequence[Method],
    sets: Mapping[str, Sequence[Prompt]],
    out: str | os.PathLike[str],
    *,
    settings: RunSettings | None = None,
) -> int:
    """Lets every method answer every prompt, into a file of JSON lines.

    Rows that are there are not made again, so a killed run goes on where it was. Under `accelerate launch` or
    `torchrun` the batches are spread over the processes; the rows are the same for any number, but for the times.

    Args:
        engine ([`Engine`]): The target.
        methods (`Sequence[Method]`): What is compared.
        sets (`Mapping[str, Sequence[Prompt]]`): What [`load_prompt_sets`] read.
        out (`str` or `os.PathLike`): The file. Its settings are kept beside it, in `<out>.settings.json`.
        settings ([`RunSettings`], *optional*): How to answer.

    Returns:
        `int`: Answers that are in the file now.

    Raises:
        SafeSpecError: If a method is named twice or needs a head that is not there, if the chat template refuses a
            prompt, if the file can't be written to, or if it was begun with other settings. All before the first
            answer.
    """
    settings, path, state = settings or RunSettings(), Path(out), processes()
    _check(engine, methods, sets)
    check_writable_file(path)
    file = AnswerFile(path, state.process_index, state.num_processes)
    known = file.check_settings(describe(engine, methods, sets, settings))
    state.wait_for_everyone()
    if state.is_main_process:
        file.write_settings(known)
        file.merge()  # what was left by a killed run of several processes, and whole lines only
    state.wait_for_everyone()
    done = file.read()
    todo = [unit for unit in plan(methods, sets, settings.batch_size) if any(key not in done for key in unit.rows())]
    state.wait_for_everyone()  # nobody writes before each has seen what is missing, or their plans would differ
    mine = todo[state.process_index :: state.num_processes]
    warm_up(engine, [unit.method for unit in mine])
    with tqdm(
        total=sum(len(unit.prompts) for unit in mine),
        desc=f"answers > {path.name}",
        unit="prompt",
        disable=not state.is_main_process or not mine,
    ) as bar:
        for unit in mine:
            bar.set_postfix_str(f"{unit.method.name:.24} {unit.prompts[0].set_name}", refresh=False)
            rows = [row for row in _answer(engine, unit, file, settings.seed) if key_of(row) not in done]
            file.append([{**row, "processes": state.num_processes} for row in rows])
            bar.update(len(unit.prompts))
    state.wait_for_everyone()
    if state.is_main_process:
        file.merge()
    state.wait_for_everyone()
    return len(file.read())


def warm_up(engine: Engine, methods: Sequence[Method]) -> None:
    """A short answer by each method, but for those that only read what the target alone said.

    What a first call does once, such as packing weights, is no answer's cost; and a policy that this target and draft
    can't have, or an expert that does not fit, is told now, not after hours.
    """
    short = replace(engine, max_new_tokens=2)
    for method in {method.name: method for method in methods if not method.uses_undefended}.values():
        method.answer(short, Turn([[{"role": "user", "content": WARM_UP}]], [WARM_UP], 0, []))


def plan(methods: Sequence[Method], sets: Mapping[str, Sequence[Prompt]], batch_size: int) -> list[Unit]:
    """All units: batches of prompts of about one length, by method and set."""

    def length(prompt: Prompt) -> tuple[int, int, str]:
        return prompt.num_turns, sum(len(message["content"]) for message in prompt.messages), prompt.id

    batches = [
        batch
        for prompts in sets.values()
        for _, group in itertools.groupby(sorted(prompts, key=length), key=lambda prompt: prompt.num_turns)
        for ordered in [tuple(group)]
        for batch in [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    ]
    return [Unit(method, batch) for method in methods for batch in batches]


def describe(
    engine: Engine, methods: Sequence[Method], sets: Mapping[str, Sequence[Prompt]], settings: RunSettings
) -> dict[str, dict[str, Any]]:
    """All that answers depend on: of all of them, of each method, and of each set.

    Heads and drafts belong to the methods that ask them, so that another one leaves undefended answers as they were.
    """
    model, draft = engine.model, engine.draft
    safety = model.safety if isinstance(model, GuardedModel) else None
    found = {name: getattr(safety, name, None) for name in ("head", "draft_head")}
    heads = {name: None if head is None else describe_head(head) for name, head in found.items()}
    drafted = {"draft": f"lookup {engine.lookup_tokens}" if draft is None else hash_weights(draft)}
    common = {
        **asdict(settings),
        "max_new_tokens": engine.max_new_tokens,
        "max_prompt_tokens": engine.max_prompt_tokens,
        "target": model.config.name_or_path,
        "weights": hash_weights(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat_template": hashlib.sha256(str(engine.tokenizer.chat_template).encode()).hexdigest()[:16],
    }
    return {
        "common": common,
        "methods": {
            method.name: (values := method.settings())
            | (drafted if method.needs_head else {})
            | (heads if _asks_head(method, values) else {})
            for method in methods
        },
        "sets": {
            name: {"kind": prompts[0].kind, "num": len(prompts), "hash": hash_prompts(prompts)}
            for name, prompts in sets.items()
        },
    }


def _asks_head(method: Method, settings: Mapping[str, Any]) -> bool:
    return method.needs_head and settings.get("is_monitored") is not False  # which is speculation alone


def _check(engine: Engine, methods: Sequence[Method], sets: Mapping[str, Sequence[Prompt]]) -> None:
    names = [method.name for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if not methods or twice is not None:
        raise SafeSpecError(f"The method {twice!r} is given twice." if methods else "Give at least one method.")
    if any(method.needs_head for method in methods):
        check_guarded(engine.model)
    engine.encode([prompt.messages for prompts in sets.values() for prompt in prompts])


def _answer(engine: Engine, unit: Unit, file: AnswerFile, seed: int) -> list[Row]:
    """The rows of a unit: turn by turn, each conversation with the answers that it was given."""
    chats: list[list[Message]] = [list(prompt.messages) for prompt in unit.prompts]
    rows: list[Row] = []
    for turn in range(unit.prompts[0].num_turns):
        seen = _seed(unit, turn, seed)
        set_seed(seen % 2**32)
        requests = [prompt.requests()[turn] for prompt in unit.prompts]
        undefended = _find_undefended(unit, file) if unit.method.uses_undefended else []
        replies = unit.method.answer(engine, Turn(chats, requests, seen, undefended))
        for prompt, request, reply, chat in zip(unit.prompts, requests, replies, chats, strict=True):
            rows.append(_to_row(unit.method, prompt, turn, request, reply))
            if turn < len(prompt.later_turns):
                later = {"role": "user", "content": prompt.later_turns[turn]}
                chat += [{"role": "assistant", "content": reply.text}, later]
    return rows


def _seed(unit: Unit, turn: int, seed: int) -> int:
    """By the prompts alone, so that methods draw alike, and any process draws what any other would."""
    first = unit.prompts[0]
    digest = hashlib.sha256(f"{seed} {first.set_name} {first.id} {turn}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _find_undefended(unit: Unit, file: AnswerFile) -> list[Reply]:
    """The target's own answers if they are all there. Later turns depend on what was let through before."""
    if unit.prompts[0].num_turns > 1:
        return []
    rows = file.read()
    keys = [Key(UNDEFENDED, prompt.set_name, prompt.id, 0) for prompt in unit.prompts]
    return [to_reply(rows[key]) for key in keys] if all(key in rows for key in keys) else []


def _to_row(method: Method, prompt: Prompt, turn: int, request: str, reply: Reply) -> Row:
    answer = asdict(reply)
    text = answer.pop("text")
    where = {"method": method.name, "set": prompt.set_name, "kind": prompt.kind, "prompt": prompt.id}
    asked = {"number": prompt.number, "turn": turn, "request": request, "reference": prompt.reference}
    return {**where, **asked, "answer": text, **answer}
