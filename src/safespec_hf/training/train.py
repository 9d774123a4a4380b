"""Trains a safety head from cached features: a sweep over what is read, then a small ensemble folded into one MLP.

Shapes: P prefixes, F inputs of the MLP, N answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from ..errors import SafeSpecError
from ..heads.head_config import SafetyHeadConfig
from ..heads.safety_head import SafetyHead
from .data import Example
from .dataset import Dataset, auroc_of, check_read, check_sets, partial_auroc_of
from .features import Features, Reading
from .settings import NUM_SEEDS, SEEDS, check_counts, check_ranges

RANGES = {
    "width": "[0, inf)",
    "learning_rate": "(0, inf)",
    "weight_decay": "[0, inf)",
    "dropout": "[0, 1)",
    "min_unsafe_tokens": "[0, inf)",
    "source_power": "[0, 1]",
    "answer_share": "[0, 1]",
    "seed": SEEDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a head is trained.

    Args:
        num_members (`int`, defaults to 4): MLPs trained from different seeds; their logits are averaged by one MLP.
        width (`int`, defaults to 32): Hidden units of each; 0 trains linear probes.
        learning_rate (`float`, defaults to 1e-3): Of AdamW.
        weight_decay (`float`, defaults to 0.1): Of AdamW.
        dropout (`float`, defaults to 0.2): On the hidden units.
        batch_size (`int`, defaults to 48): Answers per step, each with all of its prefixes.
        max_epochs (`int`, defaults to 20): At most.
        patience (`int`, defaults to 4): Epochs without a better validation AUROC before it stops.
        min_unsafe_tokens (`int`, defaults to 16):
            Shorter prefixes of unsafe answers, counted from where they turn unsafe, are left out: nothing has happened
            in them yet.
        source_power (`float`, defaults to 0.8):
            Within a class a source of n answers weighs n to this power: 1 is by size, 0 is all sources alike.
        answer_share (`float`, defaults to 0.5):
            Share of the loss that is of whole answers, each scored by its highest logit at any prefix, as decoding
            will: one stray spike is an alarm. The rest is of prefixes on their own.
        seed (`int`, defaults to 0): Of everything.

    Raises:
        SafeSpecError: If a value is outside of its range.
    """

    num_members: int = 4
    width: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    batch_size: int = 48
    max_epochs: int = 20
    patience: int = 4
    min_unsafe_tokens: int = 16
    source_power: float = 0.8
    answer_share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "num_members", "batch_size", "max_epochs", "patience")
        check_ranges(self, RANGES)


class Lessons(NamedTuple):
    """What members learn from.

    Attributes:
        inputs_PF (`torch.Tensor` of shape `(P, F)`): Standardised, the prefixes of an answer together.
        example_P (`torch.Tensor` of shape `(P,)`): Which answer a prefix belongs to.
        weights_P (`torch.Tensor` of shape `(P,)`): 0 for a prefix whose label isn't known to be true.
        labels_N, weights_N (`torch.Tensor` of shape `(N,)`): Of the answers.
    """

    inputs_PF: Tensor
    example_P: Tensor
    weights_P: Tensor
    labels_N: Tensor
    weights_N: Tensor


class Trained(NamedTuple):
    """A head, its validation AUROC, whole and [partial][partial_auroc_of], and those of all that a sweep tried."""

    head: SafetyHead
    validation_auroc: float
    validation_partial_auroc: float
    sweep: list[dict[str, Any]]


def train_head(
    train: Dataset,
    validation: Dataset,
    hidden_layers: Sequence[int],
    reading: Reading,
    *,
    target: dict[str, Any] | None = None,
    ewma_decay: float = 0.95,
    settings: TrainSettings | None = None,
) -> Trained:
    """Trains one head.

    Args:
        train, validation ([`Dataset`]): No group may be in both; see [`split_by_group`].
        hidden_layers (`Sequence[int]`): What it reads, among the layers of the features.
        reading ([`Reading`]): How it pools.
        target (`dict`, *optional*): See [`target_binding`].
        ewma_decay (`float`, *optional*, defaults to 0.95): That of the features.
        settings ([`TrainSettings`], *optional*): How.

    Returns:
        [`Trained`]: The head in evaluation mode, its threshold still to be calibrated.

    Raises:
        SafeSpecError: If groups leak, a set lacks one of the classes, answers are cut so short that it does, or the
            features lack a layer or the reading.
    """
    settings = settings or TrainSettings()
    _check_features(train.features, hidden_layers, reading)
    check_sets(train.examples, validation.examples)
    check_read(train, validation)
    inputs_PF = _inputs(train.features, hidden_layers, reading)
    weights_P, weights_N = _weights(train, settings)
    is_used = weights_P > 0
    mean_F, std_F = inputs_PF[is_used].mean(0), inputs_PF[is_used].std(0) + 1e-6
    inputs_PF = (inputs_PF - mean_F) / std_F
    held_out_PF = (_inputs(validation.features, hidden_layers, reading) - mean_F) / std_F
    lessons = Lessons(inputs_PF, train.features.example, weights_P, train.labels, weights_N)
    members = [
        _train_member(lessons, held_out_PF, validation, replace(settings, seed=(settings.seed + member) % NUM_SEEDS))
        for member in range(settings.num_members)
    ]
    head = _fold_members(members, mean_F, std_F)
    head.config.update(
        {
            "hidden_size": inputs_PF.shape[1] // len(hidden_layers) // len(reading.parts),
            "hidden_layers": list(hidden_layers),
            "pooling": reading.pooling,
            "span": reading.span,
            "ewma_decay": ewma_decay,
            "dropout": settings.dropout,
            "target": target,
        }
    )
    with torch.no_grad():
        risks_P = head.risk(_inputs(validation.features, hidden_layers, reading))
    return Trained(head, auroc_of(risks_P, validation), partial_auroc_of(risks_P, validation), [])


