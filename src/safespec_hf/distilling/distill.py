"""Distils a draft head from a target's own answers, in as many sessions as it takes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SafeSpecError
from ..heads.draft_head import DraftHead, DraftHeadConfig
from ..heads.safety_head import target_binding
from ..training.data import Example, hash_examples, hash_file, load_examples
from ..training.features import check_layers
from ..training.files import check_writable_folder
from ..training.hidden import describe_states
from ..training.report import provenance
from ..training.settings import SEEDS, check_counts, check_number, check_ranges
from .states import (
    OutOfTime,
    StateSettings,
    Text,
    choose_token_ids,
    collate,
    find_end_ids,
    is_held_out,
    load_states,
    plan_epoch,
    read_states,
)
from .unroll import Counts, Figures, score_batch, to_figures

WEIGHTS_FILE = "model.safetensors"
RANGES = {
    "depth_decay": "(0, 1]",
    "learning_rate": "(0, inf)",
    "warmup_fraction": "[0, 1)",
    "weight_decay": "[0, inf)",
    "max_grad_norm": "(0, inf]",
    "held_out_fraction": "(0, 1)",
    "checkpoint_minutes": "[0, inf)",
    "seed": SEEDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings:
    """How a draft head is distilled.

    Args:
        draft_vocab_size (`int`, defaults to 8192): Tokens that can be drafted, >= 1.
        num_depths (`int`, defaults to 3): Draft steps that training unrolls, >= 1.
        depth_decay (`float`, defaults to 0.8): The loss of depth k weighs this to the power of k, in (0, 1].
        num_epochs (`int`, defaults to 4): Passes over the answers, >= 1.
        num_step_tokens (`int`, defaults to 4096): Tokens of a step, prompts and padding included, >= 1.
        learning_rate (`float`, defaults to 1e-3): The highest one, of AdamW; it rises in a line and falls in a cosine.
        warmup_fraction (`float`, defaults to 0.03): Share of the steps in which it rises, in [0, 1).
        weight_decay (`float`, defaults to 0.01): Of AdamW.
        max_grad_norm (`float`, defaults to 1.0): Longer gradients are cut to this length.
        held_out_fraction (`float`, defaults to 0.05): Share of the prompts that is kept for measuring, in (0, 1).
        checkpoint_minutes (`float`, defaults to 5.0): What a kill can lose.
        is_mixed (`bool`, defaults to `True`): Products in bfloat16, as in decoding, of weights in float32.
        seed (`int`, defaults to 0): Of everything.

    Raises:
        SafeSpecError: If a value is outside of its range.
    """

    draft_vocab_size: int = 8192
    num_depths: int = 3
    depth_decay: float = 0.8
    num_epochs: int = 4
    num_step_tokens: int = 4096
    learning_rate: float = 1e-3
    warmup_fraction: float = 0.03
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    held_out_fraction: float = 0.05
    checkpoint_minutes: float = 5.0
    is_mixed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "draft_vocab_size", "num_depths", "num_epochs", "num_step_tokens")
        check_ranges(self, RANGES)


def distill_draft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    settings: DistillSettings | None = None,
    start: str | os.PathLike[str] | None = None,
    max_minutes: float | None = None,
) -> dict[str, Any]:
    """Distils a draft head, or goes on where an earlier call with the same arguments was stopped or killed.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        answers (`Sequence[str]`): Files of its own greedy answers, as `safespec collect` writes them.
        out (`str` or `os.PathLike`): Folder for the head and its `training.json`.
        cache_dir (`str` or `os.PathLike`): Folder for the target's states and for checkpoints.
        layers (`Sequence[int]`, *optional*): Hidden states to read. Default: a low, the middle and a high one.
        settings ([`DistillSettings`], *optional*): How.
        start (`str`, *optional*): Folder of a draft head to begin with instead of random weights.
        max_minutes (`float`, *optional*): Stop after this time; the next call goes on.

    Returns:
        `dict`: What `training.json` holds: `is_finished`, `num_steps`, the held-out [`Figures`], settings, provenance.

    Raises:
        SafeSpecError: If there are too few prompts to hold some out, the target lacks a layer, or a folder can't be
            written to. Before anything is read by the target.
        HeadMismatchError: If `start` is the head of another target.
        UnsupportedRequestError: If a draft head can't share the target's embeddings and LM head.
    """
    settings = settings or DistillSettings()
    if max_minutes is not None:
        check_number("max_minutes", max_minutes, "[0, inf)")
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    cache = Path(cache_dir).expanduser()
    for folder in (out, cache):
        check_writable_folder(folder)
    draft = None if start is None else DraftHead.from_pretrained(start)
    reading = StateSettings(layers=_choose_layers(model, layers, draft))
    # a draft that can't be bound is found out now, and not after hours of reading
    (draft or DraftHead(draft_config(model, tokenizer, reading.layers, 1))).bind(model)
    files = _load_files(answers, settings.held_out_fraction)
    try:
        data = _read_answers(model, tokenizer, files, cache, reading, settings.held_out_fraction, deadline)
    except OutOfTime:
        return {"is_finished": False, "step": 0}
    if draft is None:
        draft = new_draft(model, tokenizer, data.train, reading.layers, settings)
    draft.to(model.device).float().bind(model)  # type: ignore[arg-type]  # its stub takes no device
    origin = None if start is None else hash_file(Path(start) / WEIGHTS_FILE)
    steps = {name: value for name, value in asdict(settings).items() if name != "checkpoint_minutes"}
    told = [*describe_states(model, tokenizer), str(tokenizer.chat_template), find_end_ids(model, tokenizer)]
    key = [told, list(map(hash_examples, files)), steps, asdict(reading), origin]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    record = Trainer(draft, data.train, data.held_out, settings, cache / f"draft-{digest}.pt").run(deadline)
    record |= {"num_answer_tokens": sum(len(text.answer_ids) for text in data.train), "settings": asdict(settings)}
    record |= {"reading": asdict(reading), "provenance": provenance(answers)}
    save_draft(draft, out, record)
    return record


def save_draft(draft: DraftHead, out: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Saves a draft head in bfloat16, which it is cast to, with what is known of its making."""
    draft.bfloat16().save_pretrained(out)
    (Path(out) / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def default_layers(model: PreTrainedModel) -> list[int]:
    """A low, the middle and a high hidden state, as in EAGLE-3."""
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    return sorted({min(2, total), total // 2, max(total - 3, 0)})


def draft_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int], draft_vocab_size: int
) -> DraftHeadConfig:
    """The config of a draft head in the target's shape."""
    text: Any = model.config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    rope = getattr(text, "rope_parameters", None) or {}
    return DraftHeadConfig(
        hidden_size=text.hidden_size,
        hidden_layers=list(layers),
        vocab_size=text.vocab_size,
        draft_vocab_size=draft_vocab_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        rope_theta=rope.get("rope_theta") or 10_000.0,
        max_position_embeddings=text.max_position_embeddings,
        target=target_binding(model, tokenizer),
    )


def new_draft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    layers: Sequence[int],
    settings: DistillSettings,
) -> DraftHead:
    """A draft head with random weights, in the target's shape.

    Args:
        model, tokenizer: The target and its tokenizer.
        texts (`Sequence[Text]`): Answers, for the choice of tokens, and for the scale of the states.
        layers (`Sequence[int]`): Hidden states to read.
        settings ([`DistillSettings`]): How.
    """
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    token_ids = choose_token_ids(texts, find_end_ids(model, tokenizer), settings.draft_vocab_size, vocab_size)
    torch.manual_seed(settings.seed)
    draft = DraftHead(draft_config(model, tokenizer, layers, len(token_ids)))
    draft.token_ids.copy_(token_ids)
    loaded = [load_states(some) for some in texts[:: max(1, len(texts) // 64)]]
    with torch.no_grad():
        # Features of different layers differ in size by orders of magnitude: let them start as equals. The last norm
        # starts with the size of the states that the LM head is used to.
        draft.fuse.weight.div_(torch.cat([states for states, _ in loaded]).float().pow(2).mean(0).sqrt() + 1e-3)
        draft.norm.copy_(torch.cat([last for _, last in loaded]).float().pow(2).mean(0).sqrt())
    return draft


class _Answers(NamedTuple):
    train: list[Text]
    held_out: list[Text]


def _choose_layers(model: PreTrainedModel, layers: Sequence[int] | None, draft: DraftHead | None) -> tuple[int, ...]:
    own = None if draft is None else draft.config.hidden_layers
    if own and layers and list(layers) != list(own):
        raise SafeSpecError(f"The head to begin with reads layers {own}, not {list(layers)}. Leave `layers` out.")
    chosen = tuple(own or layers or default_layers(model))
    check_layers(chosen, model.config.get_text_config(decoder=True).num_hidden_layers)
    if len(chosen) < 2:
        raise SafeSpecError(f"A draft head reads at least two layers, but these are {list(chosen)}.")
    return chosen


def _load_files(answers: Sequence[str | os.PathLike[str]], held_out_fraction: float) -> list[list[Example]]:
    files = [load_examples([path], label=0) for path in answers]
    sides = [is_held_out(example.group, held_out_fraction) for examples in files for example in examples]
    if len(set(sides)) < 2:
        raise SafeSpecError(
            f"Of {len(sides)} answers {sum(sides)} fell into the held-out part, but both parts need some. Give "
            "answers to more prompts, or another `held_out_fraction`."
        )
    return files


def _read_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Sequence[Example]],
    cache: Path,
    reading: StateSettings,
    held_out_fraction: float,
    deadline: float | None,
) -> _Answers:
    data = _Answers([], [])
    for examples in files:
        texts = read_states(model, tokenizer, examples, cache, reading, deadline)
        for example, text in zip(examples, texts, strict=True):
            (data.held_out if is_held_out(example.group, held_out_fraction) else data.train).append(text)
    return data


class Trainer:
    """Trains a draft head step by step; the same steps whether or not it is stopped between them.

    Args:
        draft ([`DraftHead`]): In float32, bound to its target; trained in place.
        train, held_out (`Sequence[Text]`): Answers.
        settings ([`DistillSettings`]): How.
        checkpoint (`Path`): The file to go on from, if it is there, and to go on to.
    """

    def __init__(
        self,
        draft: DraftHead,
        train: Sequence[Text],
        held_out: Sequence[Text],
        settings: DistillSettings,
        checkpoint: Path,
    ):
        self.draft, self.train, self.held_out = draft, train, held_out
        self.settings, self.checkpoint = settings, checkpoint
        lengths = [len(text.ids) for text in train]
        self.epochs = [
            plan_epoch(lengths, settings.num_step_tokens, settings.seed + epoch)
            for epoch in range(settings.num_epochs)
        ]
        self.epoch_ends = list(accumulate(map(len, self.epochs)))
        self.optimizer = torch.optim.AdamW(
            draft.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        if checkpoint.exists():
            self._load()

    def run(self, deadline: float | None = None) -> dict[str, Any]:
        """Trains to the end, or to the deadline, a reading of [`time.monotonic`].

        Returns:
            `dict`: `is_finished`, `step`, `num_steps`, held-out [`Figures`] at the end, and the `history` by epoch.
        """
        saved_at, first_step = time.monotonic(), self.step
        with tqdm(total=self.epoch_ends[-1], initial=first_step, desc="distil", unit="step") as bar:
            for batch in self._batches_left():
                bar.set_postfix(_describe(self._train_step(batch)), refresh=False)
                bar.update()
                if self.step in self.epoch_ends:
                    self.history.append(self._measured())
                    bar.write(f"held out: {self.history[-1]}", file=sys.stderr)
                if time.monotonic() - saved_at > 60 * self.settings.checkpoint_minutes:
                    self._save()
                    saved_at = time.monotonic()
                if deadline is not None and time.monotonic() > deadline:
                    break
        if self.step > first_step:
            self._save()
        # a stop between two epochs has not been measured yet
        is_measured = bool(self.history) and self.history[-1]["step"] == self.step
        figures = self.history[-1] if is_measured else self._measured()
        is_finished = self.step == self.epoch_ends[-1]
        return {"is_finished": is_finished, "num_steps": self.epoch_ends[-1], **figures, "history": self.history}

    @torch.no_grad()
    def measure(self) -> Figures:
        """Figures on the held-out answers."""
        lengths = [len(text.ids) for text in self.held_out]
        batches = plan_epoch(lengths, self.settings.num_step_tokens, seed=0)
        parts = [self._counts([self.held_out[index] for index in batch]) for batch in batches]
        return to_figures(parts)

    def _batches_left(self) -> Iterator[list[int]]:
        yield from [batch for epoch in self.epochs for batch in epoch][self.step :]

    def _measured(self) -> dict[str, Any]:
        return {"step": self.step, **self.measure()._asdict()}

    def _train_step(self, batch: Sequence[int]) -> Figures:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.epoch_ends[-1], self.settings)
        counts = self._counts([self.train[index] for index in batch])
        self.optimizer.zero_grad()
        counts.loss.backward()
        nn.utils.clip_grad_norm_(self.draft.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        return to_figures([counts])

    def _counts(self, texts: Sequence[Text]) -> Counts:
        batch = collate(texts, self.draft.fuse.weight.device)
        with torch.autocast(batch.ids_BS.device.type, torch.bfloat16, enabled=self.settings.is_mixed):
            return score_batch(self.draft, batch, self.settings.num_depths, self.settings.depth_decay)

    def _save(self) -> None:
        state = {"step": self.step, "history": self.history}
        state |= {"draft": self.draft.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.checkpoint.with_name(f".{self.checkpoint.name}.{os.getpid()}")
        torch.save(state, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.draft.fuse.weight.device, weights_only=True)
        self.step, self.history = state["step"], state["history"]
        self.draft.load_state_dict(state["draft"])
        self.optimizer.load_state_dict(state["optimizer"])


def learning_rate_at(step: int, num_steps: int, settings: DistillSettings) -> float:
    """The learning rate of a step: up in a line, down in a cosine to 0.

    Example:

        >>> learning_rate_at(500, 1000, DistillSettings(warmup_fraction=0.0))
        0.0005
    """
    num_warmup = max(1, round(settings.warmup_fraction * num_steps))
    if step < num_warmup and settings.warmup_fraction > 0:
        return settings.learning_rate * (step + 1) / num_warmup
    return settings.learning_rate * (1 + math.cos(math.pi * step / num_steps)) / 2


def _describe(figures: Figures) -> dict[str, str]:
    acceptance = " ".join(f"{rate:.2f}" for rate in figures.acceptance)
    return {"loss": f"{figures.loss:.3f}", "accepted": acceptance}
