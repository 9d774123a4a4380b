"""Characters of several tokens are never cut: not by a rollback, a refusal, a segment's end or a stream."""

import random

import pytest
import torch
from scripted import ScriptedModel, probe
from tiny import Recorder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safespec_hf import Provenance, SafeSpecConfig, attach_safety_head
from safespec_hf.answer.characters import BYTE_OF, Piece, character_edges, find_pieces
from safespec_hf.answer.rows import Row

TEXT = "Gärten blühen 花园里的花 🌱🌷 по весне\nund im Café €5 🌻\n"
SPECIAL = ["<pad>", "<s>", "</s>"]


def byte_level():
    """A token for every byte, as byte-level BPE has before any merge."""
    vocabulary = dict(BYTE_OF)
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def byte_fallback():
    """A token for every byte, as vocabularies of SentencePiece have for what they have no token for."""
    backend = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_tokens_that_are_no_whole_characters(kind):
    pieces = find_pieces(TOKENIZERS[kind])
    assert set(pieces) == set(range(128, 256))
    assert (pieces[0xE2], pieces[0x82]) == (Piece(0, 2), Piece(1, None))


def test_letters_that_byte_level_vocabularies_write_bytes_with_are_letters_elsewhere(tokenizer):
    assert find_pieces(tokenizer) == {}
    backend = Tokenizer(models.WordLevel({"é": 0, "äö": 1, "<unk>": 2}, unk_token="<unk>"))
    assert find_pieces(PreTrainedTokenizerFast(tokenizer_object=backend)) == {}


@pytest.mark.parametrize("seed", range(20))
def test_edges_are_where_a_decoder_finds_whole_characters(seed):
    pieces, choose = find_pieces(TOKENIZERS["byte level"]), random.Random(seed)
    data = "".join(choose.choices(TEXT, k=20)).encode()
    edges, _ = character_edges(0, list(data), pieces)
    for end in range(1, len(data) + 1):
        is_whole = "\ufffd" not in data[:end].decode("utf-8", "replace")
        assert edges[end - 1].after is is_whole
        assert end == len(data) or edges[end].before is is_whole


def test_a_character_that_the_model_broke_off_holds_nothing_up():
    edges, missing = character_edges(0, [0xF0, 0xF0, 0x41, 0x80], find_pieces(TOKENIZERS["byte level"]))
    assert [edge.before for edge in edges] == [True] * 4
    assert missing == [3, 3, 0, 0]


@pytest.mark.parametrize("max_segment_tokens", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_segments_begin_at_characters_and_counts_agree_however_tokens_come(max_segment_tokens, seed):
    policy, choose, data = SafeSpecConfig(max_segment_tokens=max_segment_tokens), random.Random(seed), TEXT.encode()
    pieces = find_pieces(TOKENIZERS["byte level"])
    row = Row(0, torch.tensor([65]), torch.tensor([True]), max_new_tokens=999, policy=policy, pieces=pieces)
    while len(row.tokens) < len(data):
        ahead = list(data[len(row.tokens) :][: choose.randint(1, 6)])
        counts = row.segments.counts_ahead(ahead)
        for token in ahead:
            row.append(token, Provenance.TARGET)
        assert row.segments.counts[-len(ahead) :] == counts
        row.truncate(choose.randint(max(len(row.tokens) - 3, 0), len(row.tokens)))
    assert all("\ufffd" not in bytes(row.tokens[:start]).decode("utf-8", "replace") for start in row.segments.starts)
    assert max(row.segments.counts) <= max_segment_tokens + 2  # a character has four bytes at most


def write_whole_characters(context):
    """Goes on with a character that is not finished, else begins one of the text, whatever came before."""
    for size in (3, 2, 1):
        tail = bytes(token for token in context[-size:] if token < 256)
        for letter in TEXT:
            if letter.encode().startswith(tail) and len(letter.encode()) > len(tail) == size:
                return letter.encode()[size]
    return TEXT[len(context) % len(TEXT)].encode()[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_rolled_back_refused_or_streamed_no_character_is_broken(kind, seed):
    choose, tokenizer, data = random.Random(seed), TOKENIZERS[kind], TEXT.encode()
    model = ScriptedModel(write_whole_characters, vocab_size=len(tokenizer))
    attach_safety_head(model, probe(model), tokenizer=tokenizer)
    model.risks = {choose.choice(data): 0.9 for _ in range(choose.randint(1, 3))}
    policy = SafeSpecConfig(
        max_segment_tokens=choose.randint(1, 9),
        min_segment_tokens=choose.randint(1, 3),
        rollback_segments=choose.randint(0, 2),
        num_candidates=2,
        max_recoveries=choose.randint(0, 2),
        reflection=choose.choice(["", "warte "]),
        refusal="Nein, вот так: 花園 🌱.",
    )
    streamer, most = Recorder(), choose.randint(1, 150)
    output = model.generate(
        torch.tensor([[65]]), max_new_tokens=most, do_sample=False, safespec=policy, streamer=streamer,
        return_dict_in_generate=True, prompt_lookup_num_tokens=choose.choice([None, 4]),
    )  # fmt: skip
    tokens = bytes(token for token in output.sequences[0].tolist() if token < 256)
    text = tokens.decode("utf-8", "replace")
    # where the model was cut by the length limit, the last character may be unfinished, as in plain `generate`
    assert "\ufffd" not in (text if output.finish_reasons == ["safety_refusal"] else text.rstrip("\ufffd"))
    assert bytes(token for token in streamer.tokens if token < 256) == tokens
