"""On-policy answers: a model answers prompts, in batches, into a file that an interrupted run goes on with."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, set_seed
from transformers.utils import logging

from ..engine.evaluating import evaluating
from ..errors import SafeSpecError
from ..heads.safety_head import target_binding
from .chat_template import next_turn
from .data import Example, hash_examples
from .files import check_writable_file, read_own_rows, write_whole
from .hidden import hash_weights, render_prompt
from .settings import SEEDS, check_counts, check_ranges, differences

logger = logging.get_logger(__name__)

Labeler = Callable[[Sequence[Example]], list[int | None]]


@dataclass(frozen=True, slots=True)
class NamedLabeler:
    """A labeler that says who labels, so that a file is not gone on with by another one.

    Args:
        label (`Callable`): Gives answered examples their labels.
        origin (`Mapping[str, Any]`): All that labels depend on besides the answers, as JSON can hold it.
    """

    label: Labeler
    origin: Mapping[str, Any]

    def __call__(self, examples: Sequence[Example]) -> list[int | None]:
        """The labels; `None` where there is none."""
        return self.label(examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectSettings:
    """How prompts are answered.

    Args:
        max_new_tokens (`int`, defaults to 128): Of an answer.
        max_prompt_tokens (`int`, defaults to 1024): Of a prompt; longer ones lose their beginning.
        batch_size (`int`, defaults to 32): Prompts answered at once. Padding moves logits a little.
        temperature (`float`, defaults to 0.0): Of sampling; 0 is greedy.
        seed (`int`, defaults to 0): Of sampling.
    """

    max_new_tokens: int = 128
    max_prompt_tokens: int = 1024
    batch_size: int = 32
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "max_prompt_tokens", "batch_size")
        check_ranges(self, {"temperature": "[0, inf)", "seed": SEEDS})


def collect_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    out: str | os.PathLike[str],
    *,
    settings: CollectSettings | None = None,
    labeler: Labeler | None = None,
) -> int:
    """Lets a model answer prompts and appends the answers to a JSON lines file that `load_examples` reads.

    A batch is written at once. Prompts whose id is in the file are skipped, so a killed run goes on where it was and
    ends with the same file as one that was not killed. An answer ends at an end token or, where the chat template has
    none, before the model asks the next question itself: see [`next_turn`].

    Args:
        model ([`~transformers.PreTrainedModel`]): Answers; the target, or the draft.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.
        prompts (`Sequence[Example]`):
            Their labels are the labels of the answers unless there is a `labeler`. A `response`, if there is one, is
            how the answer begins: the model goes on from there.
        out (`str` or `os.PathLike`): The file. Its settings are kept beside it, in `<out>.settings.json`.
        settings ([`CollectSettings`], *optional*): How to answer.
        labeler (`Callable`, *optional*): See [`load_labeler`]; answers that it gives no label are left out.

    Returns:
        `int`: Answers that this call wrote.

    Raises:
        SafeSpecError: If the chat template is missing or refuses a prompt, if the file can't be written to, or if it
            was begun with another model, labeler, other settings or prompts, or by something else. All before the
            first answer.
    """
    settings = settings or CollectSettings()
    path = Path(out)
    texts = {example.id: render_prompt(tokenizer, example) + example.response for example in prompts}
    check_writable_file(path)
    stop = next_turn(tokenizer)
    labeled_by = labeler.origin if isinstance(labeler, NamedLabeler) else labeler and "a function"
    _check_settings(path, {**describe_collecting(model, tokenizer, prompts, settings), "labeler": labeled_by})
    done = _read_done(path)
    ordered = sorted(prompts, key=lambda example: sum(len(message["content"]) for message in example.messages))
    num_written = num_unlabelled = 0
    for start in tqdm(range(0, len(ordered), settings.batch_size), desc=f"answers > {path.name}", unit="batch"):
        batch = ordered[start : start + settings.batch_size]
        if all(example.id in done for example in batch):
            continue
        # one seed per batch, so that a run that goes on samples what an uninterrupted one would have sampled
        set_seed(settings.seed + start)
        spoken = continue_texts(model, tokenizer, [texts[example.id] for example in batch], settings, stop)
        answers = [replace(e, response=e.response + answer) for e, answer in zip(batch, spoken, strict=True)]
        labels = [example.label for example in answers] if labeler is None else labeler(answers)
        new = [replace(a, label=label) for a, label in zip(answers, labels, strict=True) if a.id not in done]
        num_written += _append(path, new)
        num_unlabelled += sum(example.label is None for example in new)
    if num_unlabelled:
        logger.warning("%d answers are left out of %s: they were given no label.", num_unlabelled, path.name)
    return num_written


def describe_collecting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Example], settings: CollectSettings
) -> dict[str, Any]:
    """All that answers depend on, as JSON can hold it. Of weights it is samples: see [`hash_weights`].

    Args:
        model, tokenizer, prompts, settings: As for [`collect_answers`].
    """
    config: Any = model.generation_config
    generation = {name: value for name, value in json.loads(config.to_json_string()).items() if name[0] != "_"}
    generation.pop("transformers_version", None)
    return {
        "target": [target_binding(model, tokenizer), model.config.name_or_path],
        "weights": [hash_weights(model), str(model.dtype)],
        "generation": generation,
        "collecting": asdict(settings),
        "asked_by": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
        "stop": next_turn(tokenizer),
        "prompts": hash_examples(prompts),
    }


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: CollectSettings,
    stop: str = "",
) -> list[str]:
    """What a model says after each text, up to its end token or to `stop`, unless that is empty."""
    encoded: Any = tokenizer(list(texts), add_special_tokens=False)
    inputs = pad_left(model, tokenizer, [ids[-settings.max_prompt_tokens :] for ids in encoded["input_ids"]])
    width, ends = inputs["input_ids"].shape[1], stop_ids(model)
    sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    generate: Any = model.generate
    with torch.inference_mode(), evaluating([model]):
        tokens = generate(
            **inputs,
            max_new_tokens=settings.max_new_tokens,
            stopping_criteria=[_Said(stop, tokenizer, width)] if stop else None,
            **(sampling if settings.temperature > 0 else {"do_sample": False}),
        )
    answers = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in tokens[:, width:].tolist()]
    spoken = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [answer.partition(stop)[0] for answer in spoken] if stop else spoken


class _Said(StoppingCriteria):
    """Ends an answer that has a text in it. transformers' `stop_strings` fail if no token ends as the text does."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, num_prompt_tokens: int):
        self.text, self.tokenizer, self.num_prompt_tokens = text, tokenizer, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        answers = input_ids[:, self.num_prompt_tokens :]
        # most tokens are a character or more, and those that are a byte make one of four at most
        tails = self.tokenizer.batch_decode(answers[:, -4 * len(self.text) :], skip_special_tokens=True)
        return torch.tensor([self.text in tail for tail in tails], device=input_ids.device)


