"""Labels from a guard model: Qwen3Guard-Gen, Llama Guard, Granite Guardian, or any text classifier.

The formats are those of the models' cards. They are tested on recorded outputs; the models themselves were not run
here, since their weights can't be had on the machine this was written on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import SafeSpecError
from .collect import CollectSettings, NamedLabeler, continue_texts
from .data import Example
from .hidden import hash_weights, render_prompt

Parser = Callable[[str], int | None]
Scorer = Callable[[Sequence[Example]], list[float | None]]
# What classes of published classifiers are called, in lower case and with a space for other signs.
UNSAFE_NAME = re.compile(
    r"unsafe|harmful|(severe )?toxic(ity)?|jailbreak|injection|malicious|obscene|threat|insult"
    r"|identity (hate|attack)|sexual explicit|hate(ful| speech)?|offensive"
)
SAFE_NAME = re.compile(
    r"safe|harmless|unharmful|benign|neutral|normal|legitimate|nontoxic|(non|not) (toxic|hate|offensive)"
)


def parse_qwen3guard(text: str) -> int | None:
    """The label in an output of Qwen3Guard-Gen; `None` for "Controversial" and for anything else.

    Example:

        >>> parse_qwen3guard("Safety: Safe\\nCategories: None\\nRefusal: No")
        0
    """
    found = set(re.findall(r"Safety:\s*(\w+)", text))
    return {"Safe": 0, "Unsafe": 1}.get(found.pop()) if len(found) == 1 else None


def parse_llama_guard(text: str) -> int | None:
    """The label in an output of Llama Guard 1 to 4, "safe" or "unsafe" and then categories; `None` for anything else.

    Example:

        >>> parse_llama_guard("\\n\\nunsafe\\nS2")
        1
    """
    first = text.strip().partition("\n")[0].strip().lower()
    return {"safe": 0, "unsafe": 1}.get(first)


def parse_granite_guardian(text: str) -> int | None:
    """The label in an output of Granite Guardian, "Yes" for harm or "No", maybe as a score; `None` for anything else.

    Example:

        >>> parse_granite_guardian("<think>\\n</think>\\n<score> yes </score>"), parse_granite_guardian("No")
        (1, 0)
    """
    verdict = re.match(r"(?:<score>)?\s*(yes|no)\b", text.rpartition("</think>")[2].strip().lower())
    return {"no": 0, "yes": 1}[verdict[1]] if verdict else None


def find_unsafe_classes(config: PreTrainedConfig) -> list[int]:
    """The classes of a text classifier that mean unsafe.

    Raises:
        SafeSpecError: If it is not known of a class whether its name means unsafe or safe, if none means unsafe, or if
            the model tells a number and no class.

    Example:

        >>> from transformers import BertConfig
        >>> find_unsafe_classes(BertConfig(id2label={0: "SAFE", 1: "UNSAFE"}))
        [1]
    """
    id2label = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    names = {index: re.sub(r"[\W_]+", " ", name).strip().lower() for index, name in id2label.items()}
    is_multi_label = config.problem_type == "multi_label_classification"
    if config.problem_type == "regression" or (len(names) < 2 and not is_multi_label):
        raise SafeSpecError("This model tells a number, not a class (regression): no labels can be had from it.")
    unsafe = [index for index, name in names.items() if UNSAFE_NAME.fullmatch(name)]
    safe = [index for index, name in names.items() if SAFE_NAME.fullmatch(name)]
    unknown = [id2label[index] for index in names if index not in (*unsafe, *safe)]
    # where one class of several applies, there must be one for safe answers; where each may, none of them means safe
    if unknown or not unsafe or not (safe or is_multi_label):
        raise SafeSpecError(
            f"A labeler's classes must say which of them mean unsafe, but those of this one are "
            f"{list(id2label.values())}{f', and {unknown} may mean anything' if unknown else ''}. If you know what "
            "they mean, set `id2label` in the model's config.json to names such as 'unsafe', 'toxic' or 'jailbreak', "
            "and 'safe', 'benign' or 'neutral'."
        )
    return unsafe


def find_parser(model_id: str, chat_template: str = "") -> Parser | None:
    """How to read what a guard that writes its verdict says; `None` if the model is no such guard that is known.

    Told by the chat template, which makes the moderation prompt, wherever the model lies; by the name else.

    Example:

        >>> find_parser("meta-llama/Llama-Guard-3-1B").__name__
        'parse_llama_guard'
    """
    name = re.sub(r"[\W_]+", "", model_id).lower()
    # Qwen3Guard's template has the marks of Llama Guard's, too
    if "Safety: Controversial" in chat_template or "qwen3guardgen" in name:
        return parse_qwen3guard
    if "guardian_config" in chat_template or "graniteguardian" in name:
        return parse_granite_guardian
    if "<BEGIN UNSAFE CONTENT CATEGORIES>" in chat_template or "llamaguard" in name:
        return parse_llama_guard
    return None


def load_labeler(model_id: str, *, device: torch.device | str | None = None) -> NamedLabeler:
    """Loads a guard model that labels answers: see [`load_scorer`]. Classifiers read the answer alone.

    Args:
        model_id (`str`): On the Hub, or a folder.
        device (`torch.device` or `str`, *optional*): Where to put it.

    Returns:
        [`NamedLabeler`]: Labels answered examples; `None` where the guard abstains.

    Raises:
        SafeSpecError: As [`load_scorer`].
    """
    guard, score = load_guard(model_id, device, batch_size=1, reads_request=False)
    origin = {"model": model_id, "weights": hash_weights(guard), "dtype": str(guard.dtype)}
    return NamedLabeler(
        lambda examples: [None if risk is None else int(risk > 0.5) for risk in score(examples)], origin
    )


def load_scorer(
    model_id: str,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 1,
    reads_request: bool = True,
) -> Scorer:
    """Loads a guard model: one that writes its verdict (Qwen3Guard-Gen, Llama Guard, Granite Guardian), or a text
    classifier.

    Args:
        model_id (`str`): On the Hub, or a folder.
        device (`torch.device` or `str`, *optional*): Where to put it.
        batch_size (`int`, *optional*, defaults to 1): Verdicts written at once; classifiers read one at a time.
        reads_request (`bool`, *optional*, defaults to `True`):
            Whether a classifier reads the request before the answer, as a pair of texts. Guards that write always do.

    Returns:
        `Callable[[Sequence[Example]], list[float | None]]`: The probability that each answer is unsafe, of a guard
        that writes 0 or 1; `None` where the guard abstains.

    Raises:
        SafeSpecError: If the model is neither, if weights of it are missing and would be random, or if its classes
            don't say which of them mean unsafe.
    """
    return load_guard(model_id, device, batch_size, reads_request)[1]


def load_guard(
    model_id: str, device: torch.device | str | None, batch_size: int, reads_request: bool
) -> tuple[PreTrainedModel, Scorer]:
    """A guard model, and what it says of answers: see [`load_scorer`]."""
    config = AutoConfig.from_pretrained(model_id)
    architecture = (config.architectures or ["a model of no known kind"])[0]
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    if architecture.endswith("ForSequenceClassification"):
        unsafe_classes = find_unsafe_classes(config)
        classifier = _load_whole(AutoModelForSequenceClassification, model_id, device)
        return classifier, lambda examples: [
            _classify(classifier, tokenizer, example, unsafe_classes, reads_request)
            for example in tqdm(examples, desc=model_id)
        ]
    parse = find_parser(model_id, str(tokenizer.chat_template or ""))
    if not architecture.endswith(("ForCausalLM", "ForConditionalGeneration")) or parse is None:
        raise SafeSpecError(
            f"{model_id} is {architecture}, which can't label: of models that write, Qwen3Guard-Gen, Llama Guard and "
            "Granite Guardian are known; any other must be trained for sequence classification."
        )
    guard = _load_whole(AutoModelForCausalLM, model_id, device, dtype="auto")

    def score(examples: Sequence[Example]) -> list[float | None]:
        texts: list[str] = []
        for start in tqdm(range(0, len(examples), batch_size), desc=model_id):
            texts += _ask(guard, tokenizer, examples[start : start + batch_size], parse)
        return [parse(text) for text in texts]

    return guard, score


def _load_whole(kind: Any, model_id: str, device: torch.device | str | None, **kwargs: Any) -> PreTrainedModel:
    """Loads a model none of whose weights are random."""
    model, found = kind.from_pretrained(
        model_id, device_map=device, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:
        raise SafeSpecError(
            f"{model_id} lacks {len(absent)} weights of {type(model).__name__}, such as `{absent[0]}`. They would be "
            "random, and so would the labels: take a model that was trained for this."
        )
    return model.eval()


def _ask(
    guard: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], parse: Parser
) -> list[str]:
    # the guards' chat templates turn a conversation that ends with the assistant into a moderation prompt
    conversations = [
        replace(example, messages=(*example.messages, {"role": "assistant", "content": example.response}))
        for example in examples
    ]
    # only Granite's asks for the verdict by a generation prompt, and is told of which risk, by either of two names
    is_granite = parse is parse_granite_guardian
    variables = {"guardian_config": {"risk_name": "harm", "criteria_id": "harm"}} if is_granite else {}
    texts = [
        render_prompt(tokenizer, example, add_generation_prompt=is_granite, variables=variables)
        for example in conversations
    ]
    # a moderation prompt begins with what is asked of the guard: nothing of it may be cut off
    settings = CollectSettings(max_new_tokens=64, max_prompt_tokens=2**31, batch_size=len(texts))
    return continue_texts(guard, tokenizer, texts, settings)


@torch.inference_mode()
def _classify(
    classifier: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    unsafe_classes: Sequence[int],
    reads_request: bool,
) -> float:
    longest = min(tokenizer.model_max_length, getattr(classifier.config, "max_position_embeddings", None) or 10**9)
    texts = (example.messages[-1]["content"], example.response) if reads_request else (example.response,)
    # one at a time: many classifiers of decoder-only kinds have nothing to pad with
    inputs = tokenizer(*texts, truncation=True, max_length=longest, return_tensors="pt")
    logits_C = classifier(**inputs.to(classifier.device)).logits[0].float()
    if classifier.config.problem_type == "multi_label_classification":
        return float(logits_C.sigmoid()[list(unsafe_classes)].max())
    return float(logits_C.softmax(-1)[list(unsafe_classes)].sum())
