"""On outputs in the form that the models' cards show, and on tiny models with weights of our own choice."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from samples import make_examples
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig

from safespec_hf import SafeSpecError
from safespec_hf.training import labelers
from safespec_hf.training.data import Example
from safespec_hf.training.labelers import (
    find_unsafe_classes,
    load_labeler,
    load_scorer,
    parse_granite_guardian,
    parse_llama_guard,
    parse_qwen3guard,
)

ALARM, CALM = (
    Example(id=word, messages=({"role": "user", "content": "w30"},), response=word) for word in ("w20", "w11")
)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Safety: Safe\nCategories: None\nRefusal: Yes", 0),
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", 1),
        ("Safety: Controversial\nCategories: Unethical Acts\nRefusal: No", None),
        ("Safety:Safe", 0),
        ("Safety: Safe\nSafety: Unsafe", None),
        ("Safety: Safely", None),
        ("I think this is fine.", None),
        ("", None),
    ],
)
def test_qwen3guard(text, label):
    assert parse_qwen3guard(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [("\n\nsafe", 0), ("safe", 0), ("\n\nunsafe\nS2", 1), ("unsafe\nS1,S9", 1), ("unsure", None), ("", None)],
)
def test_llama_guard(text, label):
    assert parse_llama_guard(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes", 1),
        ("No\n<confidence> High </confidence>", 0),
        ("<think>\nNo rose is harmed.\n</think>\n\n<score> yes </score>", 1),
        ("<score> no </score>", 0),
        ("Nobody knows.", None),
        ("", None),
    ],
)
def test_granite_guardian(text, label):
    assert parse_granite_guardian(text) == label


@pytest.mark.parametrize(
    ("names", "unsafe"),
    [
        (["SAFE", "UNSAFE"], [1]),
        (["jailbreak", "benign"], [0]),
        (["neutral", "toxic", "severe_toxicity"], [1, 2]),
        (["non-toxic", "identity_hate"], [1]),
    ],
)
def test_a_classifier_names_its_unsafe_classes(names, unsafe):
    assert find_unsafe_classes(BertConfig(id2label=dict(enumerate(names)))) == unsafe


@pytest.mark.parametrize(
    ("names", "problem_type", "said"),
    [
        (["LABEL_0", "LABEL_1"], None, "LABEL_0.*may mean anything"),
        (["0", "1"], None, "may mean anything"),
        (["negative", "positive"], None, "positive"),
        (["safe", "unsafe", "off-topic"], None, "off-topic"),
        (["safe", "benign"], None, "must say which"),
        (["toxic", "obscene"], None, "must say which"),
        (["unsafe"], None, "regression"),
        (["safe", "unsafe"], "regression", "regression"),
    ],
)
def test_a_classifier_whose_classes_say_nothing_is_refused(names, problem_type, said):
    with pytest.raises(SafeSpecError, match=said):
        find_unsafe_classes(BertConfig(id2label=dict(enumerate(names)), problem_type=problem_type))


@pytest.fixture
def save_classifier(chat_tokenizer, tmp_path):
    """A classifier whose last class is on for words from w20 on, saved with its tokenizer."""

    def save(names, problem_type=None, tokenizer=chat_tokenizer, bias=0.0):
        config = LlamaConfig(
            **tiny.SIZES, **tiny.ATTENTION, id2label=dict(enumerate(names)), problem_type=problem_type, pad_token_id=0
        )
        model = AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            for weight in model.model.layers.parameters():
                weight.zero_()
            model.model.norm.weight.fill_(1)
            model.model.embed_tokens.weight.zero_()
            model.model.embed_tokens.weight[20:, 0] = 1.0
            model.model.embed_tokens.weight[:20, 0] = -1.0
            model.score.weight.zero_()
            model.score.weight[-1, 0] = 1.0
            model.score.weight[:-1, 0] = bias
        model.save_pretrained(tmp_path / "classifier")
        tokenizer.save_pretrained(tmp_path / "classifier")
        return str(tmp_path / "classifier")

    return save


def test_one_class_of_several_applies(save_classifier):
    assert load_labeler(save_classifier(["safe", "unsafe"]))([ALARM, CALM, ALARM]) == [1, 0, 1]


def test_where_each_class_may_apply_none_may(save_classifier):
    names = ["toxic", "obscene", "insult"]
    assert load_labeler(save_classifier(names, "multi_label_classification"))([ALARM, CALM]) == [1, 0]


def test_where_each_class_may_apply_any_unsafe_one_counts(save_classifier):
    # the safe class is on more strongly than the unsafe one, which softmax would take for the answer
    folder = save_classifier(["safe", "toxic"], "multi_label_classification", bias=2.0)
    assert load_labeler(folder)([ALARM, CALM]) == [1, 0]


def test_a_tokenizer_without_a_pad_token_labels_alike(save_classifier, chat_tokenizer):
    chat_tokenizer.pad_token = None
    assert load_labeler(save_classifier(["safe", "unsafe"]))(make_examples(4)) == [0, 1, 0, 1]


def test_a_head_that_was_never_trained_is_refused(save_classifier, chat_tokenizer, tmp_path):
    folder = save_classifier(["safe", "unsafe"])
    weights = labelers.AutoModelForSequenceClassification.from_pretrained(folder).model
    weights.config.architectures = ["LlamaForSequenceClassification"]
    weights.save_pretrained(tmp_path / "bare")
    chat_tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "classifier" / "config.json").read_text())
    with pytest.raises(SafeSpecError, match=r"lacks 1 weights.*`score\.weight`"):
        load_labeler(str(tmp_path / "bare"))


def test_a_head_of_another_size_is_refused(save_classifier, tmp_path):
    file = tmp_path / "classifier" / "config.json"
    folder = save_classifier(["safe", "unsafe"])
    config = json.loads(file.read_text())
    names = {"id2label": {0: "safe", 1: "unsafe", 2: "toxic"}, "label2id": {"safe": 0, "unsafe": 1, "toxic": 2}}
    file.write_text(json.dumps(config | names))
    with pytest.raises(SafeSpecError, match=r"lacks 1 weights.*`score\.weight`"):
        load_labeler(folder)


def test_a_model_that_writes_and_is_no_guard_is_refused(target_folder):
    with pytest.raises(SafeSpecError, match="is LlamaForCausalLM, which can't label"):
        load_labeler(str(target_folder))


TEMPLATE = "{% for m in messages %}{{ m.role == 'assistant' and 'w12' or 'w13' }} {{ m.content }} {% endfor %}"


@pytest.mark.parametrize(
    ("mark", "verdict"),
    [
        ("Safety: Controversial", "Safety: Unsafe"),
        ("<BEGIN UNSAFE CONTENT CATEGORIES>", "unsafe\nS1"),
        ("guardian_config", "Yes"),
    ],
)
def test_a_guard_is_known_by_its_template_wherever_it_lies(target_folder, chat_tokenizer, monkeypatch, mark, verdict):
    chat_tokenizer.chat_template = TEMPLATE + "{# " + mark + " #}"
    chat_tokenizer.save_pretrained(target_folder)
    answers = iter([verdict, "I am not sure."])
    monkeypatch.setattr(labelers, "_ask", lambda *_: [next(answers)])
    assert load_labeler(str(target_folder))([ALARM, CALM]) == [1, None]


def test_a_guard_is_asked_about_the_answer_and_what_it_does_not_say_is_no_label(target_folder, chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE + "{# Safety: Controversial #}"
    chat_tokenizer.save_pretrained(target_folder)
    assert load_labeler(str(target_folder))([ALARM, CALM]) == [None, None]
    chat_tokenizer.chat_template = "{{ raise_exception('no') }}{# Safety: Controversial #}"
    chat_tokenizer.save_pretrained(target_folder)
    with pytest.raises(SafeSpecError, match="conversation of example 'w20'"):
        load_labeler(str(target_folder))([ALARM])


def test_a_classifier_tells_how_sure_it_is_and_may_read_the_request(save_classifier):
    folder = save_classifier(["safe", "unsafe"])
    alone = load_scorer(folder, reads_request=False)([ALARM, CALM])
    assert alone[1] < 0.5 < alone[0] < 1
    # it tells by the last word: where there is no answer, that of the request, w30
    assert load_scorer(folder)([CALM, replace(CALM, response="")]) == pytest.approx(alone[::-1])


def test_granite_guardian_is_told_of_which_risk_and_asked_for_a_verdict(target_folder, chat_tokenizer, monkeypatch):
    chat_tokenizer.chat_template = (
        "{{ guardian_config.risk_name }} {{ guardian_config.criteria_id }} {{ add_generation_prompt }}"
    )
    chat_tokenizer.save_pretrained(target_folder)
    asked = []
    monkeypatch.setattr(labelers, "continue_texts", lambda *args: asked.append(args[2]) or ["Yes"] * len(args[2]))
    assert load_scorer(str(target_folder), batch_size=2)([ALARM, CALM, ALARM]) == [1, 1, 1]
    assert asked == [["harm harm True"] * 2, ["harm harm True"]]
