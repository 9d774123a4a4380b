import json
import math
from dataclasses import dataclass, field

import pytest
from evaluated import METHODS, WordGuard
from evaluated import answer_row as row

from safespec_hf import SafeSpecError
from safespec_hf.evaluation.judges import RefusalPhrases
from safespec_hf.evaluation.judging import judge_rows
from safespec_hf.evaluation.report import write_evaluation_report
from safespec_hf.evaluation.runs import RunSettings, run_evaluation
from safespec_hf.evaluation.specs import parse_method
from safespec_hf.evaluation.statistics import JudgeErrors
from safespec_hf.evaluation.summaries import (
    Answers,
    attack_rates,
    missing_answers,
    overview,
    recovery_tables,
    set_figures,
    usefulness_table,
)


@dataclass
class StrictJudge(WordGuard):
    """Counts how often it is asked."""

    errors: JudgeErrors | None = None
    asked: list = field(default_factory=list)
    words: set = field(default_factory=lambda: {"w20"})

    def judge(self, requests, answers):
        self.asked += answers
        return super().judge(requests, answers)


def rates(rows, judge):
    answers = Answers(rows)
    risks = judge.judge([row["request"] for row in rows], [row["answer"] for row in rows])
    return attack_rates(answers, judge, dict(zip(answers.by_key, risks, strict=True)))


def test_an_attack_succeeds_where_the_answer_is_harmful():
    rows = [row("target", str(i), "w20" if i < 3 else "w10") for i in range(4)]
    (table,) = rates(rows, StrictJudge())
    assert table["ASR"] == 0.75
    assert table["low"] < 0.75 < table["high"] <= 1
    assert table["corrected"] is None


def test_a_rate_is_corrected_for_what_the_judge_gets_wrong():
    errors = JudgeErrors(num_unsafe=1000, num_caught=500, num_safe=1000, num_passed=1000)
    rows = [row("target", str(i), "w20" if i < 10 else "w10") for i in range(40)]
    assert rates(rows, StrictJudge(errors=errors))[0]["corrected"] == pytest.approx(0.5)


def test_a_conversation_is_harmful_if_one_of_its_answers_is():
    rows = [
        row("target", p, a, "multi-turn", turn=t) for p, t, a in [("0", 0, "w10"), ("0", 1, "w20"), ("1", 0, "w10")]
    ]
    (table,) = rates(rows, StrictJudge())
    assert (table["prompts"], table["ASR"]) == (2, 0.5)


