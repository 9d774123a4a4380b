"""All that touches vLLM's internals: its version, its options, how a step's rows are read, and what is mended."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import numpy as np
import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError

from ..errors import UnsupportedRequestError
from .entries import StepRow

KNOWN_VERSIONS = ("0.32.0",)
"""Versions whose internals were read, and that the benchmark was run on."""
KNOWN_DRAFTS = ("ngram", "draft_model")
"""Ways of drafting whose rows are read right."""


def check_version(version: str | None = None) -> None:
    """Raises for a vLLM that nobody looked into: the guard would rest on guesses.

    Raises:
        UnsupportedRequestError: Names both versions.
    """
    found = (version or vllm.__version__).split("+")[0]
    if found not in KNOWN_VERSIONS:
        raise UnsupportedRequestError(
            f"The guard knows the insides of vLLM {', '.join(KNOWN_VERSIONS)}, but this is {found}. Install one of "
            "those: nothing is guarded by guessing."
        )


def check_config(config: VllmConfig) -> None:
    """Raises for an engine under which the promise can't be kept, however its options came about.

    Raises:
        UnsupportedRequestError: Names the option and what to use instead.
    """
    parallel, drafts = config.parallel_config, config.speculative_config
    method = None if drafts is None else drafts.method
    processors = [*(config.model_config.logits_processors or []), *entry_points(group="vllm.logits_processors")]
    refused = (
        (bool(config.scheduler_config.async_scheduling), "async scheduling: tokens would be made past a flag"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism: the layers that are read lie elsewhere"),
        (bool(getattr(parallel, "enable_dbo", False)), "micro-batches: their rows are mixed"),
        (config.lora_config is not None, "adapters: the head knows the target without"),
        (config.kv_transfer_config is not None, "a KV connector: what others read has no state here"),
        (config.model_config.runner_type != "generate", f"the {config.model_config.runner_type!r} runner"),
        (bool(config.model_config.enable_prompt_embeds), "prompt embeddings: they have no token ids"),
        (bool(processors), f"logits processors: {processors} come after the guard, and could open what it closed"),
        (method is not None and method not in KNOWN_DRAFTS, f"drafts by {method!r}: only {', '.join(KNOWN_DRAFTS)}"),
    )
    for is_refused, what in refused:
        if is_refused:
            raise UnsupportedRequestError(f"Guarded decoding in vLLM does not support {what}.")


def verify_params(params: vllm.SamplingParams | Mapping[str, Any] | None, config: VllmConfig) -> None:
    """Has vLLM check parameters that it would else check with the first submission, when a stream has begun.

    Raises:
        UnsupportedRequestError: With vLLM's own words, which name the parameter.
    """
    try:
        read = params if isinstance(params, vllm.SamplingParams) else vllm.SamplingParams(**(params or {}))
        read.verify(config.model_config, config.speculative_config, config.structured_outputs_config, None)
    except (VLLMClientError, TypeError) as error:
        raise UnsupportedRequestError(str(error)) from error


def read_rows(runner: Any, scheduler_output: Any) -> list[StepRow]:
    """The rows of the forward that a runner has just made, in the order of its batch."""
    batch = getattr(runner, "input_batch", None)
    if batch is None:  # V2 keeps no batch between steps
        return _read_rows_v2(runner, scheduler_output)
    rows = []
    for index in range(batch.num_reqs):
        request = batch.req_ids[index]
        start = int(batch.num_computed_tokens_cpu[index])
        num_tokens = scheduler_output.num_scheduled_tokens[request]
        drafts = scheduler_output.scheduled_spec_decode_tokens.get(request, ())
        token_ids = batch.token_ids_cpu[index, : start + num_tokens]
        rows.append(StepRow(request, start, num_tokens, len(drafts), token_ids))
    return rows


def _read_rows_v2(runner: Any, scheduler_output: Any) -> list[StepRow]:
    """The same for the V2 runner, which needs a GPU. Written by its source; not run, not measured."""
    batch = runner.execute_model_state.input_batch
    states = runner.req_states
    rows = []
    for index in range(batch.num_reqs):
        request = batch.req_ids[index]
        place = int(batch.idx_mapping_np[index])
        # the host's count may be ahead of the device's: the device's is right, and worth its wait
        start = int(states.num_computed_tokens.gpu[place])
        num_tokens = scheduler_output.num_scheduled_tokens[request]
        drafts = scheduler_output.scheduled_spec_decode_tokens.get(request, ())
        known = states.all_token_ids.gpu[place, : start + num_tokens].cpu().numpy().astype(np.int32)
        first = int(batch.query_start_loc_np[index])
        known[start : start + num_tokens] = batch.input_ids[first : first + num_tokens].cpu().numpy()
        rows.append(StepRow(request, start, num_tokens, len(drafts), known))
    return rows


def mend_cpu_sampling() -> None:
    """Mends drafts beside sampled requests on CPUs.

    In 0.32.0 `_expand_kernel_impl`, which stands in for a kernel there, writes to a copy of its output unless that is
    of type int64. Temperatures are float32: in a step with any sampled request, all logits of drafts are divided by
    numbers that nobody set, and greedy requests beside it go wrong as well.
    """
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def set_generators_aside(runner: Any) -> dict[int, torch.Generator]:
    """Takes away the generators of requests that will draw nothing in this step. Put them back before the next one.

    While a prompt is read in pieces, 0.32.0 draws a token after each, throws it away and winds the request's generator
    back. Generators of CPUs can't be wound back: it raises, and the engine dies of any seeded request.
    """
    batch = runner.input_batch
    discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    return {index: batch.generators.pop(index) for index in discarded if index in batch.generators}


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """Repeats each request's value for each of its drafts.

    Example:

        >>> expand_batch_to_tokens(torch.tensor([0.0, 0.7]), torch.tensor([1, 3]), 3, 0, 1)
        tensor([1.0000, 0.7000, 0.7000])
    """
    nums = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(nums, output_size=num_tokens)
