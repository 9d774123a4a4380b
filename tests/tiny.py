"""Tiny random models, heads and a tokenizer: everything that the tests run on, built in memory."""

import copy
import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.generation.streamers import BaseStreamer

from safespec_hf import (
    DraftHead,
    DraftHeadConfig,
    SafeSpecConfig,
    SafetyHead,
    SafetyHeadConfig,
    attach_safety_head,
    target_binding,
)
from safespec_hf.answer.rows import Row
from safespec_hf.decoding import drafts
from safespec_hf.drafting.draft_length import DraftCosts

VOCAB_SIZE = 40
PAUSE, THINK, NO, THANKS = 4, 5, 6, 9  # the words of the stand-in reflection and refusal
NEWLINES = (7, 8)
FIRST_DIGIT = 29
REFLECTION, REFUSAL = "pause think", "no thanks"
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
# Wide weights, so that greedy text is not one token for ever.
CONFIGS = {
    "llama": functools.partial(LlamaConfig, **SIZES, **ATTENTION, **SPECIAL, initializer_range=0.3),
    "sliding": functools.partial(
        MistralConfig, **SIZES, **ATTENTION, **SPECIAL, initializer_range=0.3, sliding_window=8
    ),
    "alternating": functools.partial(
        Gemma3TextConfig,
        **SIZES,
        **ATTENTION,
        **SPECIAL,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.1,
    ),
    "gpt2": functools.partial(
        GPT2Config,
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        **SPECIAL,
    ),
}


@functools.cache
def _built(kind: str, seed: int, config: tuple[tuple[str, object], ...]) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](**dict(config)), dtype=torch.float32).eval()


def is_before(version: str) -> bool:
    """Whether the installed transformers is older."""
    return Version(transformers.__version__) < Version(version)


def since(version: str, reason: str, *values: Any) -> Any:
    """Values of a parametrized test that older releases of transformers do not have."""
    return pytest.param(*values, marks=pytest.mark.skipif(is_before(version), reason=reason))


def build_model(kind: str = "llama", seed: int = 0, **config: object) -> PreTrainedModel:
    """A new copy of a random model of that kind."""
    return copy.deepcopy(_built(kind, seed, tuple(config.items())))


@torch.no_grad()
def perturb(model: PreTrainedModel, noise: float = 0.003, seed: int = 1) -> PreTrainedModel:
    """A draft that mostly agrees with `model`: its weights, and a little noise."""
    generator, draft = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    for weight in draft.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator), alpha=noise)
    return draft


