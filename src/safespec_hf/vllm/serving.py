"""vLLM's asynchronous engine with a guard before its only door, and what its HTTP routes call.

vLLM's own classes read requests, apply templates and write answers, streamed or not. They get what they know, outputs
of an engine; but of guarded answers only, and only the part of them that nothing can take back any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, RetryableRequestError, VLLMClientError, VLLMError
from vllm.inputs.engine import tokens_input
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.engine.exceptions import EngineDeadError

from ..decoding.attachment import find_threshold, with_threshold
from ..errors import UnsupportedRequestError
from .controller import RELEASE, REPORT, TAKE, merge_records, new_tokens, to_params
from .driving import Batcher, New, drive
from .guard import Guard
from .metrics import Metrics
from .request import GuardedRequest
from .rounds import GuardedResult, Submission
from .runner import verify_params
from .sampling import shifted_seed
from .spec import RiskRecord

logger = logging.getLogger(__name__)
REASONS = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "safety_refusal": "content_filter",
    "safety_stop": "content_filter",
}
"""Why answers end, in the words of OpenAI's API."""
DEAD = (
    "The engine is gone: this answer ends here, and nothing more of it was or will be given. Send the request again."
)
POLL_SECONDS = 1.0
"""How often a call of the workers looks whether the engine still lives: vLLM leaves such calls waiting for ever."""


@dataclass
class Call:
    """What one HTTP request asked for, and what became of its answers.

    Attributes:
        risk_threshold (`float`): The server's, or a lower one.
        results (`dict[int, GuardedResult]`): By the number of the choice.
        num_choices (`int`): Of the prompts so far.
    """

    risk_threshold: float
    results: dict[int, GuardedResult] = field(default_factory=dict)
    num_choices: int = 0


CALL: ContextVar[Call | None] = ContextVar("safespec_call", default=None)
"""The call that is being served: vLLM's classes stand between the route, which knows it, and the engine."""