def sweep_readings(
    train: Dataset, validation: Dataset, readings: Sequence[Reading], *, num_layers_at_once: int = 3
) -> list[dict[str, Any]]:
    """Tries linear probes on validation answers: each layer and reading, readings side by side, and sets of layers.

    What is best in one step is kept in the next. The best one has the highest [partial AUROC][partial_auroc_of].

    Args:
        train, validation ([`Dataset`]): As for [`train_head`].
        readings (`Sequence[Reading]`): Ways to pool that the features have.
        num_layers_at_once (`int`, *optional*, defaults to 3): Layers are added while that helps, up to this many.

    Returns:
        `list[dict]`: `hidden_layers`, `reading`, `auroc` and `partial_auroc`, the best one first.
    """
    quick = TrainSettings(num_members=1, width=0, max_epochs=6, patience=2)
    results: list[dict[str, Any]] = []

    def attempt(choices: Sequence[tuple[Sequence[int], Reading]], title: str) -> dict[str, Any]:
        for layers, reading in tqdm(choices, desc=title, unit="probe", disable=not choices):
            tried = train_head(train, validation, sorted(layers), reading, settings=quick)
            scores = {"auroc": tried.validation_auroc, "partial_auroc": tried.validation_partial_auroc}
            results.append({"hidden_layers": sorted(layers), "reading": list(reading), **scores})
        return max(results, key=lambda result: result["partial_auroc"])

    layers = train.features.layers
    best = attempt([([layer], reading) for reading in readings for layer in layers], "sweep")
    best = attempt([(best["hidden_layers"], pair) for pair in _side_by_side(readings)], "sweep, two poolings")
    for num_layers in range(2, num_layers_at_once + 1):
        chosen, reading = best["hidden_layers"], Reading(*best["reading"])
        more = [([*chosen, layer], reading) for layer in layers if layer not in chosen]
        best = attempt(more, f"sweep, {num_layers} layers")
        if best["hidden_layers"] == chosen:
            break
    return sorted(results, key=lambda result: -result["partial_auroc"])


def _side_by_side(readings: Sequence[Reading]) -> list[Reading]:
    """Every two poolings of one span: what one sees early the other sees steadily."""
    pairs = combinations(readings, 2)
    return [Reading(f"{one.pooling}+{two.pooling}", one.span) for one, two in pairs if one.span == two.span]


def _check_features(features: Features, hidden_layers: Sequence[int], reading: Reading) -> None:
    missing = sorted(set(hidden_layers) - set(features.layers))
    lacks_reading = any(part.name not in features.states for part in reading.parts)
    if missing or not hidden_layers or lacks_reading:
        raise SafeSpecError(
            f"The features have layers {list(features.layers)} and readings {list(features.states)}: a head can't "
            f"read layers {list(hidden_layers)} as {reading.name!r}. Extract features of these."
        )


def _inputs(features: Features, hidden_layers: Sequence[int], reading: Reading) -> Tensor:
    columns = [features.layers.index(layer) for layer in hidden_layers]
    return torch.cat([features.states[part.name][:, columns].float().flatten(1) for part in reading.parts], dim=1)


def _weights(data: Dataset, settings: TrainSettings) -> tuple[Tensor, Tensor]:
    """Weights of prefixes and of answers; 0 leaves out those whose label isn't known to be true of what was read."""
    features, labels_N = data.features, data.labels
    starts_N = torch.tensor([example.unsafe_from for example in data.examples])
    targets_P = labels_N[features.example]
    chars_per_token_P = features.num_chars / features.num_tokens
    num_unsafe_P = (features.num_chars - starts_N[features.example]) / chars_per_token_P
    is_true_P = (targets_P == 0) | (num_unsafe_P >= settings.min_unsafe_tokens) | features.is_last
    is_true_P &= data.is_told[features.example]
    num_used_N = torch.zeros(len(data.examples)).scatter_add(0, features.example, is_true_P.float())
    told = [example for example, is_told in zip(data.examples, data.is_told.tolist(), strict=True) if is_told]
    weights_N = torch.zeros(len(data.examples))
    weights_N[data.is_told] = torch.tensor(_balance(told, settings.source_power))
    return (weights_N / num_used_N.clamp(min=1))[features.example] * is_true_P, weights_N


