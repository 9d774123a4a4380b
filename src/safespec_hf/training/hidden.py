"""Hidden states of answers, read as decoding reads them: one forward per text gives every layer that is asked for.

Shapes: T tokens of an answer, F features (hidden size times layers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answer.pooling import pool_block
from ..answer.segments import Boundaries, Segments, find_boundaries
from ..config import SafeSpecConfig
from ..decoding.adapters import describe_adapters
from ..engine.evaluating import evaluating
from ..engine.tap import read_tap, tap_arguments
from ..errors import SafeSpecError
from ..heads.head_config import SafetyHeadConfig
from ..heads.safety_head import SafetyHead, target_binding
from .chat_template import check_chat_template
from .data import Example

NOT_OF_STATES = ("architectures", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Of a config. The class and the data type that a model really has are told by itself."""


class Encoded(NamedTuple):
    """Token ids of a text: the conversation in the target's chat template, and the answer."""

    prompt_ids: list[int]
    response_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Of both."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def key(self) -> str:
        """32 hex digits over both: all that hidden states of a target depend on."""
        return hashlib.sha256(json.dumps([self.prompt_ids, self.response_ids]).encode()).hexdigest()[:32]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation in the tokenizer's chat template, by default up to where the answer begins.

    `variables` are what the template may ask for besides.

    Raises:
        SafeSpecError: If there is no template, or if it refuses this conversation; names the example.
    """
    check_chat_template(tokenizer)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(example.messages),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(variables or {}),
            )
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in example.messages)
        raise SafeSpecError(
            f"The chat template refuses the conversation of example {example.id!r} (roles: {roles}): {error} Many "
            "templates know no system role, or want user and assistant in turns: put what the system says into the "
            "first message of the user, or leave the row out."
        ) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_prompt_tokens: int, max_response_tokens: int
) -> Encoded:
    """Tokenises one example; a long conversation loses its beginning, a long answer its end.

    Raises:
        SafeSpecError: If the chat template refuses the conversation, or if the answer has no tokens.
    """
    prompt: Any = tokenizer(render_prompt(tokenizer, example), add_special_tokens=False)
    response: Any = tokenizer(example.response, add_special_tokens=False)
    encoded = Encoded(prompt["input_ids"][-max_prompt_tokens:], response["input_ids"][:max_response_tokens])
    if not encoded.response_ids:
        raise SafeSpecError(f"The answer of example {example.id!r} has no tokens.")
    return encoded


def hash_weights(model: PreTrainedModel) -> str:
    """16 hex digits over samples of every weight: what was computed with other weights must not be taken for theirs.

    A fine-tune in a local folder has no name to tell it by. Weights that are not in memory are passed over. Which
    adapters act is in it, too.
    """
    digest = hashlib.sha256()
    if adapters := describe_adapters(model):
        digest.update(json.dumps(adapters, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if type(tensor) is Tensor and not tensor.is_meta:
            flat = tensor.flatten()
            digest.update(f"{name} {tuple(tensor.shape)} {flat[:8].tolist()} {flat[-8:].tolist()}".encode())
    return digest.hexdigest()[:16]


def hash_config(model: PreTrainedModel) -> str:
    """16 hex digits over what a model's config says of its states, such as how positions are scaled.

    Names, versions and token ids are not in it: they change no state, and some are set while a program runs.
    """
    config = model.config.get_text_config(decoder=True).to_diff_dict()
    kept = {name: value for name, value in config.items() if name[0] != "_" and not name.endswith("token_id")}
    kept = {name: value for name, value in kept.items() if name not in NOT_OF_STATES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that the hidden states of a text depend on besides its tokens, as JSON can hold it: the key of every cache.

    Args:
        model, tokenizer: The target and its tokenizer.
    """
    return [target_binding(model, tokenizer), hash_weights(model), hash_config(model), str(model.dtype)]


