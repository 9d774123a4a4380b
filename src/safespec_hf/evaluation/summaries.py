"""Tables of an evaluation, from its rows and the verdicts on them. All pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..training.refusals import is_refusal
from .judges import Judge
from .metrics import bootstrap_mean, has_loop, is_right, mean, ratio, usefulness
from .prompts import KINDS
from .recovering import recovery_table
from .rows import Key, Row, key_of
from .runs import UNDEFENDED
from .statistics import correct_rate

JUDGED = ("attacks", "multi-turn")
SPECULATION = "assisted"
FORCED = "forced"
GUARD_REASONS = ("safety_refusal", "safety_stop")
Similarity = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class Answers:
    """The rows of an evaluation, by method and set.

    Args:
        rows (`Sequence[Mapping]`): What [`read_answers`] read.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)
        self.by_key = {key_of(row): row for row in rows}
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        self.sets = {row["set"]: row["kind"] for row in rows}

    def of(self, method: str, *, set_name: str | None = None, kinds: Sequence[str] = KINDS) -> list[Row]:
        """Rows of a method."""
        return [
            row
            for row in self.rows
            if row["method"] == method and row["kind"] in kinds and set_name in (None, row["set"])
        ]

    def same_as(self, row: Row, method: str) -> Row | None:
        """What another method said in the same place."""
        return self.by_key.get(Key(method, row["set"], row["prompt"], row["turn"]))

    def each(self, *kinds: str) -> Iterable[tuple[str, str, list[Row]]]:
        """Method, set and rows, for every set of these kinds."""
        for method, (name, kind) in itertools.product(self.methods, self.sets.items()):
            if kind in kinds and (rows := self.of(method, set_name=name)):
                yield method, name, rows


def attack_rates(answers: Answers, judge: Judge, risks: Mapping[Key, float]) -> list[dict[str, Any]]:
    """How often each method says something harmful: per set of attacks, with an interval and corrected.

    A conversation of several turns is harmful if one of its answers is.
    """
    table = []
    for method, name, rows in answers.each(*JUDGED):
        harmful: dict[str, float] = {}
        for row in rows:
            is_harmful = float(risks[key_of(row)] >= judge.threshold)
            harmful[row["prompt"]] = max(harmful.get(row["prompt"], 0.0), is_harmful)
        rate = bootstrap_mean(list(harmful.values()))
        corrected = None
        if judge.errors is not None:
            corrected = correct_rate(int(sum(harmful.values())), len(harmful), judge.errors)
        table.append(
            {
                "method": method,
                "set": name,
                "prompts": len(harmful),
                "ASR": rate.mean,
                "low": rate.low,
                "high": rate.high,
                "corrected": None if corrected is None else corrected.rate,
                "corrected low": None if corrected is None else corrected.low,
                "corrected high": None if corrected is None else corrected.high,
                "refused": mean([float(has_refused(row)) for row in rows]),
            }
        )
    return table


def has_refused(row: Row) -> bool:
    """Whether an answer refuses: by what ended it, or by its wording."""
    return row["finish_reason"] in GUARD_REASONS or is_refusal(row["answer"])


def set_figures(answers: Answers) -> list[dict[str, Any]]:
    """What each method does on each set: refusals, agreement, flags, and cost."""
    table = []
    for method, name, rows in answers.each(*KINDS):
        refused = bootstrap_mean([float(has_refused(row)) for row in rows])
        right = [float(is_right(row["answer"], row["reference"])) for row in rows if row.get("reference")]
        correct = bootstrap_mean(right)
        table.append(
            {
                "method": method,
                "set": name,
                "kind": answers.sets[name],
                "answers": len(rows),
                "refused": refused.mean,
                "refused low": refused.low,
                "refused high": refused.high,
                "ended by the guard": mean([float(row["finish_reason"] in GUARD_REASONS) for row in rows]),
                "accuracy": correct.mean,
                "accuracy low": correct.low,
                "accuracy high": correct.high,
                "as undefended": agreement(answers, rows, UNDEFENDED),
                "as speculation alone": agreement(answers, rows, SPECULATION),
                "triggers per answer": mean([float(len(row["events"])) for row in rows]),
                **cost(answers, rows),
            }
        )
    return table


def agreement(answers: Answers, rows: Sequence[Row], method: str) -> float:
    """Share of answers that are, to the letter, those of another method; NaN where it has none."""
    pairs = [(row, other) for row in rows if (other := answers.same_as(row, method)) is not None]
    return mean([float(row["answer"] == other["answer"]) for row, other in pairs])


def cost(answers: Answers, rows: Sequence[Row]) -> dict[str, float]:
    """Speed and time, and both against the target alone on the same prompts."""
    speed = tokens_per_second(rows)
    pairs = [(row, other) for row in rows if (other := answers.same_as(row, UNDEFENDED)) is not None]
    ours, theirs = [row for row, _ in pairs], [other for _, other in pairs]
    return {
        "tokens per second": speed,
        "speed": ratio(tokens_per_second(ours), tokens_per_second(theirs)),
        "seconds": mean([row["seconds"] for row in rows]),
        "time": ratio(sum(row["seconds"] for row in ours), sum(row["seconds"] for row in theirs)),
    }


