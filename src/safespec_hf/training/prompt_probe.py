"""Trains the part of a head that scores prompts: a linear probe on the hidden states of a prompt's last token.

Shapes: N prompts, F tapped features (hidden size times layers).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SafeSpecError
from ..heads.head_config import SafetyHeadConfig
from ..heads.hub import refresh_card
from ..heads.safety_head import SafetyHead, check_binding, target_binding
from .calibrate import OPERATING_POINTS, conformal_threshold, num_answers_needed, threshold_if_any
from .data import Example
from .disguises import disguise
from .hidden import Encoded, describe_states, make_batches, read_hidden, render_prompt
from .parts import Parts
from .record import update_record
from .report import provenance
from .shards import compute_texts

MIN_REQUESTS = 32
"""Of either kind: below, a probe would be one of a few words."""
MAX_PROMPT_TOKENS, BATCH_TOKENS, NUM_SHARD_PROMPTS = 1024, 4096, 64
INVERSE_STRENGTH = 0.003
"""Of the L2 penalty: there are about as many features as prompts, and all are standardised."""


def read_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    examples: Sequence[Example],
    cache_dir: str | os.PathLike[str],
) -> Tensor:
    """Hidden states of the last token of each prompt, from which its answer begins; or those that are cached.

    Args:
        model, tokenizer: The target.
        layers (`Sequence[int]`): As in [`SafetyHeadConfig`].
        examples (`Sequence[Example]`): Prompts; answers are not read.
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of target and layers.

    Returns:
        `torch.Tensor`: Of shape `(N, F)`.

    Raises:
        SafeSpecError: If the chat template refuses a conversation.
    """
    texts = []
    for example in examples:
        encoded: Any = tokenizer(render_prompt(tokenizer, example), add_special_tokens=False)
        ids = encoded["input_ids"][-MAX_PROMPT_TOKENS:]
        texts.append(Encoded(ids[:-1], ids[-1:]))  # its last token is read as an answer of one token would be
    by_key = {text.key: text for text in texts}

    def compute(keys: Sequence[str]) -> dict[str, Tensor]:
        chosen, found = [by_key[key] for key in keys], dict[str, Tensor]()
        for batch in make_batches([text.num_tokens for text in chosen], BATCH_TOKENS):
            states = read_hidden(model, [chosen[index] for index in batch], layers)
            found |= {str(index): states_1F[0].float() for index, states_1F in zip(batch, states, strict=True)}
        return found

    parts = [*describe_states(model, tokenizer), list(layers), "prompts"]
    lengths = {key: text.num_tokens for key, text in by_key.items()}
    found = compute_texts(cache_dir, parts, lengths, NUM_SHARD_PROMPTS, compute, "prompts")
    return torch.stack([found[text.key] for text in texts])


def fit_probe(states_NF: Tensor, labels: Sequence[int]) -> tuple[Tensor, float]:
    """A logistic regression in which both classes weigh the same.

    Args:
        states_NF (`torch.Tensor` of shape `(N, F)`): Of prompts.
        labels (`Sequence[int]`): 1 is unsafe.

    Returns:
        `tuple[torch.Tensor, float]`: Weights of shape `(F,)` for the states as they are, and the bias.

    Example:

        >>> import torch
        >>> weight_F, bias = fit_probe(torch.tensor([[1.0], [2.0], [5.0], [6.0]]), [0, 0, 1, 1])
        >>> round(-bias / float(weight_F))  # the border lies in the middle
        4
    """
    scaler = StandardScaler().fit(states_NF.double().numpy())
    fitted = LogisticRegression(C=INVERSE_STRENGTH, class_weight="balanced", max_iter=1000)
    fitted.fit(scaler.transform(states_NF.double().numpy()), np.asarray(labels))
    weight_F = fitted.coef_[0] / scaler.scale_
    bias = float(fitted.intercept_[0] - (weight_F * scaler.mean_).sum())
    return torch.from_numpy(weight_F).float(), bias


def prompt_thresholds(risks: Sequence[float], alpha: float, points: Mapping[str, Any]) -> dict[str, float]:
    """A threshold of prompts for each operating point that has one of answers, as far as there are prompts enough.

    A point that lets twice as many answers be flagged as [`calibrate`] does by default, lets twice as many prompts be.

    Args:
        risks (`Sequence[float]`): Of harmless prompts.
        alpha (`float`): Bound on the share of them that is flagged, in (0, 1), where no point is chosen.
        points (`Mapping[str, Any]`): As in [`SafetyHeadConfig`].

    Example:

        >>> risks = [index / 1000 for index in range(1000)]
        >>> points = {"strict": {"risk_threshold": 0.4}, "mine": {"risk_threshold": 0.2}}
        >>> found = prompt_thresholds(risks, 0.01, points)
        >>> {name: round(threshold, 3) for name, threshold in found.items()}
        {'strict': 0.975}
    """
    usual = OPERATING_POINTS["balanced"]
    alphas = {name: alpha * OPERATING_POINTS[name] / usual for name in points if name in OPERATING_POINTS}
    found = {name: threshold_if_any(risks, share) for name, share in alphas.items() if share < 1}
    return {name: threshold for name, threshold in found.items() if threshold is not None}


def with_probe(
    head: SafetyHead, weight_F: Tensor, bias: float, threshold: float, at_points: Mapping[str, float] | None = None
) -> SafetyHead:
    """A head that scores answers as another one does, and prompts with this probe, in float32.

    In 16 bits a probe would be rounded, and risks with it, across the threshold.
    """
    config = SafetyHeadConfig.from_dict(head.config.to_dict() | {"prompt_threshold": threshold})
    config.set_prompt_thresholds(at_points or {})
    probed: Any = SafetyHead(config)
    of_probe = {"prompt_probe.weight": weight_F[None], "prompt_probe.bias": torch.tensor([bias])}
    probed.load_state_dict({**head.state_dict(), **of_probe})
    made: SafetyHead = probed.float().eval()
    return made


def split_requests(parts: Parts) -> dict[str, list[Example]]:
    """Prompts by what they ask for, as far as it shows: what got an unsafe answer asks for harm, of whomever.

    Args:
        parts ([`Parts`]): Labelled answers, and harmless prompts.

    Returns:
        `dict[str, list[Example]]`: Labelled prompts for `"train"` and `"validation"`, and harmless ones for
        `"calibration"`. None is there twice.
    """
    harmless = {name: _asked(examples, 0) for name, examples in parts.prompts.items()}
    known = {text for part in harmless.values() for text in part}
    seen = {text: one for text, one in _asked(parts.train, 1).items() if text not in known}
    held_out = {text: one for text, one in _asked(parts.validation, 1).items() if text not in known | set(seen)}
    return {
        "train": [*seen.values(), *harmless["train"].values()],
        "validation": [*held_out.values(), *harmless["validation"].values()],
        "calibration": [*harmless["calibration"].values()],
    }


def has_requests(requests: Mapping[str, Sequence[Example]]) -> bool:
    """Whether there are enough of both kinds to learn from."""
    num_harmful = sum(example.label == 1 for example in requests["train"])
    return min(num_harmful, len(requests["train"]) - num_harmful) >= MIN_REQUESTS


def describe_requests(requests: Mapping[str, Sequence[Example]]) -> str:
    """What is learned from these, in a line."""
    num, num_harmful = len(requests["train"]), sum(example.label == 1 for example in requests["train"])
    found = f"{num_harmful:,} prompts that got unsafe answers, and {num - num_harmful:,} harmless ones"
    return f"from {found}" if has_requests(requests) else f"not scored: {MIN_REQUESTS} of each kind needed, {found}"


def _asked(examples: Sequence[Example], label: int) -> dict[str, Example]:
    found: dict[str, Example] = {}
    for example in examples:
        if example.label == label or not label:
            found.setdefault(str(example.messages), replace(example, response="", label=label))
    return found


def train_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head_dir: str | os.PathLike[str],
    train: Sequence[Example],
    calibration: Sequence[Example],
    *,
    alpha: float,
    cache_dir: str | os.PathLike[str],
    validation: Sequence[Example] = (),
    num_disguises: int = 0,
    seed: int = 0,
    files: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains and calibrates the probe of a saved head, and saves the head with it.

    Args:
        model, tokenizer: The target.
        head_dir (`str` or `os.PathLike`): Folder of the head; changed in place.
        train (`Sequence[Example]`): Labelled prompts of both classes.
        calibration (`Sequence[Example]`): Harmless prompts that are not among them.
        alpha (`float`): Bound on the share of harmless prompts that are flagged, in (0, 1).
        cache_dir (`str` or `os.PathLike`): For hidden states.
        validation (`Sequence[Example]`):
            Labelled prompts to measure on, others than these; in a disguise each as well, if any are used.
        num_disguises (`int`, defaults to 0): In how many a harmful prompt is trained on besides; see [`disguise`].
        seed (`int`, defaults to 0): Of the disguises.
        files (`Sequence[str]`): The data, for its hashes.

    Returns:
        `dict`: The record: `prompt_threshold`, `alpha`, counts, `flagged` by source, `auroc` on validation
        prompts as they are.

    Raises:
        SafeSpecError: As [`check_prompts`].
        HeadMismatchError: If the head was trained for another target.
    """
    check_prompts(train, calibration, alpha, validation)
    head = SafetyHead.from_pretrained(head_dir)
    check_binding(head, target_binding(model, tokenizer))
    train = [*train, *disguise(train, num_disguises, seed=seed)]
    labels = [int(example.label or 0) for example in validation]
    validation = [*validation, *disguise(validation, min(num_disguises, 1), seed=seed + 1)]
    every = [*train, *calibration, *validation]
    states_NF = read_prompts(model, tokenizer, head.config.hidden_layers or [], every, cache_dir)
    num_train, num_seen = len(train), len(train) + len(calibration)
    weight_F, bias = fit_probe(states_NF[:num_train], [int(example.label or 0) for example in train])
    risks = torch.sigmoid(states_NF @ weight_F + bias).tolist()
    harmless = risks[num_train:num_seen]
    threshold = conformal_threshold(harmless, alpha)
    at_points = prompt_thresholds(harmless, alpha, head.config.operating_points or {})
    with_probe(head, weight_F, bias, threshold, at_points).save_pretrained(head_dir)
    as_they_are = risks[num_seen : num_seen + len(labels)]
    record = {
        "prompt_threshold": threshold,
        "alpha": alpha,
        "num_disguises": num_disguises,
        "num_prompts": {"train": num_train, "calibration": len(calibration), "validation": len(validation)},
        "flagged": _shares(every[num_train:], risks[num_train:], threshold),
        "auroc": float(roc_auc_score(labels, as_they_are)) if len(set(labels)) == 2 else None,
        "provenance": provenance(files),
    }
    update_record(head_dir, prompts=record)
    refresh_card(SafetyHead, head_dir)
    return record


