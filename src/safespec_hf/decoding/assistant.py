"""What can draft: a model that speaks the target's vocabulary, out of what it may be wrapped in."""

from __future__ import annotations

import functools
import os
import sys
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..drafting.router import MakeDrafter
from ..drafting.translation import TokenizerPair
from ..engine.private_names import uncompiled
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead
from .support import check_kind, check_model

_agreed: WeakKeyDictionary[PreTrainedTokenizerBase, WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]]]
_agreed = WeakKeyDictionary()


def as_draft(assistant: nn.Module | None) -> PreTrainedModel | None:
    """The draft model itself, adapters included, where PEFT or `torch.compile` wrapped it.

    Raises:
        UnsupportedRequestError: For a soft prompt, which a draft would be read without.
        TypeError: If it is no transformers model.
    """
    if assistant is None or isinstance(assistant, PreTrainedModel):
        return assistant
    compiled = uncompiled(assistant) if isinstance(assistant, nn.Module) else None
    if compiled is not None:
        return as_draft(compiled)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(assistant, peft.PeftModel):
        config = assistant.active_peft_config
        if config.is_prompt_learning:
            raise UnsupportedRequestError(
                f"`assistant_model` has a soft prompt ({config.peft_type.value}), which a draft is read without. Use "
                "its base model, or an adapter that changes weights, such as LoRA."
            )
        return as_draft(assistant.get_base_model())
    raise TypeError(
        f"`assistant_model` must be a transformers model or a `DraftHead`, but it is a {type(assistant).__name__}."
    )


class Draft(NamedTuple):
    """What drafts for a call.

    Attributes:
        model ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*): The draft model.
        tokenizers ([`TokenizerPair`], *optional*): The target's and the draft's, if they are not the same.
        is_part (`bool`): Whether its weights are the target's.
        make_drafter (`Callable`, *optional*): What makes its drafter, where it is no language model.
    """

    model: PreTrainedModel | None
    tokenizers: TokenizerPair | None = None
    is_part: bool = False
    make_drafter: MakeDrafter | None = None

    @property
    def writes(self) -> bool:
        """Whether it can write tokens of the target by itself."""
        return self.title == "a language model"

    @property
    def title(self) -> str:
        """What to call it in an error."""
        if self.model is None:
            return "none"
        if isinstance(self.model, DraftHead):
            return "a draft head"
        if self.make_drafter is not None:
            return f"a {type(self.model).__name__}, which reads states of the target"
        return "a language model" if self.tokenizers is None else "a model with another tokenizer"


def check_assistant(model: PreTrainedModel, draft: Draft, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless the draft model speaks the target's vocabulary, or there is a tokenizer to translate with.

    Where no other tokenizer was given, the draft's is the one beside its weights, if that is on this machine; without
    it, sizes are all there is to compare. They may differ by padding and by added tokens. A draft head is bound to the
    target.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        draft ([`Draft`]): The draft.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.

    Raises:
        UnsupportedRequestError: Says what differs.
        HeadMismatchError: If a draft head was distilled from another target.
    """
    assistant, tokenizers = draft.model, draft.tokenizers
    if assistant is None or draft.make_drafter is not None:
        return
    if isinstance(assistant, DraftHead):
        if tokenizers is not None:
            raise UnsupportedRequestError(
                "`assistant_tokenizer` is another one than the target's, but a draft head writes the target's own "
                "tokens. Leave it out."
            )
        assistant.bind(model)
        return
    check_kind(assistant)
    draft_size = assistant.config.get_text_config().vocab_size
    if tokenizers is not None:
        if len(tokenizers.draft) > draft_size:
            raise UnsupportedRequestError(
                f"`assistant_tokenizer` knows {len(tokenizers.draft)} tokens, but the draft model only {draft_size}. "
                "Pass the tokenizer that belongs to it."
            )
    else:
        _check_vocabulary(model, assistant, tokenizer)
    check_model(assistant, has_states=False)  # last, since it takes forwards


def fit(model: PreTrainedModel, assistant: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabularies of target and draft differ by padding and added tokens only, by their sizes."""
    sizes = {each.config.get_text_config().vocab_size for each in (model, assistant)}
    return len(sizes) == 1 or min(sizes) >= tokenizer.vocab_size


def _check_vocabulary(model: PreTrainedModel, assistant: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless the ids of a draft model mean the same as the target's, as far as that can be told."""
    if not fit(model, assistant, tokenizer):
        draft_size, target_size = (each.config.get_text_config().vocab_size for each in (assistant, model))
        raise UnsupportedRequestError(
            f"The draft model's vocabulary has {draft_size} entries and the target's {target_size}, with "
            f"{tokenizer.vocab_size} tokens in the tokenizer. Use a draft model with the same tokenizer, or pass "
            "`assistant_tokenizer`."
        )
    name = assistant.config.name_or_path
    if name and name != model.config.name_or_path:
        found = local_tokenizer(os.path.abspath(name) if os.path.isdir(name) else name)
        if found is not None:
            check_tokenizers(tokenizer, found, f"The draft model's tokenizer, beside {name!r},")


@functools.lru_cache(maxsize=8)
def local_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or in the cache of the Hub, if there is one; nothing is downloaded or run."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, title: str) -> None:
    """Raises unless two tokenizers mean the same by every id that both know. Tokens may be added to either.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        other ([`~transformers.PreTrainedTokenizerBase`]): The other one.
        title (`str`): What to call it in an error.

    Raises:
        UnsupportedRequestError: Shows an id that differs.
    """
    if agree(tokenizer, other):
        return
    different = _different_ids(tokenizer, other)
    ours, theirs = (each.convert_ids_to_tokens(different[0]) for each in (tokenizer, other))
    raise UnsupportedRequestError(
        f"{title} is another one than the target's: {len(different)} of {len(tokenizer)} ids differ, such as "
        f"{different[0]}, which means {theirs!r} there and {ours!r} here. Use a draft model that shares the target's "
        "tokenizer, or pass `assistant_tokenizer`, and drafts are translated."
    )


def agree(tokenizer: PreTrainedTokenizerBase, other: object) -> bool:
    """Whether two tokenizers mean the same by every id that both know. Tokens may be added to either.

    Raises:
        UnsupportedRequestError: If the other one is no tokenizer.
    """
    if not isinstance(other, PreTrainedTokenizerBase):
        raise UnsupportedRequestError(
            f"`assistant_tokenizer` must be a tokenizer, but it is a {type(other).__name__}."
        )
    sizes, known = (len(tokenizer), len(other)), _agreed.setdefault(tokenizer, WeakKeyDictionary())
    if other is not tokenizer and known.get(other) != sizes:
        if _different_ids(tokenizer, other):
            return False
        known[other] = sizes
    return True


def _different_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> list[int]:
    ours, theirs = ({id_: token for token, id_ in each.get_vocab().items()} for each in (tokenizer, other))
    # models of a family rename the special tokens that are to spare
    added = tokenizer.added_tokens_decoder.keys() & other.added_tokens_decoder.keys()
    return [id_ for id_ in sorted((ours.keys() & theirs.keys()) - added) if ours[id_] != theirs[id_]]
