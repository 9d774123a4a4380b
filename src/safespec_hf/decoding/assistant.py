"""What can draft: a model that speaks the target's vocabulary, out of what it may be wrapped in."""

from __future__ import annotations

import functools
import os
import sys
from weakref import WeakKeyDictionary

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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


def check_assistant(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raises unless the draft model speaks the target's vocabulary. A draft head is bound to the target.

    The draft's tokenizer is the one given, or else the one beside its weights, if that is on this machine; without
    either, sizes are all there is to compare. They may differ by padding and by added tokens.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        assistant ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*): The draft.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        assistant_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): The draft's.

    Raises:
        UnsupportedRequestError: Says what differs.
        HeadMismatchError: If a draft head was distilled from another target.
    """
    if assistant_tokenizer is not None:
        check_tokenizers(tokenizer, assistant_tokenizer, "`assistant_tokenizer`")
    if assistant is None:
        return
    if isinstance(assistant, DraftHead):
        assistant.bind(model)
        return
    check_kind(assistant)
    target_size = model.config.get_text_config().vocab_size
    draft_size = assistant.config.get_text_config().vocab_size
    if target_size != draft_size and min(target_size, draft_size) < tokenizer.vocab_size:
        raise UnsupportedRequestError(
            f"The draft model's vocabulary has {draft_size} entries and the target's {target_size}, with "
            f"{tokenizer.vocab_size} tokens in the tokenizer. Use a draft model with the same tokenizer."
        )
    name = assistant.config.name_or_path
    if assistant_tokenizer is None and name and name != model.config.name_or_path:
        found = local_tokenizer(os.path.abspath(name) if os.path.isdir(name) else name)
        if found is not None:
            check_tokenizers(tokenizer, found, f"The draft model's tokenizer, beside {name!r},")
    check_model(assistant, has_states=False)  # last, since it takes forwards


@functools.lru_cache(maxsize=8)
def local_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or in the cache of the Hub, if there is one; nothing is downloaded or run."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return None


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, other: object, title: str) -> None:
    """Raises unless two tokenizers mean the same by every id that both know. Tokens may be added to either.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        other ([`~transformers.PreTrainedTokenizerBase`]): The other one.
        title (`str`): What to call it in an error.

    Raises:
        UnsupportedRequestError: Shows an id that differs.
    """
    if not isinstance(other, PreTrainedTokenizerBase):
        raise UnsupportedRequestError(f"{title} must be a tokenizer, but it is a {type(other).__name__}.")
    sizes, known = (len(tokenizer), len(other)), _agreed.setdefault(tokenizer, WeakKeyDictionary())
    if other is tokenizer or known.get(other) == sizes:
        return
    ours, theirs = ({id_: token for token, id_ in each.get_vocab().items()} for each in (tokenizer, other))
    # models of a family rename the special tokens that are to spare
    added = tokenizer.added_tokens_decoder.keys() & other.added_tokens_decoder.keys()
    different = [id_ for id_ in sorted((ours.keys() & theirs.keys()) - added) if ours[id_] != theirs[id_]]
    if different:
        raise UnsupportedRequestError(
            f"{title} is another one than the target's: {len(different)} of {len(ours)} ids differ, such as "
            f"{different[0]}, which means {theirs[different[0]]!r} there and {ours[different[0]]!r} here. Use a draft "
            "model that shares the target's tokenizer."
        )
    known[other] = sizes
