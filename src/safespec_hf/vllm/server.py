"""An endpoint like OpenAI's before a guarded engine: `safespec serve`. Parsing, templates and HTTP are vLLM's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields

import uvloop
from fastapi import FastAPI
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from ..config import SafeSpecConfig
from ..errors import UnsupportedRequestError
from .guard import Guard
from .metrics import Metrics
from .reports import Reports
from .routes import GuardedServing, keep_guarded_routes
from .runner import check_config
from .serving import GuardedAsyncLLM

logger = logging.getLogger(__name__)
WATCH_SECONDS = 5.0
"""How often the metrics are brought up to what workers count."""
REFUSED = {
    "headless": "it starts engines that no guarded server is in front of",
    "grpc": "only HTTP is guarded",
    "config": "give options on the command line, where they are checked",
    "revision": "the head is checked against the files of the folder or id; give a folder of that revision",
    "tokenizer_revision": "as revision",
    "hf_overrides": "the head is checked against the target's own config",
    "hf_config_path": "the head is checked against the target's own config",
    "enable_auto_tool_choice": "calls of tools are not guarded",
    "lora_modules": "the head knows the target without adapters",
    "middleware": "it stands before the guard, and sees and changes everything",
}
"""Options of vLLM's server that are refused; those of its engine are in [`Guard.engine_args`]."""


def serve(target: str, head: str, policy: SafeSpecConfig, arguments: Sequence[str], reports: Reports = "full") -> None:
    """Serves until it is stopped.

    Args:
        target (`str`): Folder or Hub id of the target.
        head (`str`): Folder or Hub id of a head that was trained for it.
        policy ([`SafeSpecConfig`]): What follows a flag; one that guards, as [`read_policy`] gives it.
        arguments (`Sequence[str]`): Options of vLLM's own server.
        reports (`"full"`, `"outcome"` or `"none"`): See [`GuardedServing`].

    Raises:
        SafeSpecError: If something is asked for that can't be guarded; nothing has been loaded by then.
    """
    cli_env_setup()
    args = read_arguments(target, arguments)
    # vLLM's "auto" is -1: then it is what the target was made for
    longest = args.max_model_len if (args.max_model_len or 0) > 0 else None
    guard = Guard.load(target, head, tokenizer=args.tokenizer, policy=policy, max_model_len=longest)
    engine_args = guarded_args(guard, args)
    uvloop.run(_serve(guard, args, engine_args, reports))


def read_arguments(target: str, arguments: Sequence[str]) -> Namespace:
    """vLLM's options, read by its own parser.

    Raises:
        UnsupportedRequestError: Names an option under which nothing can be promised.
    """
    parser = make_arg_parser(FlexibleArgumentParser(prog="safespec serve TARGET --head HEAD"))
    args = parser.parse_args([target, *arguments])
    args.model = target
    defaults = parser.parse_args([target])
    for name, why in REFUSED.items():
        if getattr(args, name, None) != getattr(defaults, name, None):
            raise UnsupportedRequestError(f"`--{name.replace('_', '-')}` is refused: {why}.")
    if args.api_server_count not in (None, 1):
        raise UnsupportedRequestError(
            "`--api-server-count` must be 1: several servers before an engine were not tried."
        )
    validate_parsed_serve_args(args)
    return args


def guarded_args(guard: Guard, args: Namespace) -> AsyncEngineArgs:
    """The engine's arguments, with the guard's among them.

    Raises:
        UnsupportedRequestError: Names an option under which nothing can be promised.
    """
    read, defaults = AsyncEngineArgs.from_cli_args(args), AsyncEngineArgs(model=args.model)
    values = {option.name: getattr(read, option.name) for option in fields(read) if option.init}
    given = {name: value for name, value in values.items() if value != getattr(defaults, name)}
    return AsyncEngineArgs(**guard.engine_args(**given))


@contextlib.asynccontextmanager
async def guarded_engine(
    guard: Guard, engine_args: AsyncEngineArgs, metrics: Metrics
) -> AsyncIterator[GuardedAsyncLLM]:
    """A guarded engine, ended with the context."""
    context = UsageContext.OPENAI_API_SERVER
    config = engine_args.create_engine_config(usage_context=context)
    check_config(config)  # the worker does it, too, but that would be after it was started
    engine = GuardedAsyncLLM.from_vllm_config(
        vllm_config=config,
        usage_context=context,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    assert isinstance(engine, GuardedAsyncLLM)
    try:
        engine.protect(guard, metrics)
        watch = asyncio.create_task(engine.watch_workers(WATCH_SECONDS))
        watch.add_done_callback(_tell_why)
        yield engine
        watch.cancel()
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)


def _tell_why(watch: asyncio.Task[None]) -> None:
    if not watch.cancelled() and (error := watch.exception()) is not None:
        logger.error("The workers' counts are no longer shown at /metrics: %r", error)


async def guarded_app(engine: GuardedAsyncLLM, args: Namespace, reports: Reports) -> FastAPI:
    """vLLM's application, of which only guarded routes are left."""
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    keep_guarded_routes(app)
    app.state.openai_serving_chat = GuardedServing(app.state.openai_serving_chat, engine, reports)
    app.state.openai_serving_completion = GuardedServing(app.state.openai_serving_completion, engine, reports)
    return app


async def _serve(guard: Guard, args: Namespace, engine_args: AsyncEngineArgs, reports: Reports) -> None:
    _, sock = setup_server(args, reuse_port=False)
    try:
        async with guarded_engine(guard, engine_args, Metrics()) as engine:
            shutdown = await serve_http(
                await guarded_app(engine, args, reports),
                sock=sock,
                enable_ssl_refresh=args.enable_ssl_refresh,
                host=args.host,
                port=args.port,
                log_level=args.uvicorn_log_level,
                access_log=not args.disable_uvicorn_access_log,
                timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
                ssl_keyfile=args.ssl_keyfile,
                ssl_certfile=args.ssl_certfile,
                ssl_ca_certs=args.ssl_ca_certs,
                ssl_cert_reqs=args.ssl_cert_reqs,
                ssl_ciphers=args.ssl_ciphers,
                h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
                h11_max_header_count=args.h11_max_header_count,
            )
        await shutdown
    finally:
        sock.close()
