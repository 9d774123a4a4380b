"""What a draft head is distilled from: the target's states over its own answers, on disk, and batches of them.

Shapes: B texts, S positions of the longest prompt and the longest answer together, A positions of the answers, T
positions of one text, D hidden size, F features of the tapped states, V draft vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..engine.evaluating import evaluating
from ..engine.tap import read_tap, tap_arguments
from ..errors import UnsupportedRequestError
from ..training.data import Example
from ..training.hidden import Encoded, describe_states, encode, make_batches, read_hidden
from ..training.settings import check_counts
from ..training.shards import Place, compute_shards


class OutOfTime(Exception):
    """The time that a run was given is over. What it has done is on disk."""


TENSORS = ("num_prompt", "num_tokens", "ids", "states", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSettings:
    """What is read of every answer.

    Args:
        layers (`tuple[int, ...]`): As in [`DraftHeadConfig`].
        max_prompt_tokens, max_response_tokens (`int`): What is longer is cut, a prompt at its beginning.
        num_batch_tokens (`int`, defaults to 4096): Tokens of a forward, padding included.
        num_shard_examples (`int`, defaults to 64): Answers per file: what a kill can lose.
    """

    layers: tuple[int, ...]
    max_prompt_tokens: int = 512
    max_response_tokens: int = 512
    num_batch_tokens: int = 4096
    num_shard_examples: int = 64

    def __post_init__(self) -> None:
        check_counts(self, "max_prompt_tokens", "max_response_tokens", "num_batch_tokens", "num_shard_examples")


class Text(NamedTuple):
    """A prompt, its answer, and where the target's states of them lie.

    Attributes:
        ids (`torch.LongTensor` of shape `(T,)`): The tokens of both.
        num_prompt (`int`): How many of them are the prompt's.
        file (`Path`): The shard.
        first_row, first_answer_row (`int`): Where its tapped states and its last hidden states start in the shard.
    """

    ids: Tensor
    num_prompt: int
    file: Path
    first_row: int
    first_answer_row: int

    @property
    def answer_ids(self) -> Tensor:
        """The tokens of the answer."""
        return self.ids[self.num_prompt :]


class Batch(NamedTuple):
    """Texts side by side: prompts are padded on the left, answers on the right, so all answers start in one column.

    Attributes:
        ids_BS, position_ids_BS (`torch.LongTensor` of shape `(B, S)`): Tokens, and their places in their texts.
        states_BSF (`torch.Tensor` of shape `(B, S, F)`): Tapped states of the position **before** each token.
        last_BAD (`torch.Tensor` of shape `(B, A, D)`): The target's last, normed hidden states at answer positions.
        is_token_BS (`torch.BoolTensor` of shape `(B, S)`): `False` for padding.
        next_BA (`torch.LongTensor` of shape `(B, A)`): The token after each answer position; -1 if that is not known.
    """

    ids_BS: Tensor
    position_ids_BS: Tensor
    states_BSF: Tensor
    last_BAD: Tensor
    is_token_BS: Tensor
    next_BA: Tensor

    @property
    def num_prompt(self) -> int:
        """Columns before the answers."""
        return self.ids_BS.shape[1] - self.next_BA.shape[1]


def read_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    cache_dir: str | os.PathLike[str],
    settings: StateSettings,
    deadline: float | None = None,
) -> list[Text]:
    """Reads the target's states of all examples, or of those that an earlier run has left to read.

    They are kept as bfloat16: `2 * hidden_size * (len(layers) + 1)` bytes per answer token.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        examples (`Sequence[Example]`): Answered ones.
        cache_dir (`str` or `os.PathLike`): Gets a folder named by a hash of target, tokenizer and layers.
        settings ([`StateSettings`]): What to read.
        deadline (`float`, *optional*): Reading of [`time.monotonic`] after which no shard is begun.

    Returns:
        `list[Text]`: In the order of the examples.

    Raises:
        OutOfTime: If the deadline has passed.
        UnsupportedRequestError: If the target's logits are not its LM head times its last hidden state.
    """
    encoded = [encode(tokenizer, e, settings.max_prompt_tokens, settings.max_response_tokens) for e in examples]
    _check_logits(model, encoded[0])
    texts = {text.key: text for text in encoded}

    def compute(keys: Sequence[str]) -> dict[str, Tensor]:
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime
        return _read_shard(model, [texts[key] for key in keys], settings)

    folder = Path(cache_dir) / _cache_key(model, tokenizer, settings)
    lengths = {key: text.num_tokens for key, text in texts.items()}
    places = compute_shards(folder, lengths, settings.num_shard_examples, compute, "states", lambda _: TENSORS)
    found = _load_texts({place.file for place in places.values()})
    return [found[places[text.key]] for text in encoded]


def load_states(text: Text) -> tuple[Tensor, Tensor]:
    """Tapped states of shape `(T, F)` and last hidden states of shape `(A, D)`, read from the disk when needed."""
    with safe_open(text.file, "pt") as shard:
        states_TF = shard.get_slice("states")[text.first_row : text.first_row + len(text.ids)]
        end = text.first_answer_row + len(text.answer_ids)
        return states_TF, shard.get_slice("last")[text.first_answer_row : end]


def collate(texts: Sequence[Text], device: torch.device | str = "cpu") -> Batch:
    """Puts texts into one batch, in float32."""
    most_prompt = max(text.num_prompt for text in texts)
    most_answer = max(len(text.answer_ids) for text in texts)
    num, width = len(texts), most_prompt + most_answer
    loaded = [load_states(text) for text in texts]
    ids_BS, position_ids_BS = torch.zeros(2, num, width, dtype=torch.long)
    states_BSF = torch.zeros(num, width, loaded[0][0].shape[1])
    last_BAD = torch.zeros(num, most_answer, loaded[0][1].shape[1])
    is_token_BS = torch.zeros(num, width, dtype=torch.bool)
    next_BA = torch.full((num, most_answer), -1)
    for row, (text, (states_TF, last_AD)) in enumerate(zip(texts, loaded, strict=True)):
        start, size = most_prompt - text.num_prompt, len(text.ids)
        ids_BS[row, start : start + size] = text.ids
        position_ids_BS[row, start : start + size] = torch.arange(size)
        states_BSF[row, start + 1 : start + size] = states_TF[:-1]
        last_BAD[row, : len(last_AD)] = last_AD
        is_token_BS[row, start : start + size] = True
        next_BA[row, : len(last_AD) - 1] = text.answer_ids[1:]
    return Batch(*(part.to(device) for part in (ids_BS, position_ids_BS, states_BSF, last_BAD, is_token_BS, next_BA)))


def plan_epoch(lengths: Sequence[int], num_step_tokens: int, seed: int) -> list[list[int]]:
    """Batches of one epoch, in random order: a step's texts are of similar length, but not always the same ones.

    Args:
        lengths (`Sequence[int]`): Tokens of each text.
        num_step_tokens (`int`): Of a batch, padding included.
        seed (`int`): The same seed plans the same epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for pool in torch.randperm(len(lengths), generator=generator).split(512):
        indices = pool.tolist()
        planned = make_batches([lengths[index] for index in indices], num_step_tokens)
        batches += [[indices[position] for position in batch] for batch in planned]
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def is_held_out(group: str, fraction: float) -> bool:
    """Whether a group is for measuring. It does not depend on the other groups, so added data moves none of them."""
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def choose_token_ids(texts: Sequence[Text], end_ids: Sequence[int], size: int, vocab_size: int) -> Tensor:
    """The tokens that can be drafted: those that end an answer, and the most frequent ones in answers.

    Args:
        texts (`Sequence[Text]`): Answers.
        end_ids (`Sequence[int]`): See [`find_end_ids`].
        size (`int`): How many to choose; all, if the vocabulary has no more.
        vocab_size (`int`): The target's.

    Returns:
        `torch.LongTensor` of shape `(V,)`: In ascending order.
    """
    counts = Counter(torch.cat([text.answer_ids for text in texts]).tolist())
    is_end = set(end_ids)
    # among tokens that never occurred, low ids come first: tokenizers learn frequent tokens early
    ranked = sorted(range(vocab_size), key=lambda token: (token not in is_end, -counts[token], token))
    return torch.tensor(sorted(ranked[:size]))