def build_tokenizer(num_words: int = VOCAB_SIZE, has_digits: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, split at spaces; a newline is a word of its own. Digits, if any, are the last but one."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "pause", "think", "no", "\n", "\n\n", "thanks"]
    words += [f"w{index}" for index in range(10, num_words - 1)] + ["abcdef"]  # what stop strings probe decoding with
    if has_digits:
        words[FIRST_DIGIT : FIRST_DIGIT + 10] = map(str, range(10))
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_head(
    model: PreTrainedModel,
    threshold: float = 1.0,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: object,
) -> SafetyHead:
    """A random head for `model`; the default threshold is never reached."""
    torch.manual_seed(7)
    text: PreTrainedConfig = model.config.get_text_config()
    fields = {"hidden_size": text.hidden_size, "hidden_layers": [text.num_hidden_layers], **config}
    binding = target_binding(model, tokenizer)
    return SafetyHead(SafetyHeadConfig(risk_threshold=threshold, target=binding, **fields)).eval()


@torch.no_grad()
def build_noisy_head(model: PreTrainedModel, quantile: float = 0.7, **config: object) -> SafetyHead:
    """A random head whose threshold lies inside the range of its risks, so that it flags often."""
    head = build_head(model, **config)
    ids = torch.randint(10, VOCAB_SIZE, (8, 16), generator=torch.Generator().manual_seed(3))
    states = model(ids, output_hidden_states=True).hidden_states
    features = torch.cat([states[layer] for layer in head.config.hidden_layers], dim=-1)
    features = torch.cat([features] * len(head.config.pooling.split("+")), dim=-1)
    head.config.risk_threshold = float(head.risk(features).quantile(quantile))
    return head


@torch.no_grad()
def build_draft_head(target: PreTrainedModel, draft_vocab_size: int = 12) -> DraftHead:
    """A random draft head that reads all hidden states of `target` and drafts every third token."""
    torch.manual_seed(5)
    text: PreTrainedConfig = target.config.get_text_config()
    sizes = {"hidden_size": text.hidden_size, "vocab_size": text.vocab_size, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    layers = list(range(text.num_hidden_layers + 1))
    config = {**sizes, **heads, "hidden_layers": layers, "draft_vocab_size": draft_vocab_size}
    draft = DraftHead(DraftHeadConfig(**config, target=target_binding(target))).eval()
    for weight in draft.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    draft.token_ids.copy_(torch.arange(3, 3 + 3 * draft_vocab_size, 3))
    return draft.bind(target)


def cheap_drafts() -> Any:
    """Makes adaptive decoding believe that drafts cost next to nothing: here they are as large as their targets."""
    return patch.object(drafts, "draft_costs", lambda *_: DraftCosts(draft=0.01, verify=0.002))


class Recorder(BaseStreamer):
    """Keeps what is put, and how often the end came."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_ends = 0

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.num_ends += 1


class CoinHead(SafetyHead):
    """Calls each token, and each prompt, unsafe with a probability, whatever its hidden state."""

    def toss(self, chance: float, seed: int) -> "CoinHead":
        self.chance, self.generator = chance, torch.Generator().manual_seed(seed)
        return self

    def risk(self, features: Tensor) -> Tensor:
        return (torch.rand(features.shape[:-1], generator=self.generator) < self.chance).float()

    def prompt_risk(self, states: Tensor) -> Tensor:
        return self.risk(states)


def build_coin_head(model: PreTrainedModel, chance: float, seed: int) -> CoinHead:
    """Flags that no model could foresee."""
    return CoinHead(build_head(model, 0.5, prompt_threshold=0.5).config).eval().toss(chance, seed)


def make_row(tokens: list[int], index: int = 0, **kwargs: Any) -> Row:
    """A row with this prompt, unpadded."""
    ids = torch.tensor(tokens)
    fields = {"max_new_tokens": 64, "policy": SafeSpecConfig(), **kwargs}
    return Row(index, ids, torch.ones_like(ids, dtype=torch.bool), **fields)


PROMPT = torch.tensor([[12, 18, 24, 13]])
FIELDS = {"max_segment_tokens": 6, "min_segment_tokens": 2, "num_candidates": 3}
FIELDS |= {"reflection": "pause think", "refusal": "no thanks", "num_draft_tokens": 5}
# drafts of constant length: which token was drafted then depends on nothing but the text
POLICY = SafeSpecConfig(**FIELDS, adaptive_drafts=False, lookup_drafts=False)
ADAPTIVE = SafeSpecConfig(**FIELDS)
DRAFTING = ["draft", "head", "lookup", "none"]


def drafting(source: str, target: PreTrainedModel) -> dict[str, Any]:
    """The arguments of `generate` for one of [`DRAFTING`]."""
    if source == "head":
        return {"assistant_model": build_draft_head(target)}
    return {
        "draft": {"assistant_model": perturb(target)},
        "lookup": {"prompt_lookup_num_tokens": 4},
        "none": {},
    }[source]


def attach(model: PreTrainedModel, tokenizer: Any, head: SafetyHead | None = None, **kwargs: Any) -> Any:
    """The model, guarded by this head, or by one that flags nothing."""
    return attach_safety_head(model, head or build_head(model), tokenizer=tokenizer, **kwargs)
