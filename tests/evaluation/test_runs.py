import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from evaluated import METHODS, WordGuard, answer_row
from samples import emulated_processes

from safespec_hf import SafeSpecError, detach_safety_head
from safespec_hf.decoding import call
from safespec_hf.evaluation import runs
from safespec_hf.evaluation.rows import AnswerFile, read_answers
from safespec_hf.evaluation.runs import RunSettings, run_evaluation
from safespec_hf.evaluation.specs import parse_method
from safespec_hf.training import shards
from safespec_hf.training.files import DataError, DataFileError

SETTINGS = RunSettings(batch_size=2)
TIMES = ("seconds", "guard_seconds", "statistics", "processes")


@pytest.fixture
def evaluate(engine, sets):
    def evaluate(out, methods=METHODS, settings=SETTINGS, **kwargs):
        chosen = [parse_method(spec, WordGuard()) for spec in methods]
        return run_evaluation(kwargs.get("engine", engine), chosen, kwargs.get("sets", sets), out, settings=settings)

    return evaluate


def rows_of(path):
    """What must be the same whatever happened on the way: all but the times."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def test_every_method_answers_every_turn_of_every_prompt(evaluate, sets, tmp_path):
    num = sum(prompt.num_turns for prompts in sets.values() for prompt in prompts)
    assert evaluate(tmp_path / "x.jsonl") == num * len(METHODS)
    rows = read_answers(tmp_path / "x.jsonl")
    assert {row["method"] for row in rows} == set(METHODS)
    assert any(row["events"] for row in rows)
    assert [row["seconds"] > 0 for row in rows] == [True] * len(rows)


def test_rows_are_in_order_of_method_set_and_prompt(evaluate, tmp_path):
    evaluate(tmp_path / "x.jsonl")
    rows = rows_of(tmp_path / "x.jsonl")
    places = [(METHODS.index(r["method"]), ["attack", "calm", "talks", "sums"].index(r["set"])) for r in rows]
    assert [place[0] for place in places] == sorted(place[0] for place in places)
    assert [r["number"] for r in rows if r["method"] == "target" and r["set"] == "attack"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_any_number_of_processes_gives_the_same_rows(evaluate, tmp_path, monkeypatch, num_processes):
    evaluate(tmp_path / "one.jsonl")
    monkeypatch.setattr(shards, "PartialState", emulated_processes(num_processes))
    lock = threading.Lock()  # these share one model, which processes do not
    answer = runs._answer

    def alone(*args):
        with lock:
            return answer(*args)

    monkeypatch.setattr(runs, "_answer", alone)
    monkeypatch.setattr(runs, "warm_up", lambda *_: None)
    with ThreadPoolExecutor(num_processes) as pool:
        for run in [pool.submit(evaluate, tmp_path / "many.jsonl") for _ in range(num_processes)]:
            run.result()
    assert rows_of(tmp_path / "many.jsonl") == rows_of(tmp_path / "one.jsonl")
    assert {row["processes"] for row in read_answers(tmp_path / "many.jsonl")} == {num_processes}
    assert list(tmp_path.glob("*.part-*")) == []


def test_no_clock_decides_what_is_drafted(evaluate, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(call, "make_watch", lambda drafter: made.append(drafter))
    evaluate(tmp_path / "x.jsonl")
    assert made == []


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_a_killed_run_goes_on_and_gives_the_same_rows(evaluate, tmp_path, share):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    evaluate(whole)
    evaluate(killed)
    lines = killed.read_bytes().splitlines(keepends=True)
    num_kept = int(share * len(lines))
    # one process had its whole lines in the file, one was in the middle of a line of its part
    killed.write_bytes(b"".join(lines[: num_kept // 2]) + lines[-1][:9])
    part = killed.with_name("killed.jsonl.part-1")
    part.write_bytes(b"".join(lines[num_kept // 2 : num_kept]) + lines[num_kept][:20])
    evaluate(killed)
    assert rows_of(killed) == rows_of(whole)


def test_what_is_there_is_not_asked_again(evaluate, engine, tmp_path, monkeypatch):
    evaluate(tmp_path / "x.jsonl")
    before = (tmp_path / "x.jsonl").read_bytes()
    monkeypatch.setattr(runs, "_answer", None)
    evaluate(tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == before


def test_methods_and_sets_can_be_added(evaluate, sets, tmp_path):
    evaluate(tmp_path / "whole.jsonl")
    evaluate(tmp_path / "x.jsonl", METHODS[:2], sets={"attack": sets["attack"]})
    evaluate(tmp_path / "x.jsonl", METHODS[1:3])
    evaluate(tmp_path / "x.jsonl")
    assert rows_of(tmp_path / "x.jsonl") == rows_of(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(
    ("settings", "new_tokens", "said"),
    [
        (RunSettings(batch_size=3), 12, "in common, 'batch_size' was 2 and is 3 now"),
        (SETTINGS, 13, "'max_new_tokens' was 12"),
    ],
)
def test_other_settings_are_refused(evaluate, engine, tmp_path, settings, new_tokens, said):
    evaluate(tmp_path / "x.jsonl", ["target"])
    engine.max_new_tokens = new_tokens
    with pytest.raises(SafeSpecError, match=said):
        evaluate(tmp_path / "x.jsonl", ["target"], settings)


def test_other_prompts_of_one_name_are_refused(evaluate, sets, tmp_path):
    evaluate(tmp_path / "x.jsonl", ["target"])
    with pytest.raises(SafeSpecError, match="in sets, 'attack' was"):
        evaluate(tmp_path / "x.jsonl", ["target"], sets={"attack": sets["attack"][:2]})


def test_another_draft_leaves_what_did_not_use_it(evaluate, engine, tmp_path):
    evaluate(tmp_path / "x.jsonl", ["target", "safespec"])
    engine.draft, engine.lookup_tokens = None, 3
    evaluate(tmp_path / "x.jsonl", ["target", "assisted"])
    with pytest.raises(SafeSpecError, match=r"in methods, 'safespec' was {'draft': .* is {'draft': 'lookup 3'}"):
        evaluate(tmp_path / "x.jsonl", ["target", "safespec"])


POINTS = {"strict": {"risk_threshold": 0.4}}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("pooling", "last", "'pooling': 'last'"),
        ("span", "answer", "'span': 'answer'"),
        ("ewma_decay", 0.5, "'ewma_decay': 0.5"),
        ("unsafe_label", 0, "'unsafe_label': 0"),
        ("operating_points", {"strict": {"risk_threshold": 0.9}}, "'strict': {'risk_threshold': 0.9}"),
    ],
)
def test_a_head_that_would_flag_otherwise_is_another_one(evaluate, engine, tmp_path, field, value, said):
    config = engine.model.safety.head.config
    config.operating_points = POINTS
    evaluate(tmp_path / "x.jsonl", ["target", "safespec"])
    config.operating_points = {"strict": {"risk_threshold": 0.4, "recall": 0.7}}  # measured since: flags stay
    evaluate(tmp_path / "x.jsonl", ["target", "safespec"])
    setattr(config, field, value)
    evaluate(tmp_path / "x.jsonl", ["target", "assisted"])
    with pytest.raises(SafeSpecError, match=f"in methods, 'safespec' was .* and is {{'head': .*{said}"):
        evaluate(tmp_path / "x.jsonl", ["target", "safespec"])


def test_a_file_that_does_not_say_what_its_head_read_is_refused_by_what_asks_the_head(evaluate, tmp_path):
    evaluate(tmp_path / "x.jsonl", ["target", "safespec"])
    file = tmp_path / "x.jsonl.settings.json"
    settings = json.loads(file.read_text())
    head = settings["methods"]["safespec"]["head"]
    settings["methods"]["safespec"]["head"] = {name: head[name] for name in ("risk_threshold", "prompt_threshold")}
    file.write_text(json.dumps(settings))
    evaluate(tmp_path / "x.jsonl", ["target"])
    with pytest.raises(SafeSpecError, match=r"'pooling': 'not recorded'.* is .*'pooling': 'mean'.* now"):
        evaluate(tmp_path / "x.jsonl", ["safespec"])


def test_a_file_of_something_else_is_left_alone(evaluate, tmp_path):
    (tmp_path / "x.jsonl").write_text("roses\n")
    with pytest.raises(SafeSpecError, match="not begun by"):
        evaluate(tmp_path / "x.jsonl", ["target"])
    assert (tmp_path / "x.jsonl").read_text() == "roses\n"


@pytest.mark.parametrize(
    ("methods", "said"), [([], "at least one method"), (["target", "target"], "'target' is given twice")]
)
def test_methods_are_checked_before_an_answer(evaluate, tmp_path, methods, said):
    with pytest.raises(SafeSpecError, match=said):
        evaluate(tmp_path / "x.jsonl", methods)
    assert not (tmp_path / "x.jsonl").exists()


def test_a_guarded_method_needs_a_head_and_others_do_not(evaluate, engine, tmp_path):
    detach_safety_head(engine.model)
    with pytest.raises(SafeSpecError, match="need a safety head"):
        evaluate(tmp_path / "x.jsonl", ["target", "safespec"])
    assert evaluate(tmp_path / "x.jsonl", ["target", "self_reminder"]) > 0


def test_a_policy_that_can_not_be_had_is_told_before_the_first_answer(evaluate, tmp_path):
    with pytest.raises(SafeSpecError, match="no operating point 'strict'"):
        evaluate(tmp_path / "x.jsonl", ["target", "safespec:operating_point=strict"])
    assert not (tmp_path / "x.jsonl").exists()


def test_rows_do_not_depend_on_the_batch(evaluate, tmp_path):
    """But for sampled candidates, whose seed is that of a batch."""
    evaluate(tmp_path / "two.jsonl", ["target", "assisted"])
    evaluate(tmp_path / "four.jsonl", ["target", "assisted"], RunSettings(batch_size=4))
    two, four = rows_of(tmp_path / "two.jsonl"), rows_of(tmp_path / "four.jsonl")
    assert [row["answer"] for row in two] == [row["answer"] for row in four]


def test_speculation_without_the_head_says_what_the_target_says(evaluate, tmp_path):
    evaluate(tmp_path / "x.jsonl", ["target", "assisted"])
    rows = rows_of(tmp_path / "x.jsonl")
    half = len(rows) // 2
    assert [row["answer"] for row in rows[:half]] == [row["answer"] for row in rows[half:]]


def test_a_part_that_was_not_merged_is_read(tmp_path):
    file = AnswerFile(tmp_path / "x.jsonl", 1, 2)
    file.append([answer_row("target", "0", "w11")])
    assert len(AnswerFile(tmp_path / "x.jsonl").read()) == 1


SETTINGS_OF_ROWS = {"common": {}, "methods": {"target": {}}, "sets": {"attacks set": {}}}


@pytest.mark.parametrize("num_bytes_lost", range(1, 8))
def test_a_line_that_a_kill_cut_anywhere_is_passed_over(tmp_path, num_bytes_lost):
    file = AnswerFile(tmp_path / "x.jsonl")
    file.write_settings(SETTINGS_OF_ROWS)
    file.append([answer_row("target", str(number), "café ☃", number=number, reference="☃") for number in range(2)])
    content = file.path.read_bytes()
    file.path.write_bytes(content[:-num_bytes_lost])
    file.merge()
    assert file.path.read_bytes() == content.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "field `method`: missing"),
        (None, "expected an object, got NoneType"),
        (answer_row("roses", "1", "w11"), "field `method`: 'roses' is none that this file has answers of"),
        (answer_row("target", "1", "w11", kind="benign"), "field `set`: 'benign set' is none"),
        (answer_row("target", "1", "w11", number="1"), "field `number`: missing, or of another type"),
    ],
)
def test_a_row_that_is_none_of_the_file_is_told_with_its_place(tmp_path, row, said):
    file = AnswerFile(tmp_path / "x.jsonl")
    file.write_settings(SETTINGS_OF_ROWS)
    file.append([answer_row("target", "0", "w11")])
    with file.path.open("a") as lines:
        lines.write(f"\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=f"x.jsonl, line 3, .*{said}"):
        file.merge()


DAMAGED = ["roses", "[]", "null", '{"methods": []}', '{"common": null}', '{"sets": {"calm": 1}}', "[" * 9999]
DAMAGED += ['{"methods": {"target": null}}', '{"methods": {"safespec": {"policy": 1}}}']


@pytest.mark.parametrize("content", DAMAGED)
def test_settings_that_are_damaged_are_told_with_their_file(tmp_path, content):
    (tmp_path / "x.jsonl.settings.json").write_text(content)
    with pytest.raises(DataFileError, match=r"x\.jsonl\.settings\.json: not "):
        AnswerFile(tmp_path / "x.jsonl").read_settings()


@pytest.mark.parametrize(
    ("field", "value"), [("reference", 12), ("reference", ["roses"]), ("risk_threshold", "high"), ("events", [None])]
)
def test_a_field_of_another_type_is_told_before_a_report(tmp_path, field, value):
    AnswerFile(tmp_path / "x.jsonl").append([answer_row("target", "0", "w11", **{field: value})])
    with pytest.raises(DataError, match=f"x.jsonl, line 1, field `{field}`: missing, or of another type"):
        read_answers(tmp_path / "x.jsonl")
