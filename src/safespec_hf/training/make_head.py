"""From prompts and labelled answers to a head with its report: every step once, and on from there after a kill."""

from __future__ import annotations

import filecmp
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..errors import SafeSpecError
from ..heads.hub import keep_report
from ..heads.publishing import EVAL_RESULTS, REPORT
from ..heads.safety_head import SafetyHead, target_binding
from .calibrate import scale_risks
from .collect import CollectSettings, collect_answers, describe_collecting
from .data import Example, hash_examples, load_examples
from .dataset import Dataset, check_sets
from .features import FeatureSettings, default_settings, extract_features
from .metrics import ScoredAnswers, auroc, flagged_rate, without_refusals
from .parts import Parts, check_num_calibration
from .prompt_probe import describe_requests, has_requests, split_requests, train_prompts
from .record import read_record, update_record
from .report import write_report
from .saving import calibrate_and_save, score, train_and_save
from .settings import SEEDS, check_counts, check_ranges
from .steps import STEP_FILE, Step, only_one
from .train import TrainSettings

STEPS = ("collect", "features", "train", "calibrate", "prompts", "report")
ANSWERS, REPORT_FOLDER = "answers.jsonl", "report"
NUM_DISGUISED = 1
"""Of each prompt that asks for harm: more would take longer than the answers are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeSettings:
    """How a head is made.

    Args:
        alpha (`float`, defaults to 0.02):
            Bound on the share of benign answers that are flagged anywhere, and on that of harmless prompts, in (0, 1).
        layers (`tuple[int, ...]`, *optional*): Hidden states to choose from. Default: see [`default_settings`].
        max_new_tokens (`int`, defaults to 128): Of the target's own answers.
        max_response_tokens (`int`, defaults to 256): Longer answers are cut.
        batch_size (`int`, defaults to 32): Prompts answered at once.
        seed (`int`, defaults to 0): Of everything.

    Raises:
        SafeSpecError: If a value is outside of its range.
    """

    alpha: float = 0.02
    layers: tuple[int, ...] | None = None
    max_new_tokens: int = 128
    max_response_tokens: int = 256
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "max_response_tokens", "batch_size")
        check_ranges(self, {"alpha": "(0, 1)", "seed": SEEDS})


def make_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    parts: Parts,
    out: str | os.PathLike[str],
    *,
    work: str | os.PathLike[str] | None = None,
    settings: MakeSettings | None = None,
    files: Sequence[str] = (),
    data: Sequence[Mapping[str, Any]] = (),
    chat_template: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes a head for a target: its answers, features, training, calibration, a probe for prompts, report.

    A finished step is not done again unless something that it depends on has changed: target, data, settings or a
    step before it. After a kill the same call goes on, and gives the same head as one that was not killed. In `out`
    nothing is touched until all is done.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer, with a chat template.
        parts ([`Parts`]): See [`split_parts`].
        out (`str` or `os.PathLike`): Folder of the head; its report is in `report` in there.
        work (`str` or `os.PathLike`, *optional*): For what the steps leave. Default: `work` in `out`.
        settings ([`MakeSettings`], *optional*): How.
        files (`Sequence[str]`): The data, for its hashes.
        data (`Sequence[Mapping]`): Rows of `name`, `license` and `use`, for the card.
        chat_template (`str`, *optional*): What the tokenizer was given, if it had none, for the record and the card.
        tell (`Callable[[str], None]`): Gets a line at the beginning of each step.

    Returns:
        `dict`: What was measured: see [`measure`]; and `seconds`, which the steps took.

    Raises:
        SafeSpecError: If another run is at work in the folder, if the target has no answer to too many prompts, or as
            the steps do.
    """
    place = Path(out)
    folder = Path(work) if work is not None else place / "work"
    with only_one(folder), _quiet():
        maker = _Maker(model, tokenizer, parts, folder, settings or MakeSettings(), files, data, chat_template, tell)
        steps = maker.take_steps()
        install_head(steps[-1].folder, place)
    return {**steps[-1].facts, "seconds": sum(step.seconds for step in steps)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars: heads are small, and saved and loaded several times."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def install_head(source: Path, out: Path) -> None:
    """Puts a finished head with its report into a folder, in the place of another one. Its weights come last.

    So a kill leaves no head, rather than a mixed one. A head that is there already is left alone, with its card.

    Args:
        source (`Path`): Folder of a finished step.
        out (`Path`): Folder of the head.
    """
    names = [name for name in (CONFIG_NAME, REPORT, SAFE_WEIGHTS_NAME) if (source / name).exists()]
    if filecmp.cmpfiles(source, out, names, shallow=False)[0] == names:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in (SAFE_WEIGHTS_NAME, REPORT, EVAL_RESULTS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / REPORT_FOLDER, ignore_errors=True)
    shutil.copytree(source, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STEP_FILE, SAFE_WEIGHTS_NAME))
    partial = out / f".{SAFE_WEIGHTS_NAME}"
    shutil.copyfile(source / SAFE_WEIGHTS_NAME, partial)
    os.replace(partial, out / SAFE_WEIGHTS_NAME)


