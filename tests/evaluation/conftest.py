import pytest
import tiny
import torch
from transformers import BertConfig, BertModel

from safespec_hf.evaluation.judges_embedding import SentenceEmbedder


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
