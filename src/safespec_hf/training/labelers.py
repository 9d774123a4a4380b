"""Labels from a guard model: Qwen3Guard-Gen, Llama Guard, or any text classifier.

The formats are those of the models' cards. They are tested on recorded outputs; the models themselves were not run
here, since their weights can't be had on the machine this was written on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import SafeSpecError
from .collect import Labeler
from .data import Example

UNSAFE_NAMES = frozenset({"unsafe", "harmful", "toxic", "jailbreak", "injection", "label_1", "1"})


def parse_qwen3guard(text: str) -> int | None:
    """The label in an output of Qwen3Guard-Gen; `None` for "Controversial" and for anything else.

    Example:

        >>> parse_qwen3guard("Safety: Safe\\nCategories: None\\nRefusal: No")
        0
    """
    found = re.search(r"Safety:\s*(Safe|Unsafe)\b", text)
    return {"Safe": 0, "Unsafe": 1}[found[1]] if found else None


def parse_llama_guard(text: str) -> int | None:
    """The label in an output of Llama Guard 1 to 4, "safe" or "unsafe" and then categories; `None` for anything else.

    Example:

        >>> parse_llama_guard("\\n\\nunsafe\\nS2")
        1
    """
    first = text.strip().partition("\n")[0].strip().lower()
    return {"safe": 0, "unsafe": 1}.get(first)


def find_unsafe_class(id2label: dict[int, str]) -> int:
    """The class of a text classifier that means unsafe.

    Raises:
        SafeSpecError: If not exactly one class has a name that says so.

    Example:

        >>> find_unsafe_class({0: "SAFE", 1: "UNSAFE"})
        1
    """
    found = [index for index, name in id2label.items() if name.lower() in UNSAFE_NAMES]
    if len(found) != 1:
        raise SafeSpecError(
            f"Exactly one class of a labeler must be named one of {sorted(UNSAFE_NAMES)}, but its classes are "
            f"{list(id2label.values())}."
        )
    return found[0]


def load_labeler(model_id: str, *, device: torch.device | str | None = None) -> Labeler:
    """Loads a guard model by its id; what it is, is told by the id (`qwen3guard`, `llama-guard`), else a classifier.

    Args:
        model_id (`str`): On the Hub, or a folder.
        device (`torch.device` or `str`, *optional*): Where to put it.

    Returns:
        `Callable[[Sequence[Example]], list[int | None]]`: Labels answered examples; `None` where the guard abstains.
    """
    name = model_id.lower()
    tokenizer = AutoTokenizer.from_pretrained(model_id, padding_side="left")
    if "qwen3guard" in name or "llama-guard" in name:
        guard = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto", device_map=device).eval()
        parse = parse_qwen3guard if "qwen3guard" in name else parse_llama_guard
        return lambda examples: [parse(_ask(guard, tokenizer, example)) for example in tqdm(examples, desc=model_id)]
    classifier = AutoModelForSequenceClassification.from_pretrained(model_id, device_map=device).eval()
    unsafe_class = find_unsafe_class(classifier.config.id2label)
    return lambda examples: _classify(classifier, tokenizer, examples, unsafe_class)


@torch.inference_mode()
def _ask(guard: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    # both guards' chat templates turn a conversation that ends with the assistant into a moderation prompt
    conversation = [*example.messages, {"role": "assistant", "content": example.response}]
    inputs: Any = tokenizer.apply_chat_template(conversation, return_tensors="pt", return_dict=True)
    generate: Any = guard.generate
    tokens = generate(**inputs.to(guard.device), max_new_tokens=64, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@torch.inference_mode()
def _classify(
    classifier: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], unsafe_class: int
) -> list[int | None]:
    texts = [example.response for example in examples]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(classifier.device)
    return [int(choice == unsafe_class) for choice in classifier(**inputs).logits.argmax(-1).tolist()]
