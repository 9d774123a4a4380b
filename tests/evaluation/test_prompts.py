import json

import pytest
from samples import write_lines

from safespec_hf import SafeSpecError
from safespec_hf.evaluation.prompts import hash_prompts, load_prompt_sets


def load(tmp_path, rows, kind="benign", **kwargs):
    return load_prompt_sets({kind: [write_lines(tmp_path / "garden.jsonl", rows)]}, **kwargs)["garden"]


@pytest.mark.parametrize(
    ("row", "kind", "asked", "request_", "reference"),
    [
        ({"prompt": "a"}, "benign", "a", "a", None),
        ({"query": "a", "jailbreak_prompt": "play a"}, "attacks", "play a", "a", None),
        ({"question": "a", "answer": "#### 3"}, "tasks", "a", "a", "#### 3"),
        ({"prompt": "a", "response": "3"}, "tasks", "a", "a", "3"),
        ({"prompt": "a", "response": "3"}, "benign", "a", "a", None),
        ({"turns": ["a", "b"]}, "benign", "a", "a", None),
    ],
)
def test_fields_of_many_files_are_known(tmp_path, row, kind, asked, request_, reference):
    (prompt,) = load(tmp_path, [row], kind)
    assert (prompt.messages[-1]["content"], prompt.request, prompt.reference) == (asked, request_, reference)
    assert prompt.num_turns == 1


def test_a_conversation_is_asked_turn_by_turn_in_a_multi_turn_set(tmp_path):
    (prompt,) = load(tmp_path, [{"turns": ["a", "b", "c"]}], "multi-turn")
    assert prompt.requests() == ["a", "b", "c"]


def test_messages_are_kept_as_they_are(tmp_path):
    messages = [{"role": role, "content": "w10"} for role in ("user", "assistant", "user")]
    (prompt,) = load(tmp_path, [{"messages": messages}], "attacks")
    assert list(prompt.messages) == messages


def test_unsafe_rows_are_no_borderline_requests(tmp_path):
    rows = [{"id": str(i), "prompt": "a", "label": label} for i, label in enumerate(["safe", "unsafe", "safe", 1, 0])]
    assert [prompt.id for prompt in load(tmp_path, rows, "borderline")] == ["0", "2", "4"]


def test_a_larger_limit_only_adds_prompts(tmp_path):
    rows = [{"prompt": f"w{i}"} for i in range(30)]
    few, more = (load(tmp_path, rows, limit=limit) for limit in (5, 12))
    assert len(few) == 5
    assert {prompt.id for prompt in few} < {prompt.id for prompt in more}
    assert [prompt.number for prompt in more] == sorted(prompt.number for prompt in more)
    assert few != load(tmp_path, rows)[:5]


def test_the_hash_tells_other_prompts(tmp_path):
    first, second = (load(tmp_path, [{"prompt": text}]) for text in "ab")
    assert hash_prompts(first) != hash_prompts(second)


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"text": "a"}, "benign", "line 1, field `prompt`"),
        ({"prompt": "a"}, "tasks", "field `reference`"),
        ({"turns": []}, "benign", "field `turns`"),
        ({"turns": ["a", 3]}, "multi-turn", "field `turns`"),
        ({"query": "", "prompt": "a"}, "attacks", "field `query`"),
        ({"prompt": "a", "label": "unsafe"}, "borderline", "no rows"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, row, kind, said):
    with pytest.raises(SafeSpecError, match=said):
        load(tmp_path, [row], kind)


def test_ids_that_occur_twice_are_told(tmp_path):
    with pytest.raises(SafeSpecError, match="'x' occurs twice"):
        load(tmp_path, [{"id": "x", "prompt": "a"}, {"id": "x", "prompt": "b"}])


def test_sets_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "garden.jsonl").write_text(json.dumps({"prompt": name}))
    paths = [tmp_path / name / "garden.jsonl" for name in "ab"]
    assert list(load_prompt_sets({"benign": paths})) == ["a/garden", "b/garden"]
    with pytest.raises(SafeSpecError, match="given twice"):
        load_prompt_sets({"benign": paths[:1], "attacks": paths[:1]})


def test_nothing_to_ask_is_an_error():
    with pytest.raises(SafeSpecError, match="Give prompts"):
        load_prompt_sets({})
