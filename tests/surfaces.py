"""The ways in which others' code runs a model: each answers the same prompts, given the folder of an exported one.

Nothing here knows of safespec-hf. A surface is a function from a folder to texts, one for each of [`PROMPTS`].
"""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

PROMPTS = ["Name two flowers that bloom in spring.", "Why does the sea have tides?"]
NUM_TOKENS = 12
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
# float32, or rounding in blocks of another shape could change a token
LOAD: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
SECONDS = 240


class Surface(NamedTuple):
    """Attributes: `run`, from a folder to texts; `is_chat`, whether prompts are messages; `needs`, what it imports."""

    run: Callable[[Path], Any]
    is_chat: bool = True
    needs: tuple[str, ...] = ()


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


@functools.lru_cache(maxsize=8)
def load(folder: Path, device_map: str | None = None) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, **LOAD, device_map=device_map)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=True, padding_side="left")


@functools.lru_cache(maxsize=8)
def load_pipeline(folder: Path) -> Any:
    write = pipeline("text-generation", str(folder), **LOAD)
    write.tokenizer.padding_side = "left"
    return write


def encode(tokenizer: Any, prompts: list[str]) -> Any:
    texts = [
        tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, tokenize=False) for text in prompts
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)


def answer(model: Any, tokenizer: Any, prompts: list[str] = PROMPTS, **kwargs: Any) -> list[str]:
    """What a model says to chats, one after the other."""
    texts = []
    for prompt in prompts:
        inputs = encode(tokenizer, [prompt])
        sequences = model.generate(**inputs, **GREEDY, **kwargs)
        texts.append(tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def expected(folder: Path, is_chat: bool) -> list[str]:
    """What the target says alone, without any of our code."""
    model = AutoModelForCausalLM.from_pretrained(folder, subfolder="target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if is_chat:
        return answer(model, tokenizer)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        texts.append(tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def loaded_by_an_auto_class(folder: Path) -> list[str]:
    return answer(*load(folder))


def rows_of_a_batch(folder: Path) -> list[str]:
    model, tokenizer = load(folder)
    inputs = encode(tokenizer, PROMPTS)
    sequences = model.generate(**inputs, **GREEDY)
    return tokenizer.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def custom_generate(folder: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder, subfolder="target", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return answer(model, tokenizer, custom_generate=str(folder), trust_remote_code=True)


def placed_by_accelerate(folder: Path) -> list[str]:
    return answer(*load(folder, device_map="auto"))


def text_pipeline(folder: Path) -> list[str]:
    write = load_pipeline(folder)
    return [write(prompt, **GREEDY, return_full_text=False)[0]["generated_text"] for prompt in PROMPTS]


def full_text_pipeline(folder: Path) -> list[str]:
    write = load_pipeline(folder)
    return [write(prompt, **GREEDY)[0]["generated_text"].removeprefix(prompt) for prompt in PROMPTS]


def chat_pipeline(folder: Path) -> list[str]:
    write = load_pipeline(folder)
    return [write(messages(prompt), **GREEDY)[0]["generated_text"][-1]["content"] for prompt in PROMPTS]


def batched_pipeline(folder: Path) -> list[str]:
    write = load_pipeline(folder)
    found = write([messages(prompt) for prompt in PROMPTS], batch_size=2, **GREEDY)
    return [row[0]["generated_text"][-1]["content"] for row in found]


def streaming_pipeline(folder: Path) -> list[str]:
    write, texts = load_pipeline(folder), []
    for prompt in PROMPTS:
        streamer = TextIteratorStreamer(write.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS)
        thread = threading.Thread(target=write, args=(messages(prompt),), kwargs={**GREEDY, "streamer": streamer})
        thread.start()
        texts.append("".join(streamer))
        thread.join()
    return texts


def printing_streamer(folder: Path) -> list[str]:
    model, tokenizer = load(folder)
    texts: list[str] = []

    class Printed(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            parts.append(text)

    for prompt in PROMPTS:
        parts: list[str] = []
        answer(model, tokenizer, [prompt], streamer=Printed(tokenizer, skip_prompt=True, skip_special_tokens=True))
        texts.append("".join(parts))
    return texts


def user_interface_threads(folder: Path) -> list[str]:
    """As a web interface does: each visitor has a thread, all have one model, and each sees text as it comes."""
    model, tokenizer = load(folder)
    texts = [""] * len(PROMPTS)

    def visit(index: int) -> None:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS)
        inputs = encode(tokenizer, [PROMPTS[index]])
        worker = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
        worker.start()
        for text in streamer:
            texts[index] += text
        worker.join()

    visitors = [threading.Thread(target=visit, args=(index,)) for index in range(len(PROMPTS))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    return texts


def turns_with_a_cache(folder: Path) -> list[str]:
    """A conversation that goes on with the cache of its last turn. Returned are the first turns."""
    model, tokenizer = load(folder)
    texts = []
    for prompt in PROMPTS:
        cache, chat = DynamicCache(config=model.config), messages(prompt)
        for _ in range(2):
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            sequences = model.generate(**inputs, **GREEDY, cache=cache)
            said = tokenizer.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            chat += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
        assert cache.get_seq_length() > 0
        texts.append(chat[1]["content"])
    return texts


def mapped_data_set(folder: Path) -> list[str]:
    from datasets import Dataset

    model, tokenizer = load(folder)
    rows = Dataset.from_dict({"prompt": PROMPTS})
    return rows.map(lambda row: {"answer": answer(model, tokenizer, [row["prompt"]])[0]})["answer"][:]


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


def call(command: list[str], folder: str, stdin: str = "") -> str:
    """The output of a program that can reach no network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": folder, "HF_DATASETS_CACHE": folder}
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[2]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@functools.lru_cache(maxsize=8)
def serve(folder: Path, *options: str) -> str:
    """Starts `transformers serve` on the loopback, until this process ends; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", *options]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        atexit.register(server.kill)
        deadline = time.monotonic() + SECONDS
        while not is_up(address):
            if server.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise RuntimeError(f"transformers serve did not come up: {log.read()[-2000:]}")
            time.sleep(0.2)
    return address


def is_up(address: str) -> bool:
    try:
        with urlopen(f"{address}/health", timeout=2):
            return True
    except (URLError, OSError):
        return False


def post(address: str, body: dict[str, Any]) -> str:
    """The body of the reply, whatever its status."""
    request = Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=SECONDS) as reply:
            return reply.read().decode()
    except HTTPError as error:
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
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    texts = []
    for prompt in PROMPTS:
        stream = client.chat.completions.create(**chat_body(folder, prompt, stream=True))
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
    """`transformers chat`, in which somebody types; of what it draws, the answer is what follows our prompt."""
    texts = []
    address = serve(folder)
    for prompt in PROMPTS:
        command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), f"{address}/v1"]
        settings = [f"max_new_tokens={NUM_TOKENS}", "do_sample=False", "temperature=0"]
        texts.append(call([*command, *settings], tempfile.gettempdir(), stdin=f"{prompt}\n!exit\n"))
    return texts


SERVING = ("fastapi", "uvicorn", "openai", "pydantic")
SURFACES = {
    "`AutoModelForCausalLM.from_pretrained`": Surface(loaded_by_an_auto_class),
    "a padded batch": Surface(rows_of_a_batch),
    '`generate(custom_generate="...")`': Surface(custom_generate),
    '`device_map="auto"` (accelerate)': Surface(placed_by_accelerate),
    '`pipeline("text-generation")`, text': Surface(text_pipeline, is_chat=False),
    "the same, full text": Surface(full_text_pipeline, is_chat=False),
    "the same, messages": Surface(chat_pipeline),
    "the same, messages in batches": Surface(batched_pipeline),
    "the same, streamed": Surface(streaming_pipeline),
    "`TextStreamer`": Surface(printing_streamer),
    "threads with one model, each streamed, as in gradio": Surface(user_interface_threads),
    "turns that go on with a `cache`": Surface(turns_with_a_cache),
    "`datasets.map`": Surface(mapped_data_set, needs=("datasets",)),
    "`lm_eval --model hf`, `generate_until`": Surface(
        evaluation_harness, is_chat=False, needs=("lm_eval", "datasets")
    ),
    "`transformers serve`, `/v1/chat/completions`": Surface(served_chat, needs=SERVING),
    "the same, streamed to us": Surface(served_stream, needs=SERVING),
    "the same, streamed to the client of OpenAI": Surface(served_to_the_openai_client, needs=SERVING),
    "`transformers serve`, `/v1/completions`": Surface(served_completions, is_chat=False, needs=SERVING),
    "`transformers serve`, `/v1/responses`, streamed": Surface(served_responses, needs=SERVING),
    "`transformers chat`": Surface(chat_command, needs=(*SERVING, "rich")),
}


def refused(call_model: Callable[[], Any]) -> str:
    """Why a way of running a model is refused.

    Raises:
        AssertionError: If it is not.
    """
    try:
        found = call_model()
    except (ImportError, OSError, ValueError) as error:
        return str(error)
    raise AssertionError(f"It was not refused, and gave {found!r}.")


def ask(folder: Path, **kwargs: Any) -> list[str]:
    model, tokenizer = load(folder)
    return answer(model, tokenizer, **kwargs)


def batched_continuously(folder: Path) -> Any:
    model, tokenizer = load(folder)
    return model.generate_batch([tokenizer(prompt)["input_ids"] for prompt in PROMPTS])


def served_continuously(folder: Path) -> str:
    address = serve(folder, "--continuous-batching")
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


REFUSED: dict[str, Surface] = {
    "loaded without `trust_remote_code=True`": Surface(
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    ),
    "loaded by the class of the target": Surface(
        lambda folder: LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ),
    "`pipeline` without `trust_remote_code=True`": Surface(
        lambda folder: pipeline("text-generation", str(folder), trust_remote_code=False)
    ),
    "`generate(num_beams=2)`": Surface(lambda folder: ask(folder, num_beams=2)),
    "`generate(safespec=False)`": Surface(lambda folder: ask(folder, safespec=False)),
    "`generate_batch` (continuous batching)": Surface(batched_continuously),
    "`transformers serve --continuous-batching`": Surface(served_continuously, needs=SERVING),
    "`transformers serve`, a policy sent by the client": Surface(served_with_a_policy_of_the_client, needs=SERVING),
}


def close_the_garden(folder: Path, closed: Path, refusal: str) -> Path:
    """A copy of an export in which every token is flagged, and every answer therefore a refusal."""
    shutil.copytree(folder, closed, copy_function=os.link)
    config = json.loads((closed / "config.json").read_text())
    config["safespec"]["policy"] |= {"policy": "refuse", "risk_threshold": 1e-9, "refusal": refusal}
    (closed / "config.json").unlink()  # a link, which would be written through
    (closed / "config.json").write_text(json.dumps(config))
    return closed