class GuardedAsyncLLM(AsyncLLM):
    """vLLM's engine, all answers of which are guarded. It answers nothing before [`~GuardedAsyncLLM.protect`]."""

    _guard: Guard | None = None

    def protect(self, guard: Guard, metrics: Metrics) -> None:
        """Sets the guard whose [`~Guard.engine_args`] the engine was made with."""
        self._guard, self._metrics = guard, metrics
        self.risk_threshold = find_threshold(guard.policy, guard.head)
        self._turns = itertools.count()
        self.takes = Batcher(self._take_all)
        self.releases = Batcher(self._release_all)

    def generate(
        self, prompt: Mapping[str, Any], sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Guarded answers, as many as `sampling_params.n`, in place of the engine's own.

        Raises:
            UnsupportedRequestError: If it can't be guarded.
        """
        if self._guard is None:
            raise UnsupportedRequestError("This engine has no guard yet: call `protect` first.")
        if not isinstance(prompt, Mapping) or prompt.get("type") != "token":
            raise UnsupportedRequestError("Only prompts of text are guarded.")
        if options.get("lora_request") is not None:
            raise UnsupportedRequestError("The head knows the target without adapters.")
        verify_params(sampling_params, self.vllm_config)
        call = CALL.get() or Call(self.risk_threshold)
        policy = self._guard.policy
        if call.risk_threshold < self.risk_threshold:
            policy = with_threshold(policy, call.risk_threshold, self._guard.head)
        first, call.num_choices = call.num_choices, call.num_choices + sampling_params.n
        answers = []
        for index in range(sampling_params.n):
            params = sampling_params.clone()
            params.n = 1
            if params.seed is not None:
                params.seed = shifted_seed(params.seed, index)
            # ids that clients choose can come twice
            answers.append(self._guard.request(uuid4().hex, prompt["prompt_token_ids"], params, policy))
        names = ("priority", "data_parallel_rank", "session_id", "trace_headers")
        passed = {name: options[name] for name in names if options.get(name) is not None}
        return self._outputs(prompt, sampling_params, request_id, answers, call, first, self._pin(passed))

    async def encode(self, *args: Any, **options: Any) -> AsyncGenerator[Any, None]:
        """Refused: hidden states leave by no door."""
        raise UnsupportedRequestError("A guarded engine gives answers only.")
        yield  # what makes this a generator, as the engine's own is

    async def ask_workers(self, method: str, *args: Any) -> list[Any]:
        """What all workers of all replicas answer; nothing from those that fail.

        Raises:
            EngineDeadError: If the engine dies meanwhile.
        """
        core: Any = self.engine_core
        # `collective_rpc` gives what the first of several replicas says
        call = asyncio.ensure_future(core.call_utility_all_async("collective_rpc", method, None, args, {}))
        while not (await asyncio.wait([call], timeout=POLL_SECONDS))[0]:
            if self.errored:
                call.cancel()
                raise EngineDeadError()
        if isinstance(error := call.exception(), EngineDeadError):
            raise error
        if error is not None:
            logger.error("Workers could not answer %s: %s", method, error)
            return []
        return [answer for replica in call.result() for answer in replica]

    async def watch_workers(self, seconds: float) -> None:
        """Brings what workers count into the metrics, again and again."""
        while not self.errored:
            self._metrics.read_workers(await self.ask_workers(REPORT))
            await asyncio.sleep(seconds)

    def _pin(self, passed: dict[str, Any]) -> dict[str, Any]:
        """Keeps all of a request at one replica: there lie its states, and its part of the prefix cache."""
        core: Any = self.engine_core
        if (num_replicas := len(core.core_engines)) > 1:
            passed.setdefault("data_parallel_rank", next(self._turns) % num_replicas)
        return passed

    async def _take_all(self, keys: list[str]) -> dict[str, RiskRecord]:
        return merge_records(await self.ask_workers(TAKE, keys))

    async def _release_all(self, keys: list[str]) -> None:
        await self.ask_workers(RELEASE, keys)

    async def _outputs(
        self,
        prompt: Mapping[str, Any],
        params: SamplingParams,
        request_id: str,
        answers: Sequence[GuardedRequest],
        call: Call,
        first: int,
        passed: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        """What vLLM's classes expect of an engine, for all answers to a prompt."""

        ids = list(prompt["prompt_token_ids"])

        def output(parts: list[CompletionOutput], finished: bool) -> RequestOutput:
            return RequestOutput(request_id, prompt.get("prompt"), ids, None, parts, finished)

        streams = params.output_kind == RequestOutputKind.DELTA
        run = _Run(self, prompt.get("cache_salt"), passed)
        choices = [self._choice(index, answer, params, run) for index, answer in enumerate(answers)]
        whole = [CompletionOutput(index, "", [], None, None) for index in range(len(answers))]
        num_open = len(answers)
        if streams:
            yield output([], False)  # the head of a stream need not wait for text
        async with aclosing(merge_async_iterators(*choices)) as merged:
            async for index, part in merged:
                if part.finish_reason is not None:
                    num_open -= 1
                    if answers[index].is_finished:
                        call.results[first + index] = answers[index].result()
                if streams:
                    yield output([part], num_open == 0)
                else:
                    whole[index] = _joined(whole[index], part)
        if not streams:
            yield output(whole, True)

    async def _choice(
        self, index: int, answer: GuardedRequest, params: SamplingParams, run: _Run
    ) -> AsyncGenerator[CompletionOutput, None]:
        """One answer, part by part; the last part says why it ended."""
        text, num_tokens = _Text(self.get_tokenizer(), answer, params), 0
        try:
            async with aclosing(drive(answer, run)) as final:
                async for tokens in final:
                    num_tokens += len(tokens)
                    yield CompletionOutput(index, text.add(tokens), tokens, None, None)
                    if text.stop is not None:
                        break
        except EngineDeadError as error:
            raise RetryableRequestError(DEAD) from error
        except VLLMError as error:
            if not answer.row.tokens and isinstance(error, (VLLMClientError, GracefulHTTPError)):
                raise  # the engine did not take it at all
            logger.error("An answer could not be guarded to its end: %s", error)
            answer.abandon(str(error))
        finally:
            self._metrics.count(answer)
        rest = answer.take_final() if answer.is_finished else []
        if not num_tokens and not rest:
            rest = sorted(answer.plan.eos_ids)[:1]  # an answer without any token has no last part for vLLM's classes
        reason = REASONS[answer.row.finish_reason or "stop"] if answer.is_finished else "stop"
        yield CompletionOutput(
            index, text.add(rest) + text.finish(), rest, None, None, finish_reason=reason, stop_reason=text.stop
        )


class _Run:
    """An engine, as the answers to one prompt use it.

    Args:
        engine ([`GuardedAsyncLLM`]): The engine.
        salt (`str`, *optional*): Of the prefix cache.
        passed (`dict`): Arguments for all submissions.
    """

    def __init__(self, engine: GuardedAsyncLLM, salt: str | None, passed: dict[str, Any]):
        self._engine = engine
        self._salt = salt
        self._passed = passed

    async def submit(self, submission: Submission) -> AsyncGenerator[New, None]:
        prompt = tokens_input(submission.prompt_ids, cache_salt=self._salt)
        outputs = AsyncLLM.generate(self._engine, prompt, to_params(submission), submission.key, **self._passed)
        async with aclosing(outputs):
            async for output in outputs:
                yield New(*new_tokens(output))

    async def take(self, keys: Sequence[str]) -> dict[str, RiskRecord]:
        return await self._engine.takes.ask(keys)

    def release(self, key: str) -> None:
        self._engine.releases.tell([key])


class _Text:
    """The text of an answer, from tokens that are final.

    Attributes:
        stop (`str`, *optional*): The stop string that was found. What is behind it is not shown.
    """

    def __init__(self, tokenizer: Any, answer: GuardedRequest, params: SamplingParams):
        request: Any = SimpleNamespace(
            request_id=answer.key, prompt_token_ids=answer.row.prompt, prompt_embeds=None, sampling_params=params
        )
        self._writer = IncrementalDetokenizer.from_new_request(tokenizer, request)
        self._end_ids = answer.plan.eos_ids
        self.stop: str | None = None

    def add(self, tokens: Sequence[int]) -> str:
        """The text that they add."""
        if not tokens or self.stop is not None:
            return ""
        self.stop = self._writer.update(list(tokens), tokens[-1] in self._end_ids)
        return self._writer.get_next_output_text(self.stop is not None, True)

    def finish(self) -> str:
        """What was held back because a stop string might have begun in it."""
        return self._writer.get_next_output_text(True, True)


def _joined(whole: CompletionOutput, part: CompletionOutput) -> CompletionOutput:
    whole.text += part.text
    whole.token_ids = [*whole.token_ids, *part.token_ids]
    whole.finish_reason, whole.stop_reason = part.finish_reason, part.stop_reason
    return whole
