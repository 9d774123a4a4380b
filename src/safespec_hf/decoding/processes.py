"""Calls of a model whose weights several processes share: all of them must run the same forwards.

Under tensor parallelism, and where FSDP shards weights, a forward needs every process. If one of them went its own
way, all would wait for ever. So they compare what they were asked for, draw from one seed, and go by no clocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import GenerationConfig, MaxTimeCriteria, PreTrainedModel, StoppingCriteriaList

from ..engine.traits import sharing_groups
from ..errors import UnsupportedRequestError


def agree(model: PreTrainedModel, criteria: StoppingCriteriaList, request: Iterable[object]) -> None:
    """Makes one call of what the processes that share a model were asked for. Does nothing where nobody shares it.

    The random numbers of all of them go on from the first one's.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        criteria ([`~transformers.StoppingCriteriaList`]): When answers end.
        request (`Iterable`): What must be the same everywhere: tensors, or what can be written down.

    Raises:
        UnsupportedRequestError: If one was asked for something else, or if a clock would say when answers end.
    """
    groups = sharing_groups(model)
    if not groups:
        return
    if any(isinstance(criterion, MaxTimeCriteria) for criterion in criteria):
        raise UnsupportedRequestError(
            "`max_time` can't be kept: several processes share the weights of this model, and must end an answer at "
            "the same token, whatever their clocks say. Use `max_new_tokens`."
        )
    mine = hashlib.sha256(repr([_written(part) for part in request]).encode()).hexdigest(), torch.randint(2**62, ())
    asked, seed = mine[0], int(mine[1])
    for group in groups:
        everyone: list[tuple[str, int]] = [("", 0)] * dist.get_world_size(group)
        dist.all_gather_object(everyone, (asked, seed), group=group)
        # a process that differs is told to all, in every direction of the mesh
        asked = asked if {each for each, _ in everyone} == {asked} else "differs"
        seed = everyone[0][1]
    if asked == "differs":
        raise UnsupportedRequestError(
            "Several processes share the weights of this model, so all of them must make the same guarded call, but "
            "prompts or settings differ. Give each the same ones, or a whole copy of the model."
        )
    torch.manual_seed(seed)


def _written(part: object) -> str:
    if isinstance(part, GenerationConfig):
        fields = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        return json.dumps(fields, sort_keys=True, default=lambda value: type(value).__name__)
    if isinstance(part, Mapping):
        return json.dumps({name: _written(value) for name, value in part.items() if isinstance(value, Tensor)})
    if isinstance(part, Tensor):
        return hashlib.sha256(part.detach().cpu().double().numpy().tobytes()).hexdigest()
    return repr(part)