def test_refusals_count_by_what_ended_the_answer_or_by_its_words():
    rows = [row("safespec", "0", "w10", "borderline", finish_reason="safety_refusal")]
    rows += [row("safespec", "1", "I'm sorry, I can't.", "borderline"), row("safespec", "2", "w10", "borderline")]
    (table,) = set_figures(Answers(rows))
    assert (table["refused"], table["ended by the guard"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_speed_and_agreement_are_against_the_target_on_the_same_prompts():
    rows = [row("target", str(i), "w10", "benign", seconds=2.0) for i in range(3)]
    rows += [row("safespec", "0", "w10", "benign"), row("safespec", "1", "w11", "benign", tokens=[1] * 5)]
    ours = next(table for table in set_figures(Answers(rows)) if table["method"] == "safespec")
    assert (ours["as undefended"], ours["speed"], ours["time"]) == (0.5, pytest.approx(1.5), 0.5)
    assert math.isnan(ours["as speculation alone"])


def test_accuracy_is_of_tasks():
    rows = [row("target", str(i), f"so {i}", "tasks", reference="#### 1") for i in range(2)]
    assert overview(Answers(rows), [])[0]["accuracy"] == 0.5


def test_usefulness_is_of_answers_in_which_something_was_flagged():
    event = {"position": 3, "rolled_back_to": 0, "candidate_risks": [0.1]}
    recovered = {"events": [event], "num_recovered": 4, "recovered_log_prob": -1.5}
    rows = [row("target", str(i), "w10", "benign", tokens=list(range(20))) for i in range(3)]
    rows += [row("safespec", "0", "w10", "benign", tokens=list(range(12)), **recovered)]
    rows += [row("safespec", "1", "w10", "benign", events=[event], finish_reason="safety_refusal")]
    rows += [row("safespec", "2", "w10", "benign")]
    (table,) = usefulness_table(Answers(rows), lambda requests, answers: [0.25] * len(answers))
    assert (table["flagged answers"], table["useful"], table["finished"]) == (2, 0.5, 0.5)
    assert table["log-probability lost"] == pytest.approx(0.5)
    assert table["about the request"] == 0.25


def test_candidates_are_counted_where_their_number_says_nothing_of_them():
    event = {"position": 3, "rolled_back_to": 0, "candidate_risks": [0.1, 0.9]}
    rows = [row(m, "0", "w10", events=[event], risk_threshold=0.5) for m in ("safespec", "forced", "safespec:few")]
    methods = {"safespec:few": {"policy": {"candidates_per_batch": 2}}}
    assert list(recovery_tables(Answers(rows), methods)) == ["safespec"]


def test_what_a_comparison_lacks_is_said():
    rows = [row("safespec", str(i), "w10") for i in range(3)] + [row("assisted", "0", "w10")]
    first, second = missing_answers(Answers(rows))
    assert first.startswith("assisted has 1 of 3 answers to attacks set")
    assert "no answers of the target alone" in second


def test_a_judge_reads_an_answer_once_and_a_judge_that_errs_otherwise_is_another(tmp_path):
    rows, cache = [row("target", str(i), f"w{10 + i % 2}") for i in range(4)], tmp_path / "verdicts.jsonl"
    judge = StrictJudge()
    first = judge_rows(judge, rows, cache)
    assert judge.asked == ["w10", "w11"]
    cache.write_bytes(cache.read_bytes() + b'{"key": "cut')
    assert judge_rows(judge, rows, cache) == first
    assert len(judge.asked) == 2
    first_line = cache.read_bytes().splitlines(keepends=True)[0]
    damaged = b'\n\0\0\n{}\n[1]\nroses\n\xff\n{"key": 1, "risk": 0.5}\n' + first_line.replace(b"}", b', "risk": "x"}')
    cache.write_bytes(cache.read_bytes() + damaged)
    assert judge_rows(judge, rows, cache) == first
    assert len(judge.asked) == 2  # a line that is damaged is none
    other = StrictJudge(errors=JudgeErrors(num_unsafe=1, num_caught=1, num_safe=1, num_passed=1))
    judge_rows(other, rows, cache)
    assert len(other.asked) == 2
    namesake = StrictJudge()
    namesake.identity = "word guard of other words"
    judge_rows(namesake, rows, cache)
    assert len(namesake.asked) == 2


def test_two_judges_of_one_name_are_refused_before_any_is_asked(answered, tmp_path):
    judges = [StrictJudge(), RefusalPhrases(), StrictJudge()]
    with pytest.raises(SafeSpecError, match=r"Two judges are called 'word guard'.*rename"):
        write_evaluation_report(answered, judges, tmp_path / "report")
    assert judges[0].asked == []


@pytest.fixture
def answered(engine, sets, tmp_path):
    out = tmp_path / "answers.jsonl"
    methods = [parse_method(spec, WordGuard()) for spec in METHODS]
    run_evaluation(engine, methods, sets, out, settings=RunSettings(batch_size=4))
    return out


def test_the_report_has_figures_tables_pictures_and_their_provenance(answered, tmp_path):
    judges = [StrictJudge(), RefusalPhrases()]
    write_evaluation_report(answered, judges, tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [table["method"] for table in report["results"]["overview"]] == METHODS
    assert report["provenance"]["data"]["answers.jsonl"]
    assert report["results"]["settings"]["common"]["batch_size"] == 4
    assert set(report["results"]["attacks"]) == {"word guard", "refusal-phrases"}
    page = (tmp_path / "report" / "report.md").read_text()
    for picture in ("asr_against_latency.png", "recovery_at_k.png"):
        assert (tmp_path / "report" / picture).stat().st_size > 5_000
        assert f"({picture})" in page
    assert "What it gets wrong is not measured" in page


def test_a_guard_that_is_the_judge_lets_nothing_through(answered, tmp_path):
    results = write_evaluation_report(answered, [WordGuard()], tmp_path / "report")["results"]
    rates = {row["method"]: row["ASR"] for row in results["overview"]}
    assert rates["target"] > 0
    assert rates["guard_finished"] == rates["guard_every_n:every=3"] == 0


def test_a_report_needs_answers_and_a_judge(answered, tmp_path):
    with pytest.raises(SafeSpecError, match="at least one judge"):
        write_evaluation_report(answered, [], tmp_path)
    (tmp_path / "other.jsonl").write_text('{"prompt": "w10"}\n')
    with pytest.raises(SafeSpecError, match="line 1, field `method`"):
        write_evaluation_report(tmp_path / "other.jsonl", [WordGuard()], tmp_path)
