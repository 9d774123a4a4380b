import dataclasses
import json

import pytest
import torch
from samples import make_examples

from safespec_hf import SafeSpecError
from safespec_hf.training.collect import CollectSettings, NamedLabeler, collect_answers
from safespec_hf.training.data import Example, load_examples
from safespec_hf.training.files import DataError
from safespec_hf.training.hidden import encode

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


@pytest.fixture
def bare_tokenizer(chat_tokenizer):
    """As of many models that were never padded: GPT-2, Llama."""
    chat_tokenizer.pad_token = None
    return chat_tokenizer


def test_a_tokenizer_without_a_pad_token_gives_the_same_answers_and_stays_as_it_is(
    collect, target, bare_tokenizer, tmp_path
):
    collect_answers(target, bare_tokenizer, PROMPTS, tmp_path / "bare.jsonl", settings=SETTINGS)
    assert bare_tokenizer.pad_token is None
    bare_tokenizer.pad_token = "<pad>"
    collect(tmp_path / "padded.jsonl")
    assert (tmp_path / "bare.jsonl").read_bytes() == (tmp_path / "padded.jsonl").read_bytes()


def test_an_answer_ends_at_its_end_token_whatever_the_batch_is_padded_with(collect, target, tmp_path):
    collect(tmp_path / "open.jsonl")
    words = [example.response.split() for example in load_examples([tmp_path / "open.jsonl"])]
    end = next(word for answer in words for word in answer[1:4] if word.startswith("w"))
    target.generation_config.eos_token_id = int(end[1:])
    collect(tmp_path / "ended.jsonl")
    ended = {example.id: example.response.split() for example in load_examples([tmp_path / "ended.jsonl"])}
    for example, answer in zip(load_examples([tmp_path / "open.jsonl"]), words, strict=True):
        expected = answer[: answer.index(end)] if end in answer else answer
        assert ended.get(example.id, []) == expected


NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
NO_SYSTEM += "{{ m.content }} {% endfor %}pause"
IN_TURNS = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
IN_TURNS += "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} {% endfor %}pause"


@pytest.mark.parametrize(
    ("template", "roles", "said"),
    [
        (NO_SYSTEM, ["system", "user"], "conversation of example 'x' .roles: system, user.: no system role"),
        (IN_TURNS, ["user", "user"], "example 'x'.*roles must alternate"),
        (IN_TURNS, ["system", "user"], "example 'x'.*roles must alternate"),
        ("{{ messages[3].content.split() }}", ["user"], "example 'x'"),
        ("{% for", ["user"], "example 'x'"),
        (None, ["user"], "no chat template"),
    ],
)
def test_what_a_chat_template_refuses_is_named_before_anything_is_generated(
    collect, target, chat_tokenizer, tmp_path, template, roles, said
):
    chat_tokenizer.chat_template, target.forward = template, None
    odd = Example(id="x", messages=tuple({"role": role, "content": "w10"} for role in roles), response="w11", label=0)
    with pytest.raises(SafeSpecError, match=said):
        collect(tmp_path / "x.jsonl", prompts=[odd])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SafeSpecError, match=said):
        encode(chat_tokenizer, odd, 99, 99)


def test_an_output_that_is_not_ours_is_left_alone(collect, tmp_path):
    (tmp_path / "x.jsonl").write_text("roses\ntulips without an end")
    with pytest.raises(SafeSpecError, match="begun with other settings"):
        collect(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_text() == "roses\ntulips without an end"


def test_an_output_that_cannot_be_written_is_told_before_anything_is_generated(collect, target, tmp_path):
    (tmp_path / "file").write_text("")
    target.forward = None
    with pytest.raises(SafeSpecError, match="can be written to"):
        collect(tmp_path / "file" / "x.jsonl")


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"max_new_tokens": 1.5}, {"temperature": -1.0}, {"seed": -1}])
def test_a_setting_out_of_range_is_named(fields):
    with pytest.raises(SafeSpecError, match=f"`{next(iter(fields))}` must be"):
        CollectSettings(**fields)


def test_a_finished_file_is_left_alone(collect, tmp_path):
    assert collect(tmp_path / "x.jsonl") == 10
    assert collect(tmp_path / "x.jsonl") == 0


def test_a_file_begun_with_other_settings_is_refused(collect, tmp_path):
    collect(tmp_path / "x.jsonl")
    with pytest.raises(SafeSpecError, match="other settings"):
        collect(tmp_path / "x.jsonl", settings=dataclasses.replace(SETTINGS, max_new_tokens=7))


def other_weights(target, tokenizer):
    torch.nn.init.normal_(target.model.norm.weight)


def other_template(target, tokenizer):
    tokenizer.chat_template += "{# asked otherwise #}"


def other_dtype(target, tokenizer):
    target.bfloat16()


def other_end(target, tokenizer):
    target.generation_config.eos_token_id = 7


@pytest.mark.parametrize("change", [other_weights, other_template, other_dtype, other_end])
def test_a_file_that_another_target_began_is_refused(collect, target, chat_tokenizer, tmp_path, change):
    collect(tmp_path / "x.jsonl")
    before = (tmp_path / "x.jsonl").read_bytes()
    change(target, chat_tokenizer)
    with pytest.raises(SafeSpecError, match="other settings"):
        collect(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == before


def test_a_file_that_another_labeler_began_is_refused_and_told_what_differs(collect, tmp_path):
    def named(name):
        return NamedLabeler(lambda answers: [1] * len(answers), {"model": name})

    collect(tmp_path / "x.jsonl", labeler=named("one"))
    assert collect(tmp_path / "x.jsonl", labeler=named("one")) == 0
    with pytest.raises(SafeSpecError, match=r"{'labeler': {'model': 'one'}} there, {'labeler': {'model': 'two'}} now"):
        collect(tmp_path / "x.jsonl", labeler=named("two"))
    with pytest.raises(SafeSpecError, match=r"there, {'labeler': None} now"):
        collect(tmp_path / "x.jsonl")


def test_a_file_that_does_not_say_who_began_it_is_refused(collect, tmp_path):
    collect(tmp_path / "x.jsonl")
    for content in (json.dumps({**dataclasses.asdict(SETTINGS), "model": "owner/target"}), "[]", "{", ""):
        (tmp_path / "x.jsonl.settings.json").write_text(content)
        with pytest.raises(SafeSpecError, match="begun with other settings"):
            collect(tmp_path / "x.jsonl")


def test_blank_lines_of_the_file_are_passed_over(collect, tmp_path):
    collect(tmp_path / "x.jsonl")
    lines = (tmp_path / "x.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_bytes(b"\n  \r\n".join(lines))
    assert collect(tmp_path / "x.jsonl") == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "field `id`: missing"),
        ('{"id": 1}', "field `id`: missing, or no text"),
        ("null", "expected an object, got NoneType"),
        ("roses", "not JSON"),
    ],
)
def test_a_line_that_is_no_answer_is_told_with_its_place(collect, tmp_path, line, said):
    collect(tmp_path / "x.jsonl")
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(DataError, match=f"x.jsonl, line 12, .*{said}"):
        collect(tmp_path / "x.jsonl")


def test_a_labeler_labels_and_what_it_cannot_label_is_left_out_and_counted(collect, tmp_path, caplog):
    collect(tmp_path / "x.jsonl", labeler=lambda answers: [None, *[1] * (len(answers) - 1)])
    assert "3 answers are left out of x.jsonl" in caplog.text
    labels = [json.loads(line)["label"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert labels == [1] * 7
