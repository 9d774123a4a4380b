"""What `train`, `calibrate`, `report` and `make-head` share: a head is made and saved with its record and card."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..heads.hub import refresh_card
from ..heads.safety_head import SafetyHead, check_binding, target_binding
from .calibrate import calibrate_head
from .data import Example
from .dataset import Dataset
from .features import FeatureSettings, Reading
from .metrics import ScoredAnswers
from .record import update_record
from .report import provenance
from .scores import read_risks
from .train import Trained, TrainSettings, sweep_readings, train_head


def train_and_save(
    train: Dataset,
    validation: Dataset,
    out: str | os.PathLike[str],
    *,
    target: dict[str, Any],
    features: FeatureSettings,
    settings: TrainSettings,
    choice: tuple[Sequence[int], Reading] | None = None,
    files: Sequence[str] = (),
    chat_template: str | None = None,
) -> Trained:
    """Trains a head, and saves it with its record and card.

    Args:
        train, validation ([`Dataset`]): As for [`train_head`].
        out (`str` or `os.PathLike`): Folder of the head.
        target (`dict`): See [`target_binding`].
        features ([`FeatureSettings`]): Those that the features were read with.
        settings ([`TrainSettings`]): How.
        choice (`tuple[Sequence[int], Reading]`, *optional*): What it reads. Default: what a sweep finds best.
        files (`Sequence[str]`): The data, for its hashes.
        chat_template (`str`, *optional*): What the target's tokenizer was given, for the record and the card.

    Returns:
        [`Trained`]: The head, with the sweep.
    """
    sweep = [] if choice else sweep_readings(train, validation, features.readings)
    layers, reading = choice or (sweep[0]["hidden_layers"], Reading(*sweep[0]["reading"]))
    decay = features.ewma_decay
    trained = train_head(train, validation, layers, reading, target=target, ewma_decay=decay, settings=settings)
    trained.head.save_pretrained(out)
    made = {"validation_auroc": trained.validation_auroc, "provenance": provenance(files)}
    update_record(out, sweep=sweep, chat_template=chat_template, **made)
    refresh_card(SafetyHead, out)
    return trained._replace(sweep=sweep)


def calibrate_and_save(
    head: SafetyHead,
    benign: ScoredAnswers,
    labelled: ScoredAnswers | None,
    out: str | os.PathLike[str],
    *,
    alpha: float,
    max_response_tokens: int,
    files: Sequence[str] = (),
    chat_template: str | None = None,
) -> dict[str, Any]:
    """Calibrates a head, and saves it with its record and card.

    Args:
        head ([`SafetyHead`]): Changed in place.
        benign, labelled, alpha: As for [`calibrate_head`].
        out (`str` or `os.PathLike`): Folder of the head, with its record.
        max_response_tokens (`int`): How much of each answer was read, for the record.
        files (`Sequence[str]`): The data, for its hashes.
        chat_template (`str`, *optional*): As for [`train_and_save`].

    Returns:
        `dict`: The record of the calibration.
    """
    record = calibrate_head(head, benign, labelled, alpha)
    head.save_pretrained(out)
    record |= {"max_response_tokens": max_response_tokens, "chat_template": chat_template}
    record |= {"provenance": provenance(files)}
    update_record(out, calibration=record)
    refresh_card(SafetyHead, out)
    return record


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: SafetyHead,
    examples: Sequence[Example],
    cache: Path,
    max_response_tokens: int,
) -> ScoredAnswers:
    """Answers with the risk of each of their tokens.

    Raises:
        HeadMismatchError: If the head was trained for another target.
    """
    check_binding(head, target_binding(model, tokenizer))
    (risks,) = read_risks(model, tokenizer, [head], examples, cache, max_response_tokens=max_response_tokens)
    return ScoredAnswers(examples, risks)
