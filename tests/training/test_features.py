import dataclasses
import subprocess
import sys
import time

import pytest
import tiny
import torch
from samples import make_examples, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from safespec_hf import SafeSpecConfig, modeling
from safespec_hf.answer.pooling import PooledStates, find_newline_ids, pool, pooling_weights, segment_counts
from safespec_hf.training.data import load_examples
from safespec_hf.training.features import READINGS, FeatureSettings, extract_features
from safespec_hf.training.hidden import encode, read_hidden, score_answers

SETTINGS = FeatureSettings(layers=(1, 2), prefix_tokens=(1, 4, 8), num_shard_examples=5, num_batch_tokens=64)


@pytest.fixture
def features(target, chat_tokenizer, examples, tmp_path):
    return extract_features(target, chat_tokenizer, examples, tmp_path, SETTINGS)


def decode_token_by_token(model, tokenizer, example, reading):
    """What decoding would see: one token at a time, pooled state by pooled state."""
    text = encode(tokenizer, example, 99, 99)
    newline_ids, policy, states, num_open = modeling.find_newline_ids(tokenizer), SafeSpecConfig(), PooledStates(), 0
    for index, token in enumerate(text.response_ids):
        ids = torch.tensor([text.prompt_ids + text.response_ids[: index + 1]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        (count,), num_open = segment_counts(
            num_open, [token in newline_ids], policy.min_segment_tokens, policy.max_segment_tokens
        )
        weights = pooling_weights(
            [count if reading.span == "segment" else index], reading.pooling, SETTINGS.ewma_decay
        )
        states.append(pool(states.last(), torch.cat([hidden[1][0, -1:], hidden[2][0, -1:]], dim=-1), weights))
        yield states.last()


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.name)
def test_features_are_what_decoding_computes(target, chat_tokenizer, examples, features, reading):
    example = 3
    expected = list(decode_token_by_token(target, chat_tokenizer, examples[example], reading))
    is_mine = features.example == example
    for num_tokens, state in zip(features.num_tokens[is_mine], features.states[reading.name][is_mine], strict=True):
        # bfloat16 keeps 8 bits of mantissa
        torch.testing.assert_close(state.float().flatten(), expected[num_tokens - 1], rtol=2**-7, atol=2**-7)


def test_layers_above_the_highest_one_read_do_not_run(chat_tokenizer, examples):
    model, text, calls = tiny.build_model(num_hidden_layers=4), encode(chat_tokenizer, examples[0], 99, 99), []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    (hidden_TF,) = read_hidden(model, [text], [1])
    assert calls == [0, 1]
    assert model.config.num_hidden_layers == 4
    full = model(torch.tensor([text.prompt_ids + text.response_ids]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(hidden_TF, full[0, len(text.prompt_ids) :])


def test_risks_are_what_decoding_computes(target, chat_tokenizer, examples):
    head = tiny.build_head(target, hidden_layers=[1, 2], pooling="mean", span="segment")
    risks = dict(score_answers(target, chat_tokenizer, head, examples[:6], num_batch_tokens=80))
    states = list(decode_token_by_token(target, chat_tokenizer, examples[5], READINGS[1]))
    # sums in another order: float32 noise
    torch.testing.assert_close(risks[5], head.risk(torch.stack(states)).detach(), rtol=1e-4, atol=1e-5)


def test_newlines_are_those_of_decoding(chat_tokenizer):
    assert find_newline_ids(chat_tokenizer) == modeling.find_newline_ids(chat_tokenizer)


def test_every_answer_has_its_prefixes_in_order(features, examples):
    assert features.example.unique_consecutive().tolist() == list(range(len(examples)))
    assert int(features.is_last.sum()) == len(examples)
    assert all(tensor.shape[1:] == (2, 32) for tensor in features.states.values())


def test_a_cache_is_read_and_not_made_again(target, chat_tokenizer, examples, features, tmp_path):
    target.forward = None
    again = extract_features(target, chat_tokenizer, examples, tmp_path, SETTINGS)
    assert torch.equal(again.states["mean-answer"], features.states["mean-answer"])


def test_other_settings_have_another_cache(target, chat_tokenizer, examples, features, tmp_path):
    extract_features(target, chat_tokenizer, examples, tmp_path, dataclasses.replace(SETTINGS, layers=(2,)))
    assert len(list(tmp_path.iterdir())) == 2


READ = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from safespec_hf.training.data import load_examples
from safespec_hf.training.data import load_examples
from safespec_hf.training.features import FeatureSettings, extract_features
folder, data, cache = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
settings = FeatureSettings(layers=(1, 2), prefix_tokens=(1, 4, 8), num_shard_examples=5, num_batch_tokens=64)
extract_features(model, tokenizer, load_examples([data]), cache, settings)
"""


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}


def test_a_killed_run_goes_on_and_gives_the_same_files(target_folder, tmp_path):
    data, killed = tmp_path / "x.jsonl", tmp_path / "killed"
    write_lines(data, [example.to_json() for example in make_examples(400)])
    process = subprocess.Popen([sys.executable, "-c", READ, str(target_folder), str(data), str(killed)])
    while process.poll() is None and len(read_all(killed)) < 3:
        time.sleep(0.005)
    process.kill()
    process.wait()
    num_before = len(read_all(killed))
    model = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    for cache in (killed, tmp_path / "whole"):
        extract_features(model, tokenizer, load_examples([data]), cache, SETTINGS)
    assert 3 <= num_before < len(read_all(tmp_path / "whole"))
    assert read_all(killed) == read_all(tmp_path / "whole")
