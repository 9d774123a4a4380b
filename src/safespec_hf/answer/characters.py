"""Where characters begin and end, in tokenizers whose tokens are bytes: a character may take up to four of them.

An answer that is cut, ended by us or shown inside of a character is broken text. What each token adds to a character
is worked out once per tokenizer, so that no text is decoded while tokens are generated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + rank): byte for rank, byte in enumerate(OTHERS)}
"""The alphabet of byte-level vocabularies: printable bytes stand for themselves, the others follow from 256 on."""


class Piece(NamedTuple):
    """A token that is no whole characters.

    Attributes:
        num_first (`int`): Bytes at its beginning that go on with a character.
        num_missing (`int`, *optional*):
            Bytes that its last character still needs, 0 to 3. `None` for a token that only goes on with one.
    """

    num_first: int
    num_missing: int | None


class Edges(NamedTuple):
    """Whether a character ends before a token, and after it."""

    before: bool
    after: bool


def find_pieces(tokenizer: PreTrainedTokenizerBase) -> dict[int, Piece]:
    """All tokens that begin or end inside of a character."""
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    likely = {token: data for token, text in enumerate(texts) if (data := broken_bytes(text)) is not None}
    # letters of the byte alphabet are letters too: only decoding tells whether they stand for bytes here
    decoded = tokenizer.batch_decode([[token] for token in likely]) if likely else []  # 5.16 makes one text of none
    return {
        token: read_piece(data)
        for (token, data), text in zip(likely.items(), decoded, strict=True)
        if "\ufffd" in text
    }


def broken_bytes(text: str | bytes | None) -> bytes | None:
    """The bytes that a vocabulary's entry may stand for, if they are no whole characters.

    Example:

        >>> broken_bytes("<0xE2>"), broken_bytes("Ġgarden")
        (b'\\xe2', None)
    """
    if not text:
        return None
    if isinstance(text, bytes):
        data = text
    elif match := BYTE_FALLBACK.fullmatch(text):
        data = bytes([int(match[1], 16)])
    elif all(letter in BYTE_OF for letter in text):
        data = bytes(BYTE_OF[letter] for letter in text)
    else:
        return None
    return data if data.decode("utf-8", "replace").encode() != data else None


def read_piece(data: bytes) -> Piece:
    """What the bytes of a token do to a character.

    Example:

        >>> read_piece(b"\\x82\\xac"), read_piece(b"a\\xe2\\x82")
        (Piece(num_first=2, num_missing=None), Piece(num_first=0, num_missing=1))
    """
    is_first = [not 0x80 <= byte < 0xC0 for byte in data]
    if not any(is_first):
        return Piece(len(data), None)
    last = len(data) - 1 - is_first[::-1].index(True)
    lead = data[last]
    size = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 1
    return Piece(is_first.index(True), max(size - (len(data) - last), 0))


def character_edges(
    num_missing: int, tokens: Sequence[int], pieces: Mapping[int, Piece]
) -> tuple[list[Edges], list[int]]:
    """Whether characters end before and after each of some tokens.

    Args:
        num_missing (`int`): Bytes that the character before them still needs, 0 to 3.
        tokens (`Sequence[int]`): The tokens.
        pieces (`Mapping[int, Piece]`): Those of the vocabulary that are no whole characters.

    Returns:
        `tuple[list[Edges], list[int]]`: The edges, and the bytes that are missing after each token.

    Example:

        >>> euro = {1: Piece(0, 2), 2: Piece(1, None)}
        >>> character_edges(0, [1, 2, 2, 7], euro)[1]
        [2, 1, 0, 0]
    """
    edges, missing = [], []
    for token in tokens:
        piece = pieces.get(token)
        # a token that begins anew leaves a character before it broken: that is the model's own doing
        before = num_missing == 0 or piece is None or piece.num_first == 0
        if piece is None:
            num_missing = 0
        elif piece.num_missing is None:
            num_missing = max(num_missing - piece.num_first, 0)
        else:
            num_missing = piece.num_missing
        edges.append(Edges(before, num_missing == 0))
        missing.append(num_missing)
    return edges, missing
