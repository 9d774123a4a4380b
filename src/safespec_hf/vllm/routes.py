"""What stands between the HTTP routes and vLLM's classes: what a client may ask for, and what it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.v1.engine.exceptions import EngineDeadError

from .parameters import EXTENSION, check_parameters
from .reports import Reports, report
from .serving import CALL, DEAD, Call, GuardedAsyncLLM

ROUTES = frozenset(
    {
        *("/health", "/ping", "/metrics", "/version", "/load"),
        *("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
    }
)
"""All others are taken away: they lead past what is checked here, or have not been tried."""


def keep_guarded_routes(app: FastAPI) -> None:
    """Takes away all routes but those of `ROUTES`."""
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]


class GuardedServing:
    """Stands before one of vLLM's serving objects.

    Args:
        inner (`OpenAIServingChat` or `OpenAIServingCompletion`): Reads requests and writes answers.
        engine ([`GuardedAsyncLLM`]): What it asks.
        reports (`"full"`, `"outcome"` or `"none"`):
            What an answer tells beside itself: risks and events, or only whether it was changed, or nothing. Risks of
            each token help whoever wants to get past the head.
    """

    def __init__(self, inner: Any, engine: GuardedAsyncLLM, reports: Reports = "full"):
        self._inner = inner
        self._engine = engine
        self._reports = reports

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Answers `/v1/chat/completions`."""
        return await self._create(self._inner.create_chat_completion, request, raw_request)

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        """Answers `/v1/completions`."""
        return await self._create(self._inner.create_completion, request, raw_request)

    async def _create(self, create: Callable[..., Awaitable[Any]], request: Any, raw_request: Any) -> Any:
        given = {name: getattr(request, name) for name in request.model_fields_set} | (request.model_extra or {})
        call = Call(check_parameters(given, self._engine.risk_threshold))
        CALL.set(call)
        try:
            response = await create(request, raw_request)
        except EngineDeadError:
            return self._inner.create_error_response(DEAD, "ServiceUnavailable", HTTPStatus.SERVICE_UNAVAILABLE)
        if isinstance(response, ErrorResponse):
            return response
        if isinstance(response, AsyncGenerator):
            return self._annotate(response, call)
        for choice in response.choices:
            if told := self._told(call, choice.index):
                setattr(choice, EXTENSION, told)  # their models take more fields than they know
        return response

    async def _annotate(self, events: AsyncGenerator[str, None], call: Call) -> AsyncGenerator[str, None]:
        """Adds what is told to the last event of each choice."""
        async with aclosing(events):
            async for event in events:
                # in JSON, quotes inside of a text are escaped: this finds the field only
                yield self._annotated(event, call) if '"finish_reason":"' in event else event

    def _annotated(self, event: str, call: Call) -> str:
        values = json.loads(event.removeprefix("data: "))
        for choice in values["choices"]:
            if told := self._told(call, choice["index"]):
                choice[EXTENSION] = told
        return f"data: {json.dumps(values, separators=(',', ':'))}\n\n"

    def _told(self, call: Call, index: int) -> Mapping[str, Any] | None:
        result = call.results.get(index)
        if result is None or self._reports == "none":
            return None
        return report(result, call.risk_threshold, self._reports)
