"""The guard inside the engine's worker: it reads hidden states out of forwards, and closes the logits after a flag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer
from vllm.v1.worker.gpu_worker import Worker

from ..answer.segments import find_boundaries
from ..errors import SafeSpecError, UnsupportedRequestError
from ..heads.safety_head import SafetyHead, check_binding
from ..heads.tokenizers import is_extension
from .entries import close_logits
from .guard import find_binding
from .runner import check_config, check_version, mend_cpu_sampling, read_rows, set_generators_aside
from .spec import ARGUMENT
from .state import RiskStates


class ModelGuard:
    """Hooks a loaded model.

    Args:
        worker (`Worker`): Its worker.
        settings (`dict`): What [`Guard.engine_args`] said.

    Raises:
        HeadMismatchError: If the head was trained for another target.
        UnsupportedRequestError: If the model does not give the layers that the head reads.
    """

    def __init__(self, worker: Worker, settings: dict[str, Any]):
        config = worker.vllm_config
        self.runner: Any = worker.model_runner
        self.reserved_id: int = settings["reserved_id"]
        self.scheduler_output: Any = None
        self._is_cpu = worker.device.type == "cpu"
        self._set_aside: dict[int, torch.Generator] = {}
        head = self._load_head(config.model_config, settings)
        self.layers = list(head.config.hidden_layers or [])
        drafts = config.speculative_config
        self.states = RiskStates(
            head.to(worker.device),
            find_boundaries(self.tokenizer),
            reserved_id=self.reserved_id,
            secret=settings["secret"],
            block_size=config.cache_config.block_size,
            num_drafts=0 if drafts is None else drafts.num_speculative_tokens,
            dtype=config.model_config.dtype,
            device=worker.device,
        )
        # steps may be captured and played again without running any Python: all that a forward may do is to copy
        size = head.config.hidden_size * len(self.layers)
        num = config.scheduler_config.max_num_batched_tokens
        self.hidden_NH = torch.zeros(num, size, dtype=config.model_config.dtype, device=worker.device)
        self._hook(self.runner.get_model(), config.model_config.hf_text_config.num_hidden_layers)

    def _load_head(self, model_config: Any, settings: dict[str, Any]) -> SafetyHead:
        head = SafetyHead.from_pretrained(settings["head"])
        self.tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer)
        found, bound = (
            find_binding(model_config.hf_config, self.tokenizer, model_config.model),
            head.config.target or {},
        )
        if is_extension(self.tokenizer, bound.get("tokenizer")):
            found |= {"tokenizer": bound["tokenizer"], "vocab_size": bound.get("vocab_size")}
        check_binding(head, found, tuple(settings["ignore_mismatches"]))
        return head

    def _hook(self, model: Any, num_layers: int) -> None:
        # vLLM's last one is not normed, as transformers' is; that one is what the model returns
        asked = sorted({layer for layer in self.layers if layer < num_layers})
        if asked:
            if not hasattr(model, "set_aux_hidden_state_layers"):
                raise UnsupportedRequestError(
                    f"vLLM's {type(model).__name__} does not give the hidden states of its layers, and the head reads "
                    f"{self.layers}: use a model that supports EAGLE-3, or a head that reads layer {num_layers} only."
                )
            model.set_aux_hidden_state_layers(tuple(asked))
        forward, compute_logits = model.forward, model.compute_logits

        def guarded_forward(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            hidden, given = output if isinstance(output, tuple) else (output, [])
            self._copy(hidden, dict(zip(asked, given, strict=True)))
            return hidden

        def guarded_logits(*args: Any, **kwargs: Any) -> Any:
            return self._guard(compute_logits(*args, **kwargs))

        model.forward, model.compute_logits = guarded_forward, guarded_logits

    def _copy(self, hidden_NH: Tensor, given: dict[int, Tensor]) -> None:
        num, size = hidden_NH.shape
        for index, layer in enumerate(self.layers):
            self.hidden_NH[:num, index * size : (index + 1) * size].copy_(given.get(layer, hidden_NH))

    def begin(self, scheduler_output: Any) -> None:
        """A step is about to be made."""
        if self._set_aside:  # no request has moved since
            self.runner.input_batch.generators.update(self._set_aside)
            self._set_aside = {}
        self.states.finish(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            arguments = getattr(request.sampling_params, "extra_args", None) or {}
            self.states.add(request.req_id, arguments.get(ARGUMENT))
        self.scheduler_output = scheduler_output

    def _guard(self, logits_RV: Tensor | None) -> Tensor | None:
        scheduler_output, self.scheduler_output = self.scheduler_output, None
        if scheduler_output is None or logits_RV is None:  # no request's, or another process has them
            return logits_RV
        if self._is_cpu:
            self._set_aside = set_generators_aside(self.runner)
        rows = read_rows(self.runner, scheduler_output)
        marks = self.states.step(rows, self.hidden_NH, len(logits_RV))
        return close_logits(logits_RV, marks, self.reserved_id)


class GuardedMixin:
    """What makes a worker of vLLM's a guarded one. It refuses to load anything that it can't guard."""

    _guard: ModelGuard

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the target, and hooks it."""
        worker: Any = self
        config = worker.vllm_config
        check_version()
        check_config(config)
        settings = (config.additional_config or {}).get("safespec")
        if settings is None:
            raise SafeSpecError(
                "This worker guards, but nobody told it how: start the engine with `Guard.engine_args`."
            )
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # of the worker it is mixed into
        if worker.device.type == "cpu":
            mend_cpu_sampling()
        self._guard = ModelGuard(worker, settings)

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step of the engine."""
        self._guard.begin(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def safespec_take(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What is known of some requests."""
        return self._guard.states.take(keys)

    def safespec_release(self, groups: Sequence[str]) -> int:
        """Forgets some answers; returns how many requests are still known."""
        return self._guard.states.release(groups)

    def safespec_report(self) -> dict[str, Any]:
        """Counts, for metrics and tests."""
        return self._guard.states.report()


class GuardedWorker(GuardedMixin, Worker):
    """A worker on a GPU. Not run, not measured."""
