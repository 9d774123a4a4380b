"""SafeDecoding: an expert that refuses what is harmful is mixed into the first tokens of an answer, and then leaves.

Method: Xu et al., ACL 2024, arXiv 2402.08983. This is an independent implementation. The expert is an adapter of the
target, or any model with its tokenizer.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from ..decoding.assistant import check_tokenizers, fit, local_tokenizer
from ..drafting.drafters import fit_vocabulary
from ..engine.traits import CACHE_NAME
from ..errors import SafeSpecError
from ..heads.loading import explain_hub_error, hub_arguments
from ..training.collect import pad_left
from ..training.settings import check_counts, check_ranges
from .engine import Engine, Reply
from .methods import Turn

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
FILES = (ADAPTER_CONFIG, MODEL_CONFIG, "*.safetensors", "*.bin")


@dataclass(slots=True, kw_only=True)
class SafeDecoding:
    """The target alone, whose first tokens are chosen together with an expert.

    Args:
        name (`str`): Its specification.
        expert (`str`): Folder or Hub id of a LoRA adapter of the target, or of a model with its tokenizer.
        alpha (`float`, defaults to 3.0): How much the expert's opinion counts: p + alpha * (q - p).
        first_tokens (`int`, defaults to 2): Tokens that it has a say in (m in the paper).
        num_common (`int`, defaults to 5): Tokens, at least, that both find likely enough (c in the paper).

    Raises:
        SafeSpecError: If a value is outside of its range, or a folder holds no expert.
    """

    name: str
    expert: str
    alpha: float = 3.0
    first_tokens: int = 2
    num_common: int = 5
    needs_head: bool = field(default=False, init=False)
    uses_undefended: bool = field(default=False, init=False)
    _loaded: tuple[PreTrainedModel, PreTrainedModel] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_ranges(self, {"alpha": "[0, inf)"})
        check_counts(self, "first_tokens", "num_common")
        check_expert(self.expert)

    def settings(self) -> dict[str, Any]:
        """All that its answers depend on; of an expert on the Hub only its name is known."""
        numbers = {"alpha": self.alpha, "first_tokens": self.first_tokens, "num_common": self.num_common}
        return {"expert": self.expert, "files": _hash_files(Path(self.expert)), **numbers}

    def answer(self, engine: Engine, turn: Turn) -> list[Reply]:
        """Greedy answers, the first tokens of the mixture."""
        if self._loaded is None or self._loaded[0] is not engine.model:
            self._loaded = engine.model, load_expert(self.expert, engine.model, engine.tokenizer)
        mask_BL = pad_left(engine.model, engine.tokenizer, engine.encode(turn.chats))["attention_mask"]
        mixture = ExpertMixture(self._loaded[1], mask_BL, self.alpha, self.first_tokens, self.num_common)
        return engine.plain(turn.chats, LogitsProcessorList([mixture]))


class ExpertMixture(LogitsProcessor):
    """Mixes an expert's probabilities into those of the first tokens after a batch of prompts.

    Args:
        expert ([`~transformers.PreTrainedModel`]): Speaks the same vocabulary.
        mask_BL (`torch.Tensor` of shape `(B, L)`): 1 for tokens of the prompts, which are padded on the left.
        alpha (`float`), first_tokens (`int`), num_common (`int`): As in [`SafeDecoding`].
    """

    def __init__(self, expert: PreTrainedModel, mask_BL: Tensor, alpha: float, first_tokens: int, num_common: int):
        self.expert: Any = expert
        self.mask_BL = mask_BL
        self.alpha = alpha
        self.first_tokens = first_tokens
        self.num_common = num_common
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The target's scores, or those of the mixture while the expert has a say."""
        num_new = input_ids.shape[1] - self.mask_BL.shape[1]
        if num_new >= self.first_tokens:
            self._cache = None
            return scores
        # `generate` knows what this kind of model wants besides tokens: positions of padded rows, caches
        output = self.expert.generate(
            input_ids,
            attention_mask=torch.nn.functional.pad(self.mask_BL, (0, num_new), value=1),
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **({} if self._cache is None else {CACHE_NAME: self._cache}),
        )
        # where a config names a kind of cache, `generate` takes no other and makes it no longer than this call needs
        is_free = self.expert.generation_config.cache_implementation is None
        self._cache = getattr(output, CACHE_NAME) if is_free else None
        expert_BV = fit_vocabulary(output.logits[0], scores.shape[1]).to(scores)
        return cast("torch.FloatTensor", mix(scores, expert_BV, self.alpha, self.num_common))


