"""The ways of running a model that others' programs have: lm-evaluation-harness, a server, and its clients.

Nothing here knows of safespec-hf; see `surfaces`.
"""

import asyncio
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from asked import NUM_TOKENS, PROMPTS, SECONDS, messages

_servers: list[Any] = []


def evaluation_harness(folder: Path) -> list[str]:
    """`lm_eval --model hf`, a task of its own over JSON lines, in a process that has never heard of us."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        rows = [json.dumps({"question": prompt}) for prompt in PROMPTS]
        (place / "garden.jsonl").write_text("\n".join(rows) + "\n")
        task = {
            "task": "garden",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(place / "garden.jsonl")}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "",
            "generation_kwargs": {"until": ["\x00"], "max_gen_toks": NUM_TOKENS, "do_sample": False},
            "metric_list": [{"metric": "bypass"}],
        }
        (place / "garden.yaml").write_text(json.dumps(task))
        model = f"pretrained={folder},trust_remote_code=True,dtype=float32"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "garden"]
        command += ["--include_path", name, "--output_path", str(place / "out"), "--log_samples", "--device", "cpu"]
        command += ["--batch_size", "2"]
        call(command, name)
        samples = next((place / "out").rglob("samples_*.jsonl")).read_text().splitlines()
        return [json.loads(line)["resps"][0][0] for line in samples]


def call(command: list[str], folder: str, stdin: str = "", offline: bool = True) -> str:
    """The output of a program that asks no Hub; one that talks to our server can't be told that there is none."""
    environment = {**os.environ, "HF_HOME": folder, "HF_DATASETS_CACHE": folder, "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[2]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@functools.lru_cache(maxsize=8)
def serve(folder: Path, continuous_batching: bool = False) -> str:
    """Starts what `transformers serve` starts, on the loopback, until [`stop_servers`]; gives its address."""
    from transformers.cli.serve import Serve

    class ClosedServe(Serve):
        """Closes its event loop when it ends; that of transformers leaves it to the garbage collector."""

        def start_server(self) -> None:
            self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
            self._thread.start()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ClosedServe(
        str(folder),
        continuous_batching=continuous_batching,
        trust_remote_code=True,
        host="127.0.0.1",
        port=port,
        device="cpu",
        dtype="float32",
        non_blocking=True,
    )
    _servers.append(server)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    while not is_up(address):
        if time.monotonic() > deadline:
            raise RuntimeError("the server did not come up")
        time.sleep(0.1)
    return address


def stop_servers() -> None:
    """Ends all servers; without it, the process would not end."""
    while _servers:
        server = _servers.pop()
        server.kill_server()
        server._thread.join(SECONDS)  # it waits for two seconds only, in which a busy machine may not get round to it
    serve.cache_clear()


def is_up(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=2):
            return True
    except HTTPError as error:
        error.close()
        return False
    except (URLError, OSError):
        return False


def post(address: str, body: dict[str, Any]) -> str:
    """The body of the reply, whatever its status."""
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=SECONDS) as reply:
            return reply.read().decode()
    except HTTPError as error:
        with error:
            return f"HTTP {error.code}: {error.read().decode()}"


def events(reply: str) -> list[dict[str, Any]]:
    """The events of a streamed reply."""
    lines = [line.removeprefix("data: ") for line in reply.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def served_chat(folder: Path) -> list[str]:
    address = serve(folder)
    return [
        json.loads(post(f"{address}/v1/chat/completions", chat_body(folder, prompt)))["choices"][0]["message"][
            "content"
        ]
        for prompt in PROMPTS
    ]


def chat_body(folder: Path, prompt: str, **more: Any) -> dict[str, Any]:
    asked = {"model": str(folder), "messages": messages(prompt), "max_tokens": NUM_TOKENS, "temperature": 0}
    return asked | more


def served_stream(folder: Path) -> list[str]:
    texts = []
    address = serve(folder)
    for prompt in PROMPTS:
        reply = post(f"{address}/v1/chat/completions", chat_body(folder, prompt, stream=True))
        deltas = [choice["delta"] for choice in choices(reply)]
        texts.append("".join(delta.get("content") or "" for delta in deltas))
    return texts


def served_to_the_openai_client(folder: Path) -> list[str]:
    from openai import OpenAI

    address = serve(folder)
    texts = []
    with OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        for prompt in PROMPTS:
            with client.chat.completions.create(**chat_body(folder, prompt, stream=True)) as stream:
                texts.append("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))
    return texts


def served_completions(folder: Path) -> list[str]:
    address = serve(folder)
    body = {"model": str(folder), "max_tokens": NUM_TOKENS, "temperature": 0}
    replies = [post(f"{address}/v1/completions", {**body, "prompt": prompt}) for prompt in PROMPTS]
    return [json.loads(reply)["choices"][0]["text"] for reply in replies]


def served_responses(folder: Path) -> list[str]:
    address = serve(folder)
    body = {"model": str(folder), "max_output_tokens": NUM_TOKENS, "temperature": 0, "stream": True}
    replies = [post(f"{address}/v1/responses", {**body, "input": messages(prompt)}) for prompt in PROMPTS]
    kinds = "response.output_text.delta"
    return ["".join(event["delta"] for event in events(reply) if event["type"] == kinds) for reply in replies]


def chat_command(folder: Path) -> list[str]:
    """`transformers chat`, in which somebody types, and saves what was said: beside a model that has a path."""
    texts, address = [], serve(folder)
    for prompt in PROMPTS:
        command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), f"{address}/v1"]
        command += [f"max_new_tokens={NUM_TOKENS}", "do_sample=False"]
        # an answer that is cut short is followed by a question, which the first of these declines
        call(command, tempfile.gettempdir(), stdin=f"{prompt}\n!save\n!save\n!exit\n", offline=False)
        saved = sorted(folder.glob("chat_*.json"))
        texts.append(json.loads(saved[-1].read_text())["chat_history"][-1]["content"])
        for file in saved:
            file.unlink()
    return texts


def served_continuously(folder: Path) -> str:
    address = serve(folder, continuous_batching=True)
    reply = post(f"{address}/v1/chat/completions", chat_body(folder, PROMPTS[0]))
    if reply.startswith("HTTP 500"):
        raise ValueError(reply)
    return reply


def served_with_a_policy_of_the_client(folder: Path) -> str:
    """A client that sends a generation config of its own, with another threshold in it."""
    settings = json.dumps({"max_new_tokens": NUM_TOKENS, "safespec": {"risk_threshold": 1.0}})
    address = serve(folder)
    reply = post(
        f"{address}/v1/chat/completions", chat_body(folder, PROMPTS[0], stream=True, generation_config=settings)
    )
    if '"error"' in reply and not any(choice["delta"].get("content") for choice in choices(reply)):
        raise ValueError(next(event["error"] for event in events(reply) if "error" in event))
    return reply


def choices(reply: str) -> list[dict[str, Any]]:
    return [choice for event in events(reply) for choice in event.get("choices", [])]
