"""Rows have the fields and the kinds of values that the sets' pages show, and harmless text."""

import datasets
import pytest

from safespec_hf import SafeSpecError
from safespec_hf.cli.make_head import PUBLIC_NAMES
from safespec_hf.training import files
from safespec_hf.training.data import Example, load_examples
from safespec_hf.training.files import DataError, RawRow
from safespec_hf.training.public_sets import PUBLIC_SETS, describe_set, draw_balanced, keep_public_set, to_example

ASK, SAY = "When are roses pruned?", "In late winter, above a bud."
SOURCES = {"prompt_label_source": "human", "response_label_source": "llm_jury"}
ROWS = {
    "beavertails": [
        {"prompt": ASK, "response": SAY, "category": {"weeds": False, "thorns": False}, "is_safe": True},
        {"prompt": ASK, "response": "Never.", "category": {"weeds": False, "thorns": True}, "is_safe": False},
    ],
    "wildguardmix": [
        {
            "prompt": ASK,
            "adversarial": False,
            "response": SAY,
            "prompt_harm_label": "unharmful",
            "response_refusal_label": "compliance",
            "response_harm_label": "unharmful",
            "subcategory": "benign",
        },
        {
            "prompt": ASK,
            "adversarial": True,
            "response": "Never.",
            "prompt_harm_label": "harmful",
            "response_refusal_label": "compliance",
            "response_harm_label": "harmful",
            "subcategory": "thorns",
        },
        {
            "prompt": ASK,
            "adversarial": False,
            "response": None,  # about half of the rows are prompts alone
            "prompt_harm_label": "harmful",
            "response_refusal_label": None,
            "response_harm_label": None,
            "subcategory": "thorns",
        },
    ],
    "aegis": [
        {
            "id": "a1",
            "reconstruction_id_if_redacted": None,
            "prompt": ASK,
            "response": SAY,
            "prompt_label": "safe",
            "response_label": "safe",
            "violated_categories": "",
            **SOURCES,
        },
        {
            "id": "a2",
            "reconstruction_id_if_redacted": None,
            "prompt": ASK,
            "response": "Never.",
            "prompt_label": "unsafe",
            "response_label": "unsafe",
            "violated_categories": "Thorns, Weeds",
            **SOURCES,
        },
        {
            "id": "a3",
            "reconstruction_id_if_redacted": 7.0,
            "prompt": "REDACTED",
            "response": SAY,
            "prompt_label": "unsafe",
            "response_label": "safe",
            "violated_categories": "Thorns",
            **SOURCES,
        },
        {
            "id": "a4",
            "reconstruction_id_if_redacted": None,
            "prompt": ASK,
            "response": None,
            "prompt_label": "safe",
            "response_label": None,
            "violated_categories": "",
            **SOURCES,
        },
        {
            "id": "a5",
            "reconstruction_id_if_redacted": None,
            "prompt": ASK,
            "response": "",
            "prompt_label": "safe",
            "response_label": "safe",
            "violated_categories": "",
            **SOURCES,
        },
    ],
    "or-bench": [{"prompt": ASK, "category": "thorns"}],
}
LABELLED = ["beavertails", "wildguardmix", "aegis"]
ADDRESSES = {
    "beavertails": ("PKU-Alignment/BeaverTails", None, "30k_train"),
    "wildguardmix": ("allenai/wildguardmix", "wildguardtrain", "train"),
    "aegis": ("nvidia/Aegis-AI-Content-Safety-Dataset-2.0", None, "train"),
    "or-bench": ("bench-llm/or-bench", "or-bench-80k", "train"),
}