def find_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer."""
    generation: Any = model.generation_config
    listed = [source.eos_token_id for source in (generation, model.config.get_text_config(), tokenizer)]
    nested = [ids if isinstance(ids, list) else [ids] for ids in listed if ids is not None]
    return sorted({int(token) for ids in nested for token in ids})


def _cache_key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: StateSettings) -> str:
    parts = [*describe_states(model, tokenizer), settings.layers]
    return "states-" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_shard(model: PreTrainedModel, texts: Sequence[Encoded], settings: StateSettings) -> dict[str, Tensor]:
    width = model.config.get_text_config(decoder=True).hidden_size
    layers = [*settings.layers, model.config.get_text_config(decoder=True).num_hidden_layers]
    states: dict[int, Tensor] = {}
    for batch in make_batches([text.num_tokens for text in texts], settings.num_batch_tokens):
        # all of a text counts as answer here, as the draft reads the prompt too
        whole = [Encoded([], texts[index].prompt_ids + texts[index].response_ids) for index in batch]
        for index, hidden_TF in zip(batch, read_hidden(model, whole, layers), strict=True):
            states[index] = hidden_TF.to(torch.bfloat16)
    return {
        "num_prompt": torch.tensor([len(text.prompt_ids) for text in texts]),
        "num_tokens": torch.tensor([text.num_tokens for text in texts]),
        "ids": torch.tensor([token for text in texts for part in text for token in part]),
        "states": torch.cat([states[index][:, :-width] for index in range(len(texts))]),
        "last": torch.cat([states[index][len(text.prompt_ids) :, -width:] for index, text in enumerate(texts)]),
    }


def _load_texts(files: Iterable[Path]) -> dict[Place, Text]:
    texts: dict[Place, Text] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            sizes = [shard.get_tensor(name).tolist() for name in ("num_prompt", "num_tokens")]
            ids = shard.get_tensor("ids")
        row = answer_row = 0
        for number, (num_prompt, num_tokens) in enumerate(zip(*sizes, strict=True)):
            texts[Place(file, number)] = Text(ids[row : row + num_tokens], num_prompt, file, row, answer_row)
            row, answer_row = row + num_tokens, answer_row + num_tokens - num_prompt
    return texts


@torch.inference_mode()
def _check_logits(model: PreTrainedModel, text: Encoded) -> None:
    """A draft shares the target's LM head, so nothing may come after it, such as a scale or a soft cap."""
    last = model.config.get_text_config(decoder=True).num_hidden_layers
    ids = torch.tensor([text.prompt_ids + text.response_ids], device=model.device)
    with evaluating([model]):
        outputs = model(ids, use_cache=False, logits_to_keep=1, **tap_arguments([last]))
    head: Any = model.get_output_embeddings()
    expected = outputs.logits[0, -1].float()
    found = head(read_tap(model, outputs, [last], 1))[0, -1].float()
    # rounding of 16-bit weights moves log-probabilities by far less than any scale that a model would use
    if F.kl_div(found.log_softmax(0), expected.softmax(0), reduction="sum") > 0.01:
        raise UnsupportedRequestError(
            f"The logits of {type(model).__name__} are not its LM head times its last hidden state: it scales or caps "
            "them. A draft head can't be distilled from it."
        )