def make_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, so that little is padding.

    Args:
        lengths (`Sequence[int]`): Tokens of each text.
        max_tokens (`int`): Of a batch, padding included. A longer text makes a batch of its own.

    Example:

        >>> make_batches([5, 2, 4, 2], max_tokens=8)
        [[1, 3], [2], [0]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@contextmanager
def first_layers(model: PreTrainedModel, num_layers: int) -> Iterator[None]:
    """Lets a model run its first layers only: nothing above the highest one that is read can change it.

    transformers' decoders run as many layers as their config says. Where one does not look, all its layers run.
    """
    config = model.config.get_text_config(decoder=True)
    total = config.num_hidden_layers
    config.num_hidden_layers = min(num_layers, total)
    try:
        yield
    finally:
        config.num_hidden_layers = total


@torch.inference_mode()
def read_hidden(model: PreTrainedModel, batch: Sequence[Encoded], layers: Sequence[int]) -> list[Tensor]:
    """Hidden states of every answer token, from one forward without dropout.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target, in any mode.
        batch (`Sequence[Encoded]`): Texts.
        layers (`Sequence[int]`): As in [`SafetyHeadConfig`].

    Returns:
        `list[torch.Tensor]`: One of shape `(T, hidden_size * len(layers))` per text, on the CPU.

    Raises:
        SafeSpecError: If they overflow: half precision is too narrow for some targets.
    """
    width = max(text.num_tokens for text in batch)
    rows = [text.prompt_ids + text.response_ids for text in batch]
    # padded on the right: causal attention then needs no mask, and positions count from 0
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    with evaluating([model]), first_layers(model, max(layers) + 1):
        outputs = model(ids, use_cache=False, logits_to_keep=1, **tap_arguments(layers))
    states = read_tap(model, outputs, layers, width).cpu()
    parts = [hidden[len(text.prompt_ids) : text.num_tokens] for text, hidden in zip(batch, states, strict=True)]
    if not all(bool(part.isfinite().all()) for part in parts):
        raise SafeSpecError(
            f"Hidden states of {type(model).__name__} are infinite or no numbers in {model.dtype}: they tell nothing. "
            "Load it in float32 or bfloat16 (`--dtype`); if that changes nothing, its weights are broken."
        )
    return parts


def span_counts(response_ids: Sequence[int], span: str, boundaries: Boundaries, policy: SafeSpecConfig) -> list[int]:
    """For each answer token, how many tokens of its span come before it, as decoding counts them.

    Args:
        response_ids (`Sequence[int]`): The answer.
        span (`str`): `"segment"` or `"answer"`.
        boundaries ([`Boundaries`]): Of the tokenizer, see [`find_boundaries`].
        policy ([`SafeSpecConfig`]): Lengths of segments.
    """
    if span == "answer":
        return list(range(len(response_ids)))
    return Segments(policy, *boundaries).counts_ahead(response_ids)


def pool_answer(hidden_TF: Tensor, counts: Sequence[int], pooling: str, decay: float) -> Tensor:
    """The pooled state after every token of an answer, float32, of shape `(T, F)`."""
    return pool_block(None, hidden_TF, counts, pooling, decay)


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    head: SafetyHead,
    examples: Sequence[Example],
    *,
    policy: SafeSpecConfig | None = None,
    max_prompt_tokens: int = 1024,
    max_response_tokens: int = 256,
    num_batch_tokens: int = 4096,
) -> Iterator[tuple[int, Tensor]]:
    """The risk of every token of every answer, as decoding would see it.

    Args:
        model, tokenizer, head: The target, its tokenizer and its head.
        examples (`Sequence[Example]`): Answered ones.
        policy ([`SafeSpecConfig`], *optional*): Lengths of segments, for a head with `span="segment"`.
        max_prompt_tokens, max_response_tokens, num_batch_tokens (`int`): What is cut, and the size of a batch.

    Yields:
        `tuple[int, torch.Tensor]`: Index of an example, and its risks of shape `(T,)`. Short texts come first.
    """
    encoded = [encode(tokenizer, example, max_prompt_tokens, max_response_tokens) for example in examples]
    policy, boundaries = policy or SafeSpecConfig(), find_boundaries(tokenizer)
    for index, risks_HT in score_texts(model, [head], encoded, boundaries, policy, num_batch_tokens):
        yield index, risks_HT[0]


def score_texts(
    model: PreTrainedModel,
    heads: Sequence[SafetyHead],
    texts: Sequence[Encoded],
    boundaries: Boundaries,
    policy: SafeSpecConfig,
    num_batch_tokens: int = 4096,
) -> Iterator[tuple[int, Tensor]]:
    """As [`score_answers`], of texts that are tokens already, and by several heads of one target at once.

    Yields:
        `tuple[int, torch.Tensor]`: Index of a text, and its risks of shape `(heads, T)`.
    """
    layers = sorted({layer for head in heads for layer in head.config.hidden_layers or []})
    columns = [[layers.index(layer) for layer in head.config.hidden_layers or []] for head in heads]
    for batch in make_batches([text.num_tokens for text in texts], num_batch_tokens):
        chosen = [texts[index] for index in batch]
        states = read_hidden(model, chosen, layers)
        for index, text, hidden_TF in zip(batch, chosen, states, strict=True):
            by_layer = hidden_TF.view(len(hidden_TF), len(layers), -1)
            risks = [
                risk_of(
                    head,
                    by_layer[:, of_head].flatten(1),
                    span_counts(text.response_ids, head.config.span, boundaries, policy),
                )
                for head, of_head in zip(heads, columns, strict=True)
            ]
            yield index, torch.stack(risks)


@torch.no_grad()
def risk_of(head: SafetyHead, hidden_TF: Tensor, counts: Sequence[int]) -> Tensor:
    """The risk of every token of one answer, of shape `(T,)`."""
    config: SafetyHeadConfig = head.config
    return head.risk(pool_answer(hidden_TF, counts, config.pooling, config.ewma_decay)).cpu()