def pad_left(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Arguments for `generate`: a batch of prompts, padded on the left.

    A tokenizer that pads on the right, or has no token to pad with, is the caller's, and stays as it is.

    Args:
        model ([`~transformers.PreTrainedModel`]): Answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        rows (`Sequence[list[int]]`): Token ids of the prompts.

    Returns:
        `dict`: `input_ids` and `attention_mask`, of shape `(rows, width)`, and `pad_token_id`, which is never read.
    """
    width = max(map(len, rows))
    known = [tokenizer.pad_token_id, *stop_ids(model), tokenizer.eos_token_id, 0]
    pad = next(token for token in known if token is not None)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return {"input_ids": ids, "attention_mask": mask, "pad_token_id": pad}


def stop_ids(model: PreTrainedModel) -> list[int]:
    """What `generate` ends an answer at; it fills up the rows of a batch behind it."""
    generation: Any = model.generation_config
    ids = generation.eos_token_id
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _append(path: Path, examples: Sequence[Example]) -> int:
    answered = [example for example in examples if example.response.strip() and example.label is not None]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(example.to_json() + "\n" for example in answered))
        file.flush()
        os.fsync(file.fileno())
    return len(answered)


def _read_done(path: Path) -> set[str]:
    """Ids of the rows in the file, after cutting off a line that a kill left incomplete."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(path, len(complete))
    rows = list(read_own_rows(path))
    if bad := next((row for row in rows if not isinstance(row.values.get("id"), str)), None):
        raise bad.error("id", "missing, or no text: this is no row that `safespec collect` wrote")
    return {row.values["id"] for row in rows}


def _check_settings(path: Path, described: Mapping[str, Any]) -> None:
    settings = json.loads(json.dumps(described))  # as the file has them
    file = path.with_name(path.name + ".settings.json")
    if path.exists() and path.stat().st_size:
        begun = _read_settings(file)
        if begun != settings:
            was, now = ("unknown ones", settings) if begun is None else differences(begun, settings)
            raise SafeSpecError(
                f"{path} was begun with other settings or prompts: {was} there, {now} now. Give another file, or "
                "delete this one."
            )
    write_whole(file, json.dumps(settings))


def _read_settings(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
