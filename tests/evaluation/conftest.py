"""An engine on tiny models, and sets of prompts for it."""

import pytest
import tiny
from evaluated import KINDS, write_sets

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.evaluation.engine import Engine
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