def measure(head: SafetyHead, held_out: ScoredAnswers, record: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that matter.

    Args:
        head ([`SafetyHead`]): Calibrated.
        held_out ([`ScoredAnswers`]): Validation answers of both classes, with their calibrated risks.
        record (`Mapping`): Of the head.

    Returns:
        `dict`: `auroc` and `auroc_non_refusal` (against safe answers that do not refuse; `None` without such),
        `recall` and `false_alarms` on validation answers at `risk_threshold`; `alpha`, `num_calibration`,
        `operating_points` and `p95_tokens` of the calibration; `prompts`, what is recorded of the probe that scores
        prompts, `None` without one; `hidden_layers` and `reading`.
    """
    threshold, prompts, record = head.config.risk_threshold, record.get("prompts"), record["calibration"]
    return {
        "hidden_layers": head.config.hidden_layers,
        "reading": f"{head.config.pooling}-{head.config.span}",
        "auroc": auroc(held_out),
        "auroc_non_refusal": auroc(without_refusals(held_out)),
        "recall": flagged_rate(held_out.of_label(1), threshold),
        "false_alarms": flagged_rate(held_out.of_label(0), threshold),
        "risk_threshold": threshold,
        "alpha": record["alpha"],
        "num_calibration": record["num_answers"],
        "operating_points": record["operating_points"],
        "p95_tokens": record["lengths"]["p95"],
        "prompts": prompts,
    }


@dataclass
class _Maker:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: Parts
    work: Path
    settings: MakeSettings
    files: Sequence[str]
    data: Sequence[Mapping[str, Any]]
    chat_template: str | None
    tell: Callable[[str], None]

    @property
    def cache(self) -> Path:
        return self.work / "cache"

    def take_steps(self) -> list[Step]:
        how = self.settings
        features = default_settings(self.model, how.layers, max_response_tokens=how.max_response_tokens)
        collected = self.collect()
        seen, held_out, calibration = self.sets(collected)

        @functools.cache  # read once for two steps, and not at all if both are done
        def datasets() -> list[Dataset]:
            return [
                Dataset(part, extract_features(self.model, self.tokenizer, part, self.cache, features))
                for part in (seen, held_out)
            ]

        texts = {"train": hash_examples(seen), "validation": hash_examples(held_out)}
        read = self.take(
            Step(self.work, "features", {"after": collected.key, "features": asdict(features), **texts}),
            lambda _: {"num_prefixes": sum(len(dataset.features.example) for dataset in datasets())},
            f"of {len(seen) + len(held_out):,} answers",
        )
        training = TrainSettings(seed=how.seed)
        trained = self.take(
            Step(self.work, "train", {"after": read.key, "training": asdict(training), "data": list(self.data)}),
            lambda folder: self.train(folder, datasets(), features, training),
            f"on {len(seen):,} answers, choosing by {len(held_out):,}",
        )
        datasets.cache_clear()
        calibrated = self.take(
            Step(self.work, "calibrate", {"after": trained.key, "alpha": how.alpha, "on": hash_examples(calibration)}),
            lambda folder: self.calibrate(folder, trained, calibration, held_out),
            f"on {len(calibration):,} own answers",
        )
        requests = split_requests(self.parts)
        asked = {name: hash_examples(part) for name, part in requests.items()}
        probed = self.take(
            Step(self.work, "prompts", {"after": calibrated.key, "alpha": how.alpha, **asked}),
            lambda folder: self.probe(folder, calibrated, requests),
            describe_requests(requests),
        )
        reported = self.take(
            Step(self.work, "report", {"after": probed.key}),
            lambda folder: self.report(folder, trained, probed, calibration, held_out),
            f"on {len(calibration) + len(held_out):,} answers",
        )
        return [collected, read, trained, calibrated, probed, reported]

    def take(self, step: Step, do: Callable[[Path], Mapping[str, Any]], what: str) -> Step:
        title = f"Step {STEPS.index(step.name) + 1} of {len(STEPS)}: {step.name}, {what}"
        if step.is_finished:
            self.tell(f"{title}: done before")
        else:
            self.tell(title)
            step.finish(do)
        return step

    def collect(self) -> Step:
        how = self.settings
        settings = CollectSettings(max_new_tokens=how.max_new_tokens, batch_size=how.batch_size, seed=how.seed)
        # in an order that no split changes: other labelled answers need no other answers of the target
        prompts = sorted((e for part in self.parts.prompts.values() for e in part), key=lambda example: example.id)
        inputs = describe_collecting(self.model, self.tokenizer, prompts, settings)

        def do(folder: Path) -> dict[str, Any]:
            collect_answers(self.model, self.tokenizer, prompts, folder / ANSWERS, settings=settings)
            return {"num_prompts": len(prompts)}

        step = Step(self.work, "collect", inputs, keeps_parts=True)
        return self.take(step, do, f"the target answers {len(prompts):,} prompts")

    def sets(self, collected: Step) -> tuple[list[Example], list[Example], list[Example]]:
        """Answers to train on, to choose by and to calibrate on."""
        file = collected.folder / ANSWERS
        answers = {example.id: example for example in load_examples([file])} if file.stat().st_size else {}
        own = {
            name: [answers[prompt.id] for prompt in prompts if prompt.id in answers]
            for name, prompts in self.parts.prompts.items()
        }
        num_prompts = sum(map(len, self.parts.prompts.values()))
        if num_blank := num_prompts - len(answers):
            self.tell(f"{num_blank:,} of {num_prompts:,} answers are blank, and left out.")
        seen, held_out = [*self.parts.train, *own["train"]], [*self.parts.validation, *own["validation"]]
        check_sets(seen, held_out)
        check_num_calibration(len(own["calibration"]), num_prompts, self.settings.alpha)
        return seen, held_out, own["calibration"]

    def train(
        self, folder: Path, datasets: list[Dataset], features: FeatureSettings, settings: TrainSettings
    ) -> dict[str, Any]:
        binding = target_binding(self.model, self.tokenizer)
        seen, unseen = datasets
        how: Any = {"target": binding, "features": features, "settings": settings, "files": self.files}
        trained = train_and_save(seen, unseen, folder, chat_template=self.chat_template, **how)
        update_record(folder, data=[dict(row) for row in self.data])
        return {"validation_auroc": trained.validation_auroc}

    def score(self, trained: Step, examples: Sequence[Example]) -> ScoredAnswers:
        """Risks before calibration: they are read once, and what a temperature does to them is arithmetic."""
        head = SafetyHead.from_pretrained(trained.folder)
        where = (self.cache, self.settings.max_response_tokens)
        return score(self.model, self.tokenizer, head, examples, *where)

    def calibrate(
        self, folder: Path, trained: Step, calibration: Sequence[Example], held_out: Sequence[Example]
    ) -> dict[str, Any]:
        _copy_results(trained, folder)
        record = calibrate_and_save(
            SafetyHead.from_pretrained(trained.folder),
            self.score(trained, calibration),
            self.score(trained, held_out),
            folder,
            alpha=self.settings.alpha,
            max_response_tokens=self.settings.max_response_tokens,
            files=self.files,
            chat_template=self.chat_template,
        )
        return {"risk_threshold": record["risk_threshold"], "temperature": record["temperature"]}

    def probe(self, folder: Path, calibrated: Step, requests: Mapping[str, list[Example]]) -> dict[str, Any]:
        _copy_results(calibrated, folder)
        facts = {**calibrated.facts, "prompt_threshold": None}
        if not has_requests(requests):
            return facts
        train, calibration, validation = (requests[name] for name in ("train", "calibration", "validation"))
        how: Any = {"alpha": self.settings.alpha, "cache_dir": self.cache, "files": self.files}
        how |= {"num_disguises": NUM_DISGUISED, "seed": self.settings.seed}
        where = (self.model, self.tokenizer, folder)
        try:
            record = train_prompts(*where, train, calibration, validation=validation, **how)
        except SafeSpecError as error:  # an extra is not worth the head
            self.tell(f"Prompts are not scored: {error}")
            return facts
        return {**facts, "prompt_threshold": record["prompt_threshold"]}

    def report(
        self,
        folder: Path,
        trained: Step,
        probed: Step,
        calibration: Sequence[Example],
        held_out: Sequence[Example],
    ) -> dict[str, Any]:
        _copy_results(probed, folder)
        head, record = SafetyHead.from_pretrained(folder), read_record(folder)
        temperature = probed.facts["temperature"]
        everything = scale_risks(self.score(trained, [*held_out, *calibration]), temperature)
        report = folder / REPORT_FOLDER
        write_report(everything, head.config.risk_threshold, report, files=self.files, training=record)
        keep_report(report, folder)
        is_held_out = [index < len(held_out) for index in range(len(everything.examples))]
        return measure(head, everything.select(is_held_out), record)


def _copy_results(step: Step, folder: Path) -> None:
    shutil.copytree(step.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STEP_FILE))