def check_prompts(
    train: Sequence[Example], calibration: Sequence[Example], alpha: float, validation: Sequence[Example] = ()
) -> None:
    """Raises for prompts that can't be learned from or measured on, before any model is loaded.

    Raises:
        SafeSpecError: If a class is missing, a prompt is in two of the sets, or there are too few to calibrate on.
    """
    if {example.label for example in train} != {0, 1}:
        raise SafeSpecError("To train on, there must be harmful prompts (label 1) and harmless ones (label 0).")
    if len(calibration) < (needed := num_answers_needed(alpha)):
        raise SafeSpecError(f"alpha={alpha} needs at least {needed} harmless prompts, got {len(calibration)}.")
    sets = {"trained on": train, "calibrated on": calibration, "measured on": validation}
    texts = {use: {str(example.messages): example.id for example in part} for use, part in sets.items()}
    for (use, part), (other, others) in combinations(texts.items(), 2):
        if shared := sorted(others[text] for text in part.keys() & others.keys()):
            raise SafeSpecError(
                f"{len(shared)} prompts are both {use} and {other}, {shared[0]!r} for instance: figures would flatter "
                "the head. Leave them out of one."
            )


def _shares(examples: Sequence[Example], risks: Sequence[float], threshold: float) -> dict[str, dict[str, Any]]:
    """By source and label, how many prompts there are and what share of them is flagged."""
    found: dict[str, list[bool]] = {}
    for example, risk in zip(examples, risks, strict=True):
        found.setdefault(f"{example.source}, {'unsafe' if example.label else 'safe'}", []).append(risk >= threshold)
    return {name: {"num": len(flags), "share": sum(flags) / len(flags)} for name, flags in found.items()}
