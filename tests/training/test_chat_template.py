"""A base model is asked in plain text, and its answer ends where the next question would begin."""

import dataclasses

import pytest
import tiny
from samples import make_examples

from safespec_hf import SafeSpecError
from safespec_hf.training.chat_template import PLAIN_TEMPLATE, next_turn, read_template, set_chat_template
from safespec_hf.training.collect import CollectSettings, collect_answers
from safespec_hf.training.data import Example, load_examples
from safespec_hf.training.hidden import encode, render_prompt

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Why mulch? "},
    {"role": "assistant", "content": "It keeps water.\n"},
    {"role": "user", "content": "And in winter?"},
]


@pytest.fixture
def base_tokenizer():
    return tiny.build_tokenizer()


@pytest.fixture
def plain_tokenizer(base_tokenizer):
    set_chat_template(base_tokenizer, PLAIN_TEMPLATE)
    return base_tokenizer


def test_plain_is_questions_and_answers_under_their_names(plain_tokenizer):
    assert plain_tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) == (
        "<s>Be brief.\n\nQuestion:\nWhy mulch?\n\nAnswer:\nIt keeps water.\n\nQuestion:\nAnd in winter?\n\nAnswer:\n"
    )


def test_plain_begins_with_no_token_where_there_is_none_to_begin_with(plain_tokenizer):
    plain_tokenizer.bos_token = None
    assert plain_tokenizer.apply_chat_template(CHAT[1:2], tokenize=False) == "Question:\nWhy mulch?\n\n"


def test_a_prompt_in_plain_text_begins_with_one_beginning_token(plain_tokenizer):
    example = Example(id="x", messages=({"role": "user", "content": "w10"},), response="w11", label=0)
    assert encode(plain_tokenizer, example, 99, 99).prompt_ids.count(plain_tokenizer.bos_token_id) == 1


def test_a_template_comes_from_a_file(base_tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}Q: {{ m.content }}\n{% endfor %}A:\n")
    set_chat_template(base_tokenizer, read_template(str(tmp_path / "own.jinja")))
    assert base_tokenizer.apply_chat_template(CHAT[3:], tokenize=False) == "Q: And in winter?\nA:"


@pytest.mark.parametrize(
    ("content", "said"), [(None, "`plain` or a file"), (b"\xff\xfe", "`plain`"), (b" \n", "empty")]
)
def test_what_is_no_template_is_told(tmp_path, content, said):
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(SafeSpecError, match=said):
        read_template(str(tmp_path / "own.jinja"))


def test_a_tokenizer_keeps_a_chat_template_of_its_own(chat_tokenizer):
    own = chat_tokenizer.chat_template
    set_chat_template(chat_tokenizer, own)
    with pytest.raises(SafeSpecError, match="has a chat template of its own"):
        set_chat_template(chat_tokenizer, PLAIN_TEMPLATE)
    assert chat_tokenizer.chat_template == own


@pytest.mark.parametrize("template", ["{% for", "{{ messages[3].content.split() }}", "{{ raise_exception('no') }}"])
def test_a_template_that_renders_no_question_is_told_at_once(base_tokenizer, template):
    with pytest.raises(SafeSpecError, match="can't render a question"):
        set_chat_template(base_tokenizer, template)


def test_a_missing_template_is_told_with_the_option_that_gives_one(base_tokenizer):
    with pytest.raises(SafeSpecError, match="--chat-template plain"):
        render_prompt(base_tokenizer, make_examples(1)[0])


IN_TURNS = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}"
IN_TURNS += "{% endif %}{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN_TEMPLATE, "\n\nQuestion:"),
        ("{% for m in messages %}{{ '\nQ: ' if m.role == 'user' else '\nA: ' }}{{ m.content }}{% endfor %}", "\nQ:"),
        (IN_TURNS, ""),  # an end token ends its answers
        ("{% for m in messages %}{{ m.content }} {% endfor %}", ""),  # nothing but a space marks a turn
        ("{{ messages[0].content }}", ""),  # it renders one question only
        ("{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ messages[0].content }}", ""),
    ],
)
def test_the_next_turn_is_what_stands_before_the_next_question(base_tokenizer, template, expected):
    base_tokenizer.chat_template = template
    assert next_turn(base_tokenizer) == expected


PROMPTS = [dataclasses.replace(example, response="", label=0) for example in make_examples(6)]
# as the template of the tests, but for what it puts before every question after the first
LATER = (
    "{{% for m in messages %}}{{{{ '{} ' if m.role == 'user' and not loop.first }}}}{{{{ m.content }}}} {{% endfor %}}"
)
SETTINGS = CollectSettings(max_new_tokens=12, batch_size=3)


def test_an_answer_ends_before_the_next_question(target, chat_tokenizer, tmp_path, monkeypatch):
    collect_answers(target, chat_tokenizer, PROMPTS, tmp_path / "open.jsonl", settings=SETTINGS)
    whole = {example.id: example.response for example in load_examples([tmp_path / "open.jsonl"])}
    mark = next(word for answer in whole.values() for word in answer.split()[2:6] if word.startswith("w"))
    chat_tokenizer.chat_template = LATER.format(mark) + "pause"
    widths, generate = [], target.generate
    monkeypatch.setattr(target, "generate", lambda **kwargs: widths.append(generate(**kwargs)) or widths[-1])
    first = [example for example in PROMPTS if f" {mark}" in whole[example.id]][:1]
    collect_answers(target, chat_tokenizer, first, tmp_path / "one.jsonl", settings=SETTINGS)
    collect_answers(target, chat_tokenizer, PROMPTS, tmp_path / "ended.jsonl", settings=SETTINGS)
    ended = {example.id: example.response for example in load_examples([tmp_path / "ended.jsonl"])}
    expected = {name: answer.partition(f" {mark}")[0] for name, answer in whole.items()}
    assert ended == {name: answer for name, answer in expected.items() if answer}
    assert ended != whole
    prompt = chat_tokenizer(render_prompt(chat_tokenizer, first[0]))["input_ids"]
    assert widths[0].shape[1] < len(prompt) + SETTINGS.max_new_tokens  # it is not only cut afterwards


def test_answers_that_end_elsewhere_are_not_added_to_a_file(target, chat_tokenizer, tmp_path):
    collect_answers(target, chat_tokenizer, PROMPTS, tmp_path / "x.jsonl", settings=SETTINGS)
    chat_tokenizer.chat_template = LATER.format("w12") + "pause"
    with pytest.raises(SafeSpecError, match="begun with other settings"):
        collect_answers(target, chat_tokenizer, PROMPTS, tmp_path / "x.jsonl", settings=SETTINGS)