def mix(scores_BV: Tensor, expert_BV: Tensor, alpha: float, num_common: int) -> Tensor:
    """Scores of p + alpha * (q - p), over tokens that are among the k likeliest of both.

    k is as small as it can be for `num_common` tokens. What comes out negative can't be chosen; where all is, the
    highest is.

    Args:
        scores_BV (`torch.Tensor` of shape `(B, V)`): The target's, p before the softmax.
        expert_BV (`torch.Tensor` of shape `(B, V)`): The expert's, q before the softmax.
        alpha (`float`): See above.
        num_common (`int`): Tokens in both, at least.

    Returns:
        `torch.Tensor` of shape `(B, V)`: Logarithms, up to a constant; `-inf` for all that can't be chosen.

    Example:

        >>> p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.4, 0.4, 0.2]])
        >>> mix(p.log(), q.log(), alpha=2.0, num_common=2).exp()
        tensor([[0.3000, 0.5000, 0.0000]])
    """
    p_BV, q_BV = scores_BV.float().softmax(dim=-1), expert_BV.float().softmax(dim=-1)
    # the lower of its two ranks says from which k on a token is among the likeliest of both
    rank_BV = torch.maximum(_ranks(p_BV), _ranks(q_BV))
    k_B1 = rank_BV.kthvalue(min(num_common, rank_BV.shape[1]), dim=-1, keepdim=True).values
    # nor can a token that the target's own processors have ruled out
    is_out_BV = (rank_BV > k_B1) | scores_BV.isneginf()
    mixed_BV = (p_BV + alpha * (q_BV - p_BV)).masked_fill(is_out_BV, -torch.inf)
    highest_B1 = mixed_BV.amax(dim=-1, keepdim=True)
    is_best_BV = (mixed_BV == highest_B1) & (highest_B1 <= 0)
    return mixed_BV.clamp(min=0).masked_fill(is_best_BV, 1.0).log().to(scores_BV.dtype)


def _ranks(probs_BV: Tensor) -> Tensor:
    """0 for the likeliest token of a row, 1 for the next; the first of several alike comes first, as in argmax."""
    return probs_BV.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def check_expert(name: str) -> None:
    """Raises for what can be no expert, as far as that is known before anything is loaded or asked for on a Hub.

    Raises:
        SafeSpecError: Says what is missing.
    """
    try:
        hub_arguments(name, {"local_files_only": True}, "expert")
    except FileNotFoundError as error:
        raise SafeSpecError(str(error)) from error
    if os.path.isdir(name) and not any(Path(name, file).is_file() for file in (ADAPTER_CONFIG, MODEL_CONFIG)):
        raise SafeSpecError(f"{name!r} holds neither an adapter nor a model: no {ADAPTER_CONFIG}, no {MODEL_CONFIG}.")
    if Path(name, ADAPTER_CONFIG).is_file():
        _check_peft()


def load_expert(name: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An expert on the target's device.

    Args:
        name (`str`): As in [`SafeDecoding`].
        target ([`~transformers.PreTrainedModel`]): An adapter is put on a copy of it, which shares its weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.

    Raises:
        SafeSpecError: If there is none, if it does not fit the target, or if it has another tokenizer.
    """
    try:
        where = hub_arguments(name, {}, "expert")
        is_adapter = find_adapter_config_file(name, **where) is not None
        load = _load_adapter if is_adapter else _load_model
        expert = load(name, target, where)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        why = explain_hub_error(name, error, {}) or error
        raise SafeSpecError(f"No expert for this target could be loaded from {name!r}: {why}") from error
    if not is_adapter:
        _check_vocabulary(name, expert, target, tokenizer)
    return expert.eval()


def _load_model(name: str, target: PreTrainedModel, where: dict[str, Any]) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype, **where)
    return cast("PreTrainedModel", model.to(target.device))


def _load_adapter(name: str, target: PreTrainedModel, where: dict[str, Any]) -> PreTrainedModel:
    _check_peft()
    import peft

    if peft.PeftConfig.from_pretrained(name, **where).is_prompt_learning:
        raise ValueError("it is a soft prompt. Give an adapter that changes weights, such as LoRA.")
    # modules of its own on the same weights: the target stays as it is, also where it is guarded
    shared = [*target.parameters(), *target.buffers(), vars(target).get("_safespec")]
    twin = copy.deepcopy(target, {id(part): part for part in shared})
    wrapped = peft.PeftModel.from_pretrained(twin, name, torch_device=str(target.device), **where)
    return cast("PreTrainedModel", wrapped.get_base_model())


def _check_peft() -> None:
    if find_spec("peft") is None:
        raise SafeSpecError("An expert that is an adapter needs PEFT: `pip install peft`.")


def _check_vocabulary(
    name: str, expert: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises unless its ids mean what the target's do, as far as that can be told."""
    if not fit(target, expert, tokenizer):
        sizes = [model.config.get_text_config().vocab_size for model in (expert, target)]
        raise SafeSpecError(
            f"The expert {name!r} has a vocabulary of {sizes[0]} entries and the target one of {sizes[1]}. Give one "
            "with the same tokenizer."
        )
    own = local_tokenizer(os.path.abspath(name) if os.path.isdir(name) else name)
    if own is not None:
        check_tokenizers(tokenizer, own, f"The tokenizer of the expert {name!r}")


def _hash_files(folder: Path) -> str | None:
    """16 hex digits over weights and configs in a folder; `None` if there is no such folder."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for part in iter(lambda: file.read(2**24), b""):
                digest.update(part)
    return digest.hexdigest()[:16]
