"""The ways in which others' code runs a model: each answers the same prompts, given the folder of an exported one.

Nothing here knows of safespec-hf. A surface is a function from a folder to texts, one for each of [`PROMPTS`].
"""

import functools
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from asked import GREEDY, LOAD, PROMPTS, SECONDS, messages
from served import (
    chat_command,
    evaluation_harness,
    served_chat,
    served_completions,
    served_continuously,
    served_responses,
    served_stream,
    served_to_the_openai_client,
    served_with_a_policy_of_the_client,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

CACHE_NAME = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


class Surface(NamedTuple):
    """Attributes: `run`, from a folder to texts; `is_chat`, whether prompts are messages; `needs`, what it imports."""

    run: Callable[[Path], Any]
    is_chat: bool = True
    needs: tuple[str, ...] = ()


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
            sequences = model.generate(**inputs, **GREEDY, **{CACHE_NAME: cache})
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