@pytest.fixture
def hub(monkeypatch):
    """`hub` has what the sets' own loader would give, and notes what it was asked for."""
    asked, rows = [], {ADDRESSES[name][0]: ROWS[name] for name in ROWS}

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(rows[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(files, "is_hub_reachable", lambda: True)
    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", False)
    return asked, rows


@pytest.mark.parametrize("name", LABELLED)
def test_labels_and_texts_are_where_they_should_be_and_other_rows_are_left_out(name, hub, tmp_path):
    examples = load_examples([keep_public_set(name, 10, tmp_path)])
    assert {(e.messages[0]["content"], e.response, e.label) for e in examples} == {(ASK, SAY, 0), (ASK, "Never.", 1)}
    assert {example.category.lower() for example in examples if example.label == 1} == {"thorns"}
    assert {(example.group, example.source) for example in examples} == {(ASK, name)}
    assert hub[0] == [ADDRESSES[name]]


def test_prompts_are_safe_and_have_no_answer(hub, tmp_path):
    file = keep_public_set("or-bench", 10, tmp_path)
    (example,) = load_examples([file], needs_response=False)
    assert (example.messages[0]["content"], example.response, example.label, example.category) == (
        ASK,
        "",
        0,
        "thorns",
    )
    assert hub[0] == [ADDRESSES["or-bench"]]


def test_what_was_drawn_is_not_loaded_again(hub, tmp_path):
    first = keep_public_set("aegis", 10, tmp_path).read_bytes()
    hub[1]["nvidia/Aegis-AI-Content-Safety-Dataset-2.0"] = []
    assert keep_public_set("aegis", 10, tmp_path).read_bytes() == first
    assert len(hub[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["aegis-10.jsonl"]


def test_a_set_that_has_changed_is_told_with_its_fields(hub, tmp_path):
    hub[1]["allenai/wildguardmix"] = [{"question": ASK, "answer": SAY}]
    with pytest.raises(SafeSpecError, match=r"response_harm_label: it is not what it was.*question, answer"):
        keep_public_set("wildguardmix", 10, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("value", ["maybe", 2, ["safe"]])
def test_a_label_that_is_none_is_told_with_its_row(name, value):
    row = RawRow({**ROWS[name][0], PUBLIC_SETS[name].label_field: value}, "x", 3, "row")
    with pytest.raises(DataError, match=f"row 3, field `{PUBLIC_SETS[name].label_field}`: expected"):
        to_example(name, row)


def test_licences_are_told():
    assert {name: found.license for name, found in PUBLIC_SETS.items()} == {
        "beavertails": "cc-by-nc-4.0",
        "wildguardmix": "odc-by",
        "aegis": "cc-by-4.0",
        "or-bench": "cc-by-4.0",
    }
    assert tuple(PUBLIC_SETS) == PUBLIC_NAMES
    assert [name for name, found in PUBLIC_SETS.items() if not found.is_commercial] == ["beavertails"]
    assert "licence odc-by, up to 2,000 labelled answers; accept" in describe_set("wildguardmix", 2000)


def make_rows(label, category, num):
    prompt = ({"role": "user", "content": ASK},)
    return [
        Example(id=f"{category}{i}", messages=prompt, response=f"{category} {i}", label=label, category=category)
        for i in range(num)
    ]


def test_a_draw_is_balanced_by_label_and_category_and_does_not_depend_on_the_order():
    rows = [*make_rows(0, "", 500), *make_rows(1, "thorns", 100), *make_rows(1, "weeds", 10), *make_rows(1, "mud", 40)]
    drawn = draw_balanced(rows, 120)
    counts = {category: sum(e.category == category for e in drawn) for category in ("", "thorns", "weeds", "mud")}
    assert counts == {"": 60, "thorns": 25, "weeds": 10, "mud": 25}
    assert draw_balanced(rows[::-1], 120) == drawn
    assert {e.id for e in draw_balanced(rows, 60)} != {e.id for e in rows[:60]}


def test_all_rows_are_drawn_where_there_are_no_more():
    rows = [*make_rows(0, "", 5), *make_rows(1, "weeds", 50)]
    assert len(draw_balanced(rows, 30)) == 30
    assert len(draw_balanced(rows, 500)) == 55