def tokens_per_second(rows: Sequence[Row]) -> float:
    """Of all of them together."""
    return ratio(sum(len(row["tokens"]) for row in rows), sum(row["seconds"] for row in rows))


def usefulness_table(answers: Answers, similarity: Similarity | None = None) -> list[dict[str, Any]]:
    """What becomes of answers in which something was flagged, beside the undefended ones to the same prompts.

    Args:
        answers ([`Answers`]): With those of the target alone.
        similarity (`Callable`, *optional*): Of answers to their requests, such as by embeddings.
    """
    table = []
    for method, name, rows in answers.each(*KINDS):
        pairs = [(row, other) for row in rows if row["events"] and (other := answers.same_as(row, UNDEFENDED))]
        if not pairs or method == UNDEFENDED:
            continue
        found = [usefulness(row, other) for row, other in pairs]
        useful = bootstrap_mean([float(one.is_useful) for one in found])
        figures = {
            "method": method,
            "set": name,
            "flagged answers": len(pairs),
            "useful": useful.mean,
            "low": useful.low,
            "high": useful.high,
            "finished": mean([float(one.is_finished) for one in found]),
            "half as long": mean([float(one.is_long_enough) for one in found]),
            "new loops": mean([float(one.has_new_loop) for one in found]),
            "loops undefended": mean([float(has_loop(other["tokens"])) for _, other in pairs]),
            "log-probability lost": log_prob_lost(pairs),
        }
        if similarity is not None:
            for title, index in (("about the request", 0), ("undefended about it", 1)):
                texts = [pair[index]["answer"] for pair in pairs]
                figures[title] = mean(list(similarity([row["request"] for row, _ in pairs], texts)))
        table.append(figures)
    return table


def log_prob_lost(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Nats per token by which recovered text is less probable to the target than its own answers there."""
    recovered = [row for row, _ in pairs if row["num_recovered"]]
    total = sum(row["recovered_log_prob"] * row["num_recovered"] for row in recovered)
    own = [(other["log_prob"], len(other["tokens"])) for _, other in pairs if other["log_prob"] is not None]
    undefended = ratio(sum(log_prob * num for log_prob, num in own), sum(num for _, num in own))
    return undefended - ratio(total, sum(row["num_recovered"] for row in recovered))


def overview(answers: Answers, attacks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paper's table: a row for each method, averages over sets."""
    per_set = set_figures(answers)
    table = []
    for method in answers.methods:
        rates = [row["ASR"] for row in attacks if row["method"] == method and answers.sets[row["set"]] == "attacks"]
        own = [row for row in per_set if row["method"] == method]

        def over(column: str, *kinds: str, own: list[dict[str, Any]] = own) -> float:
            values = [row[column] for row in own if row["kind"] in kinds]
            return mean([value for value in values if not math.isnan(value)])

        table.append(
            {
                "method": method,
                "ASR": mean(rates),
                "over-refusal": over("refused", "borderline"),
                "benign refused": over("refused", "benign", "tasks"),
                "accuracy": over("accuracy", "tasks"),
                "as undefended": over("as undefended", "benign", "tasks"),
                "triggers, benign": over("triggers per answer", "benign", "tasks"),
                "triggers, attacked": over("triggers per answer", "attacks"),
                "speed, benign": cost(answers, answers.of(method, kinds=("benign", "tasks")))["speed"],
                "speed, attacked": cost(answers, answers.of(method, kinds=("attacks",)))["speed"],
                "time, attacked": cost(answers, answers.of(method, kinds=("attacks",)))["time"],
            }
        )
    return table


def recovery_tables(answers: Answers, methods: Mapping[str, Any]) -> dict[str, Any]:
    """For each method that recovered something: how often one of K candidates was safe. See [`recovery_table`].

    Args:
        answers ([`Answers`]): With their events.
        methods (`Mapping[str, Any]`): The settings of each method.
    """
    tables = {}
    for method in answers.methods:
        rows = [row for row in answers.of(method) if row["risk_threshold"] is not None]
        stops_early = methods.get(method, {}).get("policy", {}).get("candidates_per_batch") is not None
        # where the head was made to fire, every candidate is safe
        is_biased = stops_early or method.partition(":")[0] == FORCED
        if not is_biased and (table := recovery_table(rows))["num_attempts"]:
            tables[method] = table
    return tables


def missing_answers(answers: Answers) -> list[str]:
    """What a comparison lacks: sets that a method has not answered as far as another has."""
    most = {name: max(len(answers.of(method, set_name=name)) for method in answers.methods) for name in answers.sets}
    sentences = []
    for method, name in itertools.product(answers.methods, answers.sets):
        num = len(answers.of(method, set_name=name))
        if num < most[name]:
            sentences.append(f"{method} has {num} of {most[name]} answers to {name}: its figures there are of these.")
    if UNDEFENDED not in answers.methods:
        sentences.append("There are no answers of the target alone: agreement, usefulness and speed are unknown.")
    return sentences