def _balance(examples: Sequence[Example], power: float) -> list[float]:
    """Weights such that both classes weigh the same and sources within a class weigh their size to a power."""
    cells = [(example.label, example.source) for example in examples]
    sizes: dict[tuple[int | None, str], float] = {}
    for cell, example in zip(cells, examples, strict=True):
        sizes[cell] = sizes.get(cell, 0.0) + example.weight
    totals = {label: sum(size**power for cell, size in sizes.items() if cell[0] == label) for label, _ in cells}
    return [
        example.weight / sizes[cell] * sizes[cell] ** power / totals[cell[0]] * len(examples) / 2
        for cell, example in zip(cells, examples, strict=True)
    ]


def _train_member(
    lessons: Lessons, held_out_PF: Tensor, validation: Dataset, settings: TrainSettings
) -> nn.Sequential:
    torch.manual_seed(settings.seed)
    member = _new_member(held_out_PF.shape[1], settings)
    optimizer = torch.optim.AdamW(member.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    best_score, best_state, num_waited = -1.0, member.state_dict(), 0
    for _ in range(settings.max_epochs):
        member.train()
        for batch in _batches(lessons, settings.batch_size):
            optimizer.zero_grad()
            _loss(member(batch.inputs_PF).squeeze(-1), batch, settings.answer_share).backward()
            optimizer.step()
        member.eval()
        with torch.no_grad():
            score = auroc_of(member(held_out_PF).squeeze(-1), validation)
        num_waited += 1
        if score > best_score:
            best_score, num_waited = score, 0
            best_state = {name: tensor.clone() for name, tensor in member.state_dict().items()}
        if num_waited >= settings.patience:
            break
    member.load_state_dict(best_state)
    return member


def _new_member(num_features: int, settings: TrainSettings) -> nn.Sequential:
    if settings.width == 0:
        return nn.Sequential(nn.Linear(num_features, 1))
    inner = nn.Linear(num_features, settings.width)
    return nn.Sequential(inner, nn.ReLU(), nn.Dropout(settings.dropout), nn.Linear(settings.width, 1))


def _loss(logits_P: Tensor, batch: Lessons, answer_share: float) -> Tensor:
    """Cross-entropy of prefixes on their own, and of answers by their highest logit."""
    of_prefixes_P = binary_cross_entropy_with_logits(logits_P, batch.labels_N[batch.example_P], reduction="none")
    of_prefixes = (of_prefixes_P * batch.weights_P).sum() / batch.weights_P.sum().clamp(min=1e-9)
    highest_N = torch.full_like(batch.labels_N, -torch.inf).scatter_reduce(0, batch.example_P, logits_P, "amax")
    of_answers_N = binary_cross_entropy_with_logits(highest_N, batch.labels_N, reduction="none")
    of_answers = (of_answers_N * batch.weights_N).sum() / batch.weights_N.sum().clamp(min=1e-9)
    return (1 - answer_share) * of_prefixes + answer_share * of_answers


def _batches(lessons: Lessons, size: int) -> Iterator[Lessons]:
    """So many answers at a time, in a random order, each with all of its prefixes."""
    sizes_N = lessons.example_P.bincount(minlength=len(lessons.labels_N))
    starts_N = sizes_N.cumsum(0) - sizes_N
    for chosen_B in torch.randperm(len(sizes_N)).split(size):
        of_batch_P = torch.arange(len(chosen_B)).repeat_interleave(sizes_N[chosen_B])
        within_P = torch.arange(len(of_batch_P)) - (sizes_N[chosen_B].cumsum(0) - sizes_N[chosen_B])[of_batch_P]
        rows_P = starts_N[chosen_B][of_batch_P] + within_P
        yield Lessons(
            lessons.inputs_PF[rows_P],
            of_batch_P,
            lessons.weights_P[rows_P],
            lessons.labels_N[chosen_B],
            lessons.weights_N[chosen_B],
        )


@torch.no_grad()
def _fold_members(members: Sequence[nn.Sequential], mean_F: Tensor, std_F: Tensor) -> SafetyHead:
    """One head whose logit is the mean of the members' on standardised inputs: their hidden units side by side."""
    layers = [[layer for layer in member if isinstance(layer, nn.Linear)] for member in members]
    weight = torch.cat([first.weight for first, *_ in layers]) / std_F
    bias = torch.cat([first.bias for first, *_ in layers]) - weight @ mean_F
    config = SafetyHeadConfig(hidden_size=mean_F.numel(), hidden_layers=[0], num_mlp_layers=len(layers[0]))
    config.mlp_ratio = len(weight) / config.num_features
    head = SafetyHead(config)
    first, last = head.mlp[0], head.mlp[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    if first is last:
        weight, bias = weight.mean(0, keepdim=True), bias.mean(0, keepdim=True)
    else:
        last.weight.copy_(torch.cat([final.weight for *_, final in layers], dim=1) / len(members))
        last.bias.copy_(torch.stack([final.bias for *_, final in layers]).mean(0))
    first.weight.copy_(weight)
    first.bias.copy_(bias)
    return head.eval()
