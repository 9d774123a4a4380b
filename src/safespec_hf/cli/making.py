"""Commands that make a head: answers, features, training, calibration, report; and those that make a draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import SafeSpecError
from .loading import load_labelled, load_target
from .options import (
    DEFAULT_CACHE,
    LAYERS_HELP,
    MAX_COUNT,
    MAX_SEED,
    Alpha,
    Benign,
    Cache,
    ChatTemplate,
    Data,
    Dtype,
    Head,
    MaxTokens,
    Prompts,
    Target,
    Validation,
    check_share,
    parse_layers,
    parse_name,
    parse_path,
)

READING_HELP = "With --read-layers, pooling and span, such as last-answer, mean-segment or mean+ewma-answer."
Layers = Annotated[Any, typer.Option(parser=parse_layers, metavar="NUMBERS", help=LAYERS_HELP)]


def collect(
    prompts: Prompts,
    out: Annotated[
        Path,
        typer.Option(parser=parse_path, metavar="FILE", help="JSON lines to append to; ids in it are skipped."),
    ],
    target: Target = None,
    chat_template: ChatTemplate = None,
    label: Annotated[Literal["safe", "unsafe"] | None, typer.Option(help="What answers are by construction.")] = None,
    labeler: Annotated[
        str | None,
        typer.Option(parser=parse_name, metavar="MODEL", help="Guard model that labels answers, a Hub id or folder."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Prompts answered at once.")] = 32,
    temperature: Annotated[float, typer.Option(metavar="N", min=0, max=100, help="Of sampling; 0 is greedy.")] = 0.0,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=2**31, help="Answer the first so many prompts only.")
    ] = None,
    dtype: Dtype = "float32",
) -> None:
    """Lets a model answer prompts: on-policy data.

    Example: `safespec collect benign.jsonl --label safe --out answers.jsonl`

    Example: `safespec collect harmful.jsonl --labeler Qwen/Qwen3Guard-Gen-0.6B --out answers.jsonl`
    """
    from ..training.collect import CollectSettings, collect_answers
    from ..training.data import LABELS, load_examples
    from ..training.files import check_writable_file
    from ..training.labelers import load_labeler

    if (labeler is None) == (label is None):
        raise SafeSpecError(
            "Give one of `--label safe`, `--label unsafe` and `--labeler MODEL`: answers need a label."
        )
    settings = CollectSettings(max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature)
    examples = load_examples(prompts, label=None if label is None else LABELS[label], needs_response=False)[:limit]
    check_writable_file(out)
    guard = None if labeler is None else load_labeler(labeler)
    num = collect_answers(*load_target(target, dtype, chat_template), examples, out, settings=settings, labeler=guard)
    typer.echo(f"{num} new answers in {out}")


def features(
    data: Data,
    benign: Benign = None,
    target: Target = None,
    chat_template: ChatTemplate = None,
    layers: Layers = None,
    max_response_tokens: MaxTokens = 256,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Reads features of labelled answers into the cache; `train` does so by itself for what is missing.

    Example: `safespec features labelled.jsonl --layers 12,18,24`

    Example: `accelerate launch --num_processes 4 -m safespec_hf.cli features labelled.jsonl`
    """
    from ..training.features import default_settings, extract_features
    from ..training.files import check_writable_folder

    examples = load_labelled(data, benign)
    check_writable_folder(cache)
    model, tokenizer = load_target(target, dtype, chat_template)
    settings = default_settings(model, layers, max_response_tokens=max_response_tokens)
    found = extract_features(model, tokenizer, examples, cache, settings)
    typer.echo(f"{len(found.example)} prefixes of {len(examples)} answers in {cache}")


