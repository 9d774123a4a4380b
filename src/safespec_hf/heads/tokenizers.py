"""Tokenizers: how a head knows its own again, and where a model's own one is found."""

from __future__ import annotations

import hashlib
import json
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .loading import hub_arguments

logger = logging.get_logger(__name__)
MAX_ADDED_TOKENS = 64  # that are looked past; each costs another pass over the vocabulary, if the tokenizer is wrong

_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, int], str]] = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, num_ignored: int = 0) -> str:
    """16 hex digits over every token and its id: equal iff the vocabularies are.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        num_ignored (`int`, *optional*, defaults to 0): How many of the highest ids are left out.
    """
    known, key = _KNOWN.setdefault(tokenizer, {}), (len(tokenizer), num_ignored)
    if key not in known:
        tokens = tokenizer.get_vocab()
        for token in sorted(tokens, key=tokens.__getitem__, reverse=True)[:num_ignored]:
            del tokens[token]
        vocabulary = json.dumps(sorted(tokens.items()), ensure_ascii=True)
        known[key] = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
    return known[key]


def is_extension(tokenizer: PreTrainedTokenizerBase, fingerprint: str | None) -> bool:
    """Whether a tokenizer has the vocabulary of that fingerprint, whole, and a few added tokens after it."""
    added = set(tokenizer.get_added_vocab().values())
    on_top = 0
    while on_top < min(MAX_ADDED_TOKENS, len(added)) and len(tokenizer) - 1 - on_top in added:
        on_top += 1
        if tokenizer_fingerprint(tokenizer, on_top) == fingerprint:
            return True
    return False


def find_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights, if there is one; never waits for a Hub that isn't there.

    Args:
        name (`str`): Folder or Hub id of the model, or an empty string.
    """
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        pass  # not on this machine
    try:
        arguments = hub_arguments(name, {})
        if not arguments.get("local_files_only"):
            return AutoTokenizer.from_pretrained(name, **arguments)
        why = "the Hub can't be reached"
    except (OSError, ValueError) as error:
        why = type(error).__name__
    logger.warning("safespec-hf found no tokenizer for %s (%s).", name, why)
    return None
