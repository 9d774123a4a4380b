import dataclasses
import json

import pytest
from samples import make_examples

from safespec_hf import SafeSpecError
from safespec_hf.training.collect import CollectSettings, collect_answers
from safespec_hf.training.data import load_examples

SETTINGS = CollectSettings(max_new_tokens=6, batch_size=4)
PROMPTS = [dataclasses.replace(example, response="", label=0) for example in make_examples(10)]


@pytest.fixture
def collect(target, chat_tokenizer):
    return lambda out, **kwargs: collect_answers(
        target, chat_tokenizer, kwargs.pop("prompts", PROMPTS), out, **{"settings": SETTINGS, **kwargs}
    )


def test_answers_are_what_the_model_says_to_one_prompt_alone(collect, target, chat_tokenizer, tmp_path):
    collect(tmp_path / "x.jsonl")
    example = load_examples([tmp_path / "x.jsonl"])[0]
    inputs = chat_tokenizer.apply_chat_template(
        list(example.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = target.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    text = chat_tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert example.response == text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_kept", [0, 1, 4, 7])
def test_an_interrupted_run_goes_on_and_gives_the_same_file(collect, tmp_path, temperature, num_kept):
    settings = dataclasses.replace(SETTINGS, temperature=temperature)
    whole, partial = tmp_path / "whole.jsonl", tmp_path / "partial.jsonl"
    collect(whole, settings=settings)
    collect(partial, settings=settings)
    lines = whole.read_bytes().splitlines(keepends=True)
    # a kill left some lines, and half of the next one
    partial.write_bytes(b"".join(lines[:num_kept]) + lines[num_kept][:20])
    assert collect(partial, settings=settings) == len(lines) - num_kept
    assert partial.read_bytes() == whole.read_bytes()


def test_a_finished_file_is_left_alone(collect, tmp_path):
    assert collect(tmp_path / "x.jsonl") == 10
    assert collect(tmp_path / "x.jsonl") == 0


def test_a_file_begun_with_other_settings_is_refused(collect, tmp_path):
    collect(tmp_path / "x.jsonl")
    with pytest.raises(SafeSpecError, match="other settings"):
        collect(tmp_path / "x.jsonl", settings=dataclasses.replace(SETTINGS, max_new_tokens=7))


def test_a_labeler_labels_and_what_it_cannot_label_is_left_out(collect, tmp_path):
    collect(tmp_path / "x.jsonl", labeler=lambda answers: [None, *[1] * (len(answers) - 1)])
    labels = [json.loads(line)["label"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert labels == [1] * 7