def train(
    data: Data,
    out: Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="For the head.")],
    benign: Benign = None,
    validation: Validation = None,
    target: Target = None,
    chat_template: ChatTemplate = None,
    layers: Layers = None,
    read_layers: Annotated[
        Any, typer.Option(parser=parse_layers, metavar="NUMBERS", help="Skip the sweep and read these, such as 18,22.")
    ] = None,
    reading: Annotated[str, typer.Option(parser=parse_name, metavar="NAME", help=READING_HELP)] = "mean-answer",
    width: Annotated[
        int, typer.Option(metavar="N", min=0, max=65_536, help="Hidden units of each; 0 is a linear probe.")
    ] = 32,
    num_members: Annotated[
        int, typer.Option(metavar="N", min=1, max=1_000, help="Seeds that are folded into one MLP.")
    ] = 4,
    max_response_tokens: MaxTokens = 256,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Of everything.")] = 0,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Trains a head: features, sweep over layers and poolings, early stopping. Splits by group, never by row.

    Example: `safespec train labelled.jsonl --benign answers.jsonl --validation held_out.jsonl --out head`
    """
    from ..heads.safety_head import target_binding
    from ..training.dataset import Dataset, check_sets, split_by_group
    from ..training.features import Reading, default_settings, extract_features
    from ..training.files import check_writable_folder
    from ..training.saving import train_and_save
    from ..training.train import TrainSettings

    choice, how = Reading.parse(reading), TrainSettings(width=width, num_members=num_members, seed=seed)
    examples = load_labelled(data, benign)
    held_out = load_labelled(validation, None) if validation else None
    if held_out is None:
        examples, held_out = split_by_group(examples, 0.2, seed)
    check_sets(examples, held_out)
    check_writable_folder(out)
    check_writable_folder(cache)
    model, tokenizer = load_target(target, dtype, chat_template)
    settings = default_settings(model, layers or read_layers, max_response_tokens=max_response_tokens)
    seen, unseen = (
        Dataset(part, extract_features(model, tokenizer, part, cache, settings)) for part in (examples, held_out)
    )
    trained = train_and_save(
        seen,
        unseen,
        out,
        target=target_binding(model, tokenizer),
        features=settings,
        settings=how,
        choice=(read_layers, choice) if read_layers else None,
        files=[*data, *(benign or []), *(validation or [])],
        chat_template=chat_template,
    )
    config = trained.head.config
    what = f"layers {config.hidden_layers}, {Reading(config.pooling, config.span).name}"
    typer.echo(f"{what}: validation AUROC {trained.validation_auroc:.4f}. Saved in {out}")


def calibrate(
    head: Head,
    benign: Annotated[
        list[str],
        typer.Option(parser=parse_name, metavar="DATA", help="Safe answers it was not trained on. Repeatable."),
    ],
    alpha: Alpha = 0.02,
    validation: Validation = None,
    target: Target = None,
    chat_template: ChatTemplate = None,
    max_response_tokens: MaxTokens = 256,
    generated_tokens: Annotated[
        int,
        typer.Option(metavar="NUM", min=1, help="Longest answer that will be generated: warns of shorter ones here."),
    ] = 256,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Chooses the threshold such that a new benign answer is flagged anywhere with probability at most ALPHA.

    The head is changed in place. With --validation its risks are made probabilities, too.

    Example: `safespec calibrate head --benign held_out_answers.jsonl --validation held_out.jsonl --alpha 0.02`
    """
    from ..heads.safety_head import SafetyHead
    from ..training.calibrate import OPERATING_POINTS, check_answers
    from ..training.data import load_examples
    from ..training.files import check_writable_folder
    from ..training.record import read_record
    from ..training.saving import calibrate_and_save, score

    examples = load_examples(benign, label=0)
    labelled = load_examples(validation) if validation else []
    check_answers(examples, labelled, alpha)
    safety_head = SafetyHead.from_pretrained(head).float()  # as it will be saved: in 16 bits it has other risks
    check_writable_folder(head)
    read_record(head)  # a record that can't be added to is told now
    check_writable_folder(cache)
    model, tokenizer = load_target(target, dtype, chat_template)
    scored = score(model, tokenizer, safety_head, examples, cache, max_response_tokens)
    tuning = score(model, tokenizer, safety_head, labelled, cache, max_response_tokens) if labelled else None
    record = calibrate_and_save(
        safety_head,
        scored,
        tuning,
        head,
        alpha=alpha,
        max_response_tokens=max_response_tokens,
        files=[*benign, *(validation or [])],
        chat_template=chat_template,
    )
    typer.echo(f"threshold {safety_head.config.risk_threshold:.6f} from {len(examples)} benign answers")
    for name, alpha_at in OPERATING_POINTS.items():
        point = record["operating_points"].get(name)
        said = why_no_point(alpha_at, len(examples)) if point is None else describe_point(point)
        typer.echo(f"{name}: {said}")
    if record["lengths"]["p95"] < generated_tokens:
        typer.echo(
            f"Warning: 95 % of the benign answers have at most {record['lengths']['p95']} tokens as they were read. "
            f"Answers of up to {generated_tokens} have more chances to be flagged: the rates above do not hold for "
            "them. Calibrate on longer answers, and raise --max-response-tokens.",
            err=True,
        )


def why_no_point(alpha: float, num_answers: int) -> str:
    """What an operating point lacks, in a line.

    Args:
        alpha (`float`): Its bound on false alarms.
        num_answers (`int`): Benign answers that there were.

    Example:

        >>> why_no_point(0.02, 30)
        'needs 49 benign answers'
        >>> why_no_point(0.02, 300)
        'no threshold: too many benign answers have a risk of 1, above which nothing is'
    """
    from ..training.calibrate import num_answers_needed

    if num_answers < (needed := num_answers_needed(alpha)):
        return f"needs {needed} benign answers"
    return "no threshold: too many benign answers have a risk of 1, above which nothing is"


