"""What forwards of target and draft take on this machine, which says how many tokens to draft.

They run as the call will run them, over a context of the length that it will have about, whose states are zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..drafting.draft_length import DraftCosts
from ..engine.alone import cached_model
from ..engine.speeds import BlockSeconds, describe, measure_blocks, remembered
from ..engine.traits import input_device, max_positions
from ..heads.draft_head import DraftHead

WIDTHS = (1, 8, 2, 4, 16)
"""Tokens of a row for which forwards of the target are timed, the most telling first."""
TARGET_BUDGET, DRAFT_BUDGET = 0.4, 0.05
"""Seconds for each, about. A model of which three forwards take longer takes those three."""
SHORTEST_CONTEXT = 256
MAX_KNOWN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts(DraftCosts):
    """Costs by the seconds of forwards.

    Args:
        target ([`BlockSeconds`]): Of the target, by the tokens of all rows together.
        drafter ([`BlockSeconds`], *optional*): Of the draft model.
        num_rows (`int`, defaults to 1): Rows that there are.

    Example:

        >>> from safespec_hf.engine.speeds import BlockSeconds
        >>> costs = MeasuredCosts(target=BlockSeconds(((1, 0.04), (8, 0.06))), drafter=BlockSeconds(((1, 0.004),)))
        >>> costs.of_rows(1).draft, costs.of_rows(1).block(8)
        (0.1, 1.5)
    """

    target: BlockSeconds
    drafter: BlockSeconds | None = None
    num_rows: int = 1
    blocks: tuple[float, ...] = ()

    def of_rows(self, num_rows: int) -> MeasuredCosts:
        return _of_rows(self.target, self.drafter, num_rows)

    def block(self, num_tokens: int) -> float:
        if num_tokens <= len(self.blocks):
            return self.blocks[num_tokens - 1]
        return self.target.at(num_tokens * self.num_rows) / self.target.at(self.num_rows)


@functools.lru_cache(maxsize=64)
def _of_rows(target: BlockSeconds, drafter: BlockSeconds | None, num_rows: int) -> MeasuredCosts:
    plain = target.at(num_rows)
    draft = 0.0 if drafter is None else drafter.at(num_rows) / plain
    blocks = tuple(target.at(num * num_rows) / plain for num in range(1, MAX_KNOWN + 1))
    return MeasuredCosts(target=target, drafter=drafter, num_rows=num_rows, draft=draft, blocks=blocks)


def measure_costs(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    *,
    num_rows: int,
    num_context: int,
    layers: Sequence[int],
    how: dict[str, Any],
) -> MeasuredCosts:
    """Measures a target and its draft, or remembers what was measured before.

    Args:
        model, assistant ([`~transformers.PreTrainedModel`]): Target and draft, as they will run.
        num_rows (`int`): Rows of the batch.
        num_context (`int`): Tokens that a row will have about.
        layers (`Sequence[int]`): Hidden states of the target that will be read.
        how (`dict`): What else makes forwards faster or slower, ready for JSON.
    """
    num_context = _bucket(num_context, max_positions(model))
    rows = {1, _power_of_two(num_rows)}
    points: dict[int, float] = {}
    for num in sorted(rows):
        run = functools.partial(_target_run, model, num, num_context, tuple(layers))
        found = _measured(model, run, WIDTHS, TARGET_BUDGET, {"rows": num, "context": num_context, **how})
        # what was measured with the rows of this call counts more than what stands for it
        points = {at: seconds for at, seconds in points.items() if at < num} | {
            at * num: seconds for at, seconds in found.points
        }
    target = BlockSeconds(tuple(sorted(points.items())))
    if assistant is None:
        return _of_rows(target, None, num_rows)
    num_context = _bucket(num_context, max_positions(assistant))
    steps: dict[int, float] = {}
    for num in sorted(rows):
        run = functools.partial(_draft_run, assistant, num, num_context)
        found = _measured(assistant, run, (1,), DRAFT_BUDGET, {"rows": num, "context": num_context, **how})
        steps[num] = found.at(1)
    return _of_rows(target, BlockSeconds(tuple(sorted(steps.items()))), num_rows)


def _measured(
    model: PreTrainedModel, make_run: Any, widths: Sequence[int], budget: float, about: dict[str, Any]
) -> BlockSeconds:
    # of compiled forwards one for a token and one for several are compiled
    num_warm = 2 if about.get("compile") else 1
    return remembered(
        "blocks",
        {"model": describe(model), "widths": list(widths), **about},
        lambda: measure_blocks(make_run(), widths, budget, num_warm).points,
        _read_points,
    )


def _read_points(values: Any) -> BlockSeconds:
    return BlockSeconds(tuple((int(num), float(seconds)) for num, seconds in values))


def _target_run(model: PreTrainedModel, num_rows: int, num_context: int, layers: tuple[int, ...]) -> Any:
    cached = cached_model(model, num_rows, layers)
    cached.forward([[0, 0]] * num_rows, 1)
    cached.pretend(num_context)

    def run(width: int) -> None:
        ids_BT = torch.zeros(num_rows, width, dtype=torch.long)
        cached.forward(ids_BT, width, num_drafts=[width - 1] * num_rows).logits_BTV.max(dim=-1).indices.tolist()
        cached.keep([num_context] * num_rows)

    return run


def _draft_run(assistant: PreTrainedModel, num_rows: int, num_context: int) -> Any:
    cached, states_BTF = cached_model(assistant, num_rows), None
    if isinstance(assistant, DraftHead):
        shape = num_rows, 2, assistant.config.num_features
        states_BTF = torch.zeros(shape, dtype=assistant.dtype, device=input_device(assistant))
    before = cached.forward([[0, 0]] * num_rows, 1, states_BTF=states_BTF)
    states_BTF = None if before.hidden_BTF is None else before.hidden_BTF[:, -1:]
    cached.pretend(num_context)

    def run(width: int) -> None:
        ids_BT = torch.zeros(num_rows, width, dtype=torch.long)
        output = cached.forward(ids_BT, 1, states_BTF=states_BTF, num_drafts=[width] * num_rows)
        logits_BV = output.logits_BTV[:, -1]
        values_BS, _ = logits_BV.float().topk(4, dim=-1)
        (values_BS - logits_BV.float().logsumexp(dim=-1, keepdim=True)).exp().tolist()
        cached.keep([num_context] * num_rows)

    return run


def _bucket(num_context: int, most: int | None) -> int:
    """Contexts up to four times as long are measured alike."""
    size = SHORTEST_CONTEXT
    while size * 2 < num_context:
        size *= 4
    return size if most is None else max(min(size, most - 2 * max(WIDTHS)), 2)


def _power_of_two(num: int) -> int:
    return 1 << (num - 1).bit_length()
