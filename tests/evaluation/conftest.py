"""An engine on tiny models, sets of prompts for it, and a tiny encoder."""

import pytest
import tiny
import torch
from evaluated import KINDS, write_sets
from transformers import BertConfig, BertModel

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.evaluation.engine import Engine
from safespec_hf.evaluation.judges_embedding import SentenceEmbedder
from safespec_hf.evaluation.prompts import load_prompt_sets


@pytest.fixture
def files(tmp_path):
    return write_sets(tmp_path)


@pytest.fixture
def sets(files):
    return load_prompt_sets({KINDS[name]: [path] for name, path in files.items()})


@pytest.fixture
def engine(target, draft, noisy, chat_tokenizer):
    """The head flags about a third of all tokens, so that most answers are recovered or refused."""
    attach_safety_head(target, noisy, tokenizer=chat_tokenizer, policy=SafeSpecConfig(**tiny.FIELDS))
    return Engine(model=target, tokenizer=chat_tokenizer, draft=draft, max_new_tokens=12)


@pytest.fixture
def encoder(tmp_path):
    """The folder of a tiny random encoder with its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    tokenizer = tiny.build_tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def embedder(encoder):
    return SentenceEmbedder(encoder, device="cpu")
