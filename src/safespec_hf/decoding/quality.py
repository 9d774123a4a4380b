"""The target's grade for a segment: a digit, read off its logits after the quality prompt.

Shapes: B rows, V vocabulary, D = 10 digits, S spellings of a digit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import QualityReading

_DIGITS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[list[int]]]] = WeakKeyDictionary()


def find_digit_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[list[int]]:
    """For each digit from 0 to 9 all tokens that are nothing but that digit, with or without space around it.

    The whole vocabulary is decoded once per tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        vocab_size (`int`): Tokens that the target has logits for.
    """
    num_tokens, found = _DIGITS.get(tokenizer, (-1, []))
    if num_tokens != len(tokenizer):
        found = [[] for _ in range(10)]
        for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(len(tokenizer))])):
            # the digits of every script: which of them the model prefers is not for us to know
            digit = unicodedata.decimal(text.strip(), None) if len(text.strip()) == 1 else None
            if digit is not None:
                found[int(digit)].append(token)
        _DIGITS[tokenizer] = len(tokenizer), found
    return [[token for token in ids if token < vocab_size] for ids in found]


def read_quality(logits_BV: Tensor, digit_ids: Sequence[Sequence[int]], reading: QualityReading) -> Tensor:
    """The grade that each row's logits give.

    Args:
        logits_BV (`torch.Tensor` of shape `(B, V)`): After the quality prompt.
        digit_ids (`Sequence[Sequence[int]]`): Of each digit the tokens that spell it, at least one.
        reading (`"argmax"` or `"expected"`): The likeliest digit, or their mean by their probabilities.

    Returns:
        `torch.FloatTensor` of shape `(B,)`: In [0, 9]; `nan` where the logits make no distribution of digits.

    Example:

        >>> import torch
        >>> logits = torch.tensor([[2.0, 1.0] + [-9.0] * 8 + [1.9]])
        >>> ids = [[0], [1, 10], *([digit] for digit in range(2, 10))]
        >>> read_quality(logits, ids, "argmax")
        tensor([1.])
    """
    all_ids = torch.tensor([token for ids in digit_ids for token in ids], device=logits_BV.device)
    spellings = logits_BV[:, all_ids].float().split([len(ids) for ids in digit_ids], dim=-1)
    probs_BD = torch.stack([logits_BS.logsumexp(dim=-1) for logits_BS in spellings], dim=-1).softmax(dim=-1)
    if reading == "expected":
        return probs_BD @ torch.arange(10.0, device=probs_BD.device)
    # softmax makes a row without any finite score, or with one that is not a number, all nan
    return torch.where(probs_BD[:, 0].isnan(), torch.nan, probs_BD.argmax(dim=-1).float())
