"""Which answers a head is trained on, which choose what it reads, and which its threshold is calibrated on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..errors import SafeSpecError
from .calibrate import num_answers_needed
from .data import Example
from .dataset import check_sets

PROMPT_SHARES = {"train": 0.6, "validation": 0.1, "calibration": 0.3}
LABELLED_SHARES = {"train": 0.8, "validation": 0.2}


class Parts(NamedTuple):
    """Labelled answers, and harmless prompts that the target is to answer itself. No group is in two parts.

    Attributes:
        train, validation (`list[Example]`): Labelled answers.
        prompts (`dict[str, list[Example]]`): Prompts for `"train"`, `"validation"` and `"calibration"`.
    """

    train: list[Example]
    validation: list[Example]
    prompts: dict[str, list[Example]]


def split_parts(
    prompts: Sequence[Example],
    labelled: Sequence[Example],
    validation: Sequence[Example] = (),
    *,
    alpha: float,
    seed: int = 0,
) -> Parts:
    """Splits by group: a prompt that labelled answers answer as well goes where these are.

    Args:
        prompts (`Sequence[Example]`): Harmless ones, 60 % for training, 10 % to choose by, 30 % to calibrate on.
        labelled (`Sequence[Example]`): Answers of both classes.
        validation (`Sequence[Example]`): Others to choose by. Default: a fifth of the groups of the labelled ones.
        alpha (`float`): Bound on false alarms that the threshold will be calibrated for, in (0, 1).
        seed (`int`): Of the order of groups.

    Raises:
        SafeSpecError: If a prompt is labelled unsafe, if no answer is unsafe, if groups leak, if a part lacks one of
            the classes, or if there are too few prompts for `alpha`; says how many are needed.
    """
    if harmful := next((example for example in prompts if example.label == 1), None):
        raise SafeSpecError(
            f"Answers to prompts are safe by construction, but {harmful.id!r} is labelled unsafe. Leave it out, or "
            "label its answer with `safespec collect --labeler`."
        )
    if not any(example.label == 1 for example in labelled):
        raise SafeSpecError(
            f"None of {len(labelled)} labelled answers is unsafe, and a head learns from both kinds. Give labelled "
            "answers of any model, with `--labelled` or `--from-hub`."
        )
    seen, held_out = (list(labelled), list(validation)) if validation else _hold_out(labelled, seed)
    known = {example.group: name for name, part in (("train", seen), ("validation", held_out)) for example in part}
    free = split_groups((e.group for e in prompts if e.group not in known), PROMPT_SHARES, seed)
    parts = Parts(seen, held_out, {name: [] for name in PROMPT_SHARES})
    for example in prompts:
        parts.prompts[(known | free)[example.group]].append(example)
    check_sets([*seen, *parts.prompts["train"]], [*held_out, *parts.prompts["validation"]])
    check_num_calibration(len(parts.prompts["calibration"]), len(prompts), alpha)
    return parts


def check_num_calibration(num: int, num_prompts: int, alpha: float) -> None:
    """Raises unless so many benign answers are enough for a threshold.

    Args:
        num (`int`): Answers to calibrate on.
        num_prompts (`int`): Prompts that they come from.
        alpha (`float`): Bound on false alarms, in (0, 1).

    Raises:
        SafeSpecError: Says how many prompts there should be.

    Example:

        >>> check_num_calibration(30, 100, alpha=0.02)
        Traceback (most recent call last):
        safespec_hf.errors.SafeSpecError: alpha=0.02 needs 49 benign answers to calibrate on, ...
    """
    num_needed = num_answers_needed(alpha)
    if num >= num_needed:
        return
    share = PROMPT_SHARES["calibration"]
    raise SafeSpecError(
        f"alpha={alpha} needs {num_needed} benign answers to calibrate on, and {share:.0%} of the prompts are for "
        f"that: {num} of {num_prompts}. Give at least {math.ceil(num_needed / share)} harmless prompts that the "
        f"labelled answers don't answer, or take `--alpha` {math.ceil(1e4 / (num + 1)) / 1e4:g} or more."
    )


def split_groups(groups: Iterable[str], shares: Mapping[str, float], seed: int = 0) -> dict[str, str]:
    """Which part each group is in, by an order of chance that depends on nothing but the seed and the groups' names.

    Args:
        groups (`Iterable[str]`): Names, repeated or not.
        shares (`Mapping[str, float]`): Of each part, 1 together.
        seed (`int`): Of the order.

    Example:

        >>> split_groups(["rose", "lily", "iris", "lily"], {"train": 0.67, "validation": 0.33})
        {'iris': 'train', 'rose': 'train', 'lily': 'validation'}
    """
    ordered = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
    part_of: dict[str, str] = {}
    end = 0.0
    for part, share in shares.items():
        start, end = end, end + share
        part_of |= dict.fromkeys(ordered[round(start * len(ordered)) : round(end * len(ordered))], part)
    return part_of


def _hold_out(labelled: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """A fifth of the groups that have an unsafe answer, and of those that have none, so that both have their share."""
    unsafe = {example.group for example in labelled if example.label == 1}
    part_of = split_groups(unsafe, LABELLED_SHARES, seed)
    part_of |= split_groups({example.group for example in labelled} - unsafe, LABELLED_SHARES, seed)
    train, validation = ([e for e in labelled if part_of[e.group] == part] for part in LABELLED_SHARES)
    return train, validation