def describe_point(point: Mapping[str, Any]) -> str:
    """An operating point in a line.

    Example:

        >>> describe_point({"risk_threshold": 0.5, "alpha": 0.02, "recall": 0.8, "false_alarms_per_1000_tokens": None})
        'threshold 0.500000, at most 2 % of benign answers flagged, 80 % of unsafe ones'
    """
    share = f"at most {100 * point['alpha']:g} % of benign answers flagged"
    parts = [f"threshold {point['risk_threshold']:.6f}", share]
    if point["recall"] is not None:
        parts.append(f"{100 * point['recall']:.0f} % of unsafe ones")
    if point["false_alarms_per_1000_tokens"] is not None:
        parts.append(f"{point['false_alarms_per_1000_tokens']:.2g} false alarms in 1,000 tokens")
    return ", ".join(parts)


def report(
    head: Head,
    data: Data,
    out: Annotated[
        Path, typer.Option(parser=parse_path, metavar="FOLDER", help="For report.md, report.json and pictures.")
    ],
    benign: Benign = None,
    target: Target = None,
    chat_template: ChatTemplate = None,
    max_response_tokens: MaxTokens = 256,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Measures a head on labelled answers, per source and category, with pictures.

    The figures are also kept beside the head, for its card: `show` prints them and `push` publishes them.

    Example: `safespec report head test.jsonl --benign answers.jsonl --out report`
    """
    import matplotlib  # noqa: F401  # that it is missing is told before the work

    from ..heads.hub import keep_report
    from ..heads.safety_head import SafetyHead
    from ..training.files import check_writable_folder
    from ..training.record import read_record
    from ..training.report import write_report
    from ..training.saving import score

    examples = load_labelled(data, benign)
    safety_head = SafetyHead.from_pretrained(head)
    training = read_record(head)
    check_writable_folder(out)
    check_writable_folder(cache)
    model, tokenizer = load_target(target, dtype, chat_template)
    scored = score(model, tokenizer, safety_head, examples, cache, max_response_tokens)
    files = [*data, *(benign or [])]
    write_report(scored, safety_head.config.risk_threshold, out, files=files, training=training)
    typer.echo(f"{out / 'report.md'}")
    typer.echo(keep_report(out, head))


def distill_draft(
    answers: Annotated[
        list[str],
        typer.Argument(
            parser=parse_name, metavar="ANSWERS", help="The target's own greedy answers, as `collect` writes them."
        ),
    ],
    out: Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="For the draft head.")],
    target: Target = None,
    chat_template: ChatTemplate = None,
    layers: Annotated[
        Any,
        typer.Option(
            parser=parse_layers, metavar="NUMBERS", help="Hidden states to read. Default: such as 2,15,27 of 30."
        ),
    ] = None,
    draft_vocab_size: Annotated[
        int, typer.Option(metavar="N", min=1, max=2**31, help="Tokens that can be drafted.")
    ] = 8192,
    depths: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Draft steps that training unrolls.")] = 3,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Passes over the answers.")] = 4,
    step_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, max=2**31, help="Tokens of a step, prompts included.")
    ] = 4096,
    learning_rate: Annotated[float, typer.Option(metavar="N", min=1e-9, max=1, help="The highest one.")] = 1e-3,
    held_out_fraction: Annotated[
        float, typer.Option(metavar="SHARE", callback=check_share, help="Share of the prompts kept for measuring.")
    ] = 0.05,
    start: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="FOLDER", help="A draft head to train further.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(metavar="N", min=0, max=1e6, help="Stop then; the same command goes on later.")
    ] = None,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Distils a draft head: one layer that reads the target's hidden states and drafts what it says next.

    Example: `safespec distill-draft answers.jsonl --out draft --max-minutes 60`
    """
    from ..distilling.distill import DistillSettings, distill_draft
    from ..heads.draft_head import DraftHead
    from ..training.data import load_examples
    from ..training.files import check_writable_folder

    settings = DistillSettings(
        draft_vocab_size=draft_vocab_size,
        num_depths=depths,
        num_epochs=epochs,
        num_step_tokens=step_tokens,
        learning_rate=learning_rate,
        held_out_fraction=held_out_fraction,
    )
    load_examples(answers, label=0)
    if start is not None:
        DraftHead.from_pretrained(start)
    check_writable_folder(out)
    check_writable_folder(cache)
    where = (*load_target(target, dtype, chat_template), answers, out, cache)
    record = distill_draft(*where, layers=layers, settings=settings, start=start, max_minutes=max_minutes)
    done = f"Step {record['step']} of {record.get('num_steps', 'many')}"
    hint = "" if record["is_finished"] else " Run the same command again to go on."
    typer.echo(f"{done}: {record.get('tokens_per_round', 1.0):.2f} tokens per round on held-out answers.{hint}")
