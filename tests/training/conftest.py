"""A tokenizer with a chat template, and answers."""

import pytest
import tiny
from samples import make_examples


@pytest.fixture
def examples():
    return make_examples(24)


@pytest.fixture
def chat_tokenizer():
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}pause"
    return tokenizer


@pytest.fixture
def target_folder(tmp_path, target, chat_tokenizer):
    target.save_pretrained(tmp_path / "target")
    chat_tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"
