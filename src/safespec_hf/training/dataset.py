"""Labelled answers with their features: how they are split, what can be learned from them, and how scores are judged.

Shapes: P prefixes, N answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor

from ..errors import SafeSpecError
from .data import Example
from .features import Features
from .settings import SEEDS, check_number

MAX_FALSE_ALARMS = 0.05
"""A sweep chooses by the ROC curve up to this share of false alarms: further right no threshold is ever set."""


class Dataset(NamedTuple):
    """Labelled answers and their features."""

    examples: Sequence[Example]
    features: Features

    @property
    def labels(self) -> Tensor:
        """Of the examples, float32 of shape `(N,)`."""
        return torch.tensor([float(example.label or 0) for example in self.examples])

    @property
    def is_told(self) -> Tensor:
        """Whether what was read of an answer tells its label, bool of shape `(N,)`.

        Of an unsafe answer that was cut before its unsafe part only safe text is left.
        """
        starts_N = torch.tensor([example.unsafe_from for example in self.examples])
        chars_N = torch.zeros_like(starts_N).scatter_reduce(0, self.features.example, self.features.num_chars, "amax")
        return (self.labels == 0) | (chars_N > starts_N)


def split_by_group(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Splits so that no group is on both sides.

    Args:
        examples (`Sequence[Example]`): All of them.
        fraction (`float`): Share of the groups that goes to the second part, in (0, 1).
        seed (`int`, *optional*, defaults to 0): Of the choice.

    Raises:
        SafeSpecError: If there are fewer than two groups, `fraction` leaves none to the first part, or `fraction` or
            `seed` is out of range.
    """
    check_number("fraction", fraction, "(0, 1)")
    check_number("seed", seed, SEEDS, "an integer")
    groups = [example.group for example in examples]
    if (num_groups := len(set(groups))) < 2:
        raise SafeSpecError(f"A split needs at least 2 groups, but {len(examples)} examples are in {num_groups}.")
    if math.ceil(fraction * num_groups) == num_groups:
        raise SafeSpecError(
            f"`fraction` must leave the first part a group, but {fraction!r} of {num_groups} groups are all of them."
        )
    splitter = GroupShuffleSplit(n_splits=1, test_size=fraction, random_state=seed)
    first, second = next(splitter.split(groups, groups=groups))
    return [examples[index] for index in first], [examples[index] for index in second]


def auroc_of(risks_P: Tensor, data: Dataset) -> float:
    """AUROC of whole answers, each scored by its highest risk at any prefix; of those alone that tell their labels."""
    told_N = data.is_told
    return float(roc_auc_score(data.labels[told_N], highest_risks(risks_P, data)[told_N]))


def partial_auroc_of(risks_P: Tensor, data: Dataset) -> float:
    """The same up to [`MAX_FALSE_ALARMS`] only, scaled so that 0.5 is chance and 1 is perfect."""
    told_N = data.is_told
    return float(roc_auc_score(data.labels[told_N], highest_risks(risks_P, data)[told_N], max_fpr=MAX_FALSE_ALARMS))


def highest_risks(risks_P: Tensor, data: Dataset) -> Tensor:
    """The highest risk of each answer over its prefixes, of shape `(N,)`."""
    highest_N = torch.full((len(data.examples),), -torch.inf)
    return highest_N.scatter_reduce(0, data.features.example, risks_P, "amax")


def check_sets(train: Sequence[Example], validation: Sequence[Example]) -> None:
    """Raises if a head can't be trained on these.

    Raises:
        SafeSpecError: If groups leak, or a set lacks one of the classes.
    """
    for name, examples in (("training", train), ("validation", validation)):
        if len({example.label for example in examples}) < 2:
            raise SafeSpecError(f"The {name} set has {len(examples)} answers of one class; both are needed.")
    shared = sorted({example.group for example in train} & {example.group for example in validation})
    if shared:
        ids = [example.id for example in validation if example.group == shared[0]]
        raise SafeSpecError(
            f"{len(shared)} groups are in both training and validation, the one of {ids[0]!r} for instance. Split by "
            "group: the prompt, unless rows say otherwise."
        )


def check_read(train: Dataset, validation: Dataset) -> None:
    """Raises if all unsafe answers of a set were cut before their unsafe part: no example is left of it.

    Raises:
        SafeSpecError: Names the set.
    """
    for name, data in (("training", train), ("validation", validation)):
        if not bool((data.labels[data.is_told] == 1).any()):
            raise SafeSpecError(
                f"Of all {int(data.labels.sum())} unsafe answers in the {name} set nothing was read that comes after "
                "`unsafe_from`. Read more of each (`--max-response-tokens`), or give answers that turn unsafe earlier."
            )
