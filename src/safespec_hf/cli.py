"""The command `safespec`: from labelled text to a calibrated, published head. Thin: the work is in `training`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .heads.safety_head import SafetyHead
    from .training.data import Example
    from .training.features import FeatureSettings
    from .training.train import Dataset

try:
    import matplotlib  # noqa: F401
    import sklearn  # noqa: F401
    import tqdm  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(
        f"`safespec` needs {error.name}, which is not installed: pip install safespec-hf[train]"
    ) from error

from .errors import SafeSpecError

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

Files = Annotated[list[str], typer.Argument(help="JSON lines, Parquet, CSV, a `datasets` folder or a Hub id.")]
Benign = Annotated[list[str] | None, typer.Option(help="Like DATA, but rows without a label are safe. Repeatable.")]
Target = Annotated[str | None, typer.Option(help="The target: a Hub id or folder. Default: SmolLM2-135M-Instruct.")]
Dtype = Annotated[str, typer.Option(help="The target's weights: float32, bfloat16 or float16.")]
Cache = Annotated[Path, typer.Option(help="Folder that keeps features and risks, so that a killed run goes on.")]
Layers = Annotated[
    str | None, typer.Option(help="Hidden states to read, such as 12,18,24. Default: from the middle on.")
]
MaxTokens = Annotated[int, typer.Option(help="Longer answers are cut.")]

DEFAULT_CACHE = Path("~/.cache/safespec-hf/training")


@app.command()
def collect(
    prompts: Files,
    out: Annotated[Path, typer.Option(help="JSON lines file to append to; ids in it are skipped.")],
    target: Target = None,
    label: Annotated[str | None, typer.Option(help="safe or unsafe: what answers are by construction.")] = None,
    labeler: Annotated[str | None, typer.Option(help="Guard model that labels answers, by id.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    limit: Annotated[int | None, typer.Option(help="Answer the first so many prompts only.")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Lets a model answer prompts: on-policy data.

    Example: `safespec collect benign.jsonl --label safe --out answers.jsonl`

    Example: `safespec collect harmful.jsonl --labeler Qwen/Qwen3Guard-Gen-0.6B --out answers.jsonl`
    """
    from .training.collect import CollectSettings, collect_answers
    from .training.data import LABELS, load_examples
    from .training.labelers import load_labeler

    if labeler is None and label not in LABELS:
        raise SafeSpecError("Give `--label safe`, `--label unsafe` or `--labeler ID`: answers need a label.")
    examples = load_examples(prompts, label=None if label is None else LABELS[label], needs_response=False)[:limit]
    settings = CollectSettings(max_new_tokens=max_new_tokens, batch_size=batch_size, temperature=temperature)
    guard = None if labeler is None else load_labeler(labeler)
    num = collect_answers(*_load_target(target, dtype), examples, out, settings=settings, labeler=guard)
    typer.echo(f"{num} new answers in {out}")


@app.command()
def features(
    data: Files,
    benign: Benign = None,
    target: Target = None,
    layers: Layers = None,
    max_response_tokens: MaxTokens = 256,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Reads features of labelled answers into the cache; `train` does so by itself for what is missing.

    Example: `safespec features labelled.jsonl --layers 12,18,24`

    Example: `accelerate launch --num_processes 4 -m safespec_hf.cli features labelled.jsonl`
    """
    examples = _load_labelled(data, benign)
    model, tokenizer = _load_target(target, dtype)
    settings = _feature_settings(model, layers, max_response_tokens)
    found = _extract(model, tokenizer, examples, cache, settings)
    typer.echo(f"{len(found.features.example)} prefixes of {len(examples)} answers in {cache}")


@app.command()
def train(
    data: Files,
    out: Annotated[Path, typer.Option(help="Folder for the head.")],
    benign: Benign = None,
    validation: Annotated[list[str] | None, typer.Option(help="Labelled answers to choose by. Repeatable.")] = None,
    target: Target = None,
    layers: Layers = None,
    read_layers: Annotated[str | None, typer.Option(help="Skip the sweep and read these, such as 18,22.")] = None,
    reading: Annotated[str, typer.Option(help="With --read-layers: pooling and span.")] = "mean-answer",
    width: Annotated[int, typer.Option(help="Hidden units of each member; 0 is a linear probe.")] = 32,
    num_members: Annotated[int, typer.Option(help="Seeds that are folded into one MLP.")] = 4,
    max_response_tokens: MaxTokens = 256,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Trains a head: features, sweep over layers and poolings, early stopping. Splits by group, never by row.

    Example: `safespec train labelled.jsonl --benign answers.jsonl --validation held_out.jsonl --out head`
    """
    from .heads.safety_head import target_binding
    from .training.features import Reading
    from .training.report import provenance
    from .training.train import TrainSettings, check_sets, split_by_group, sweep_readings, train_head

    examples = _load_labelled(data, benign)
    held_out = _load_labelled(validation, None) if validation else None
    if held_out is None:
        examples, held_out = split_by_group(examples, 0.2, seed)
    check_sets(examples, held_out)
    model, tokenizer = _load_target(target, dtype)
    settings = _feature_settings(model, layers or read_layers, max_response_tokens)
    training_set = _extract(model, tokenizer, examples, cache, settings)
    validation_set = _extract(model, tokenizer, held_out, cache, settings)
    if read_layers:
        sweep, chosen, choice = [], _parse_layers(read_layers), Reading(*reading.split("-"))
    else:
        sweep = sweep_readings(training_set, validation_set, settings.readings)
        chosen, choice = sweep[0]["hidden_layers"], Reading(*sweep[0]["reading"])
    how = TrainSettings(width=width, num_members=num_members, seed=seed)
    binding = target_binding(model, tokenizer)
    pair = (training_set, validation_set)
    trained = train_head(*pair, chosen, choice, target=binding, ewma_decay=settings.ewma_decay, settings=how)
    trained.head.save_pretrained(out)
    files = [*data, *(benign or []), *(validation or [])]
    _update_record(out, sweep=sweep, validation_auroc=trained.validation_auroc, provenance=provenance(files))
    typer.echo(f"layers {chosen}, {choice.name}: validation AUROC {trained.validation_auroc:.4f}. Saved in {out}")


@app.command()
def calibrate(
    head: Annotated[Path, typer.Argument(help="Folder of the head; it is changed in place.")],
    benign: Annotated[list[str], typer.Option(help="Safe answers that it was not trained on. Repeatable.")],
    alpha: Annotated[
        float, typer.Option(help="Bound on the share of benign answers that are flagged anywhere.")
    ] = 0.02,
    validation: Annotated[list[str] | None, typer.Option(help="Labelled answers for the temperature.")] = None,
    target: Target = None,
    max_response_tokens: MaxTokens = 256,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Chooses the threshold such that a new benign answer is flagged anywhere with probability at most ALPHA.

    Example: `safespec calibrate head --benign held_out_answers.jsonl --validation held_out.jsonl --alpha 0.02`
    """
    from .heads.safety_head import SafetyHead
    from .training.calibrate import num_answers_needed
    from .training.data import load_examples
    from .training.report import provenance

    examples = load_examples(benign, label=0)
    labelled = load_examples(validation) if validation else []
    needed = num_answers_needed(alpha)
    if len(examples) < needed:
        raise SafeSpecError(f"alpha={alpha} needs at least {needed} benign answers, got {len(examples)}.")
    model, tokenizer = _load_target(target, dtype)
    safety_head = SafetyHead.from_pretrained(head)
    cutoff = {"max_response_tokens": max_response_tokens}
    scored = [_score(model, tokenizer, safety_head, part, cache, cutoff) for part in (examples, labelled)]
    record = _calibrate(safety_head, scored[0], scored[1], alpha)
    safety_head.save_pretrained(head)
    record |= {"max_response_tokens": max_response_tokens, "provenance": provenance([*benign, *(validation or [])])}
    _update_record(head, calibration=record)
    typer.echo(f"threshold {safety_head.config.risk_threshold:.6f} from {len(examples)} benign answers")


@app.command()
def report(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    data: Files,
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.json and pictures.")],
    benign: Benign = None,
    target: Target = None,
    max_response_tokens: MaxTokens = 256,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Measures a head on labelled answers, per source and category, with pictures.

    Example: `safespec report head test.jsonl --benign answers.jsonl --out report`
    """
    from .heads.safety_head import SafetyHead
    from .training.report import write_report

    examples = _load_labelled(data, benign)
    model, tokenizer = _load_target(target, dtype)
    safety_head = SafetyHead.from_pretrained(head)
    scored = _score(model, tokenizer, safety_head, examples, cache, {"max_response_tokens": max_response_tokens})
    files = [*data, *(benign or [])]
    write_report(scored, safety_head.config.risk_threshold, out, files=files, training=_read_record(head))
    typer.echo(f"{out / 'report.md'}")


@app.command()
def distill_draft(
    answers: Annotated[list[str], typer.Argument(help="The target's own greedy answers, as `collect` writes them.")],
    out: Annotated[Path, typer.Option(help="Folder for the draft head.")],
    target: Target = None,
    layers: Annotated[str | None, typer.Option(help="Hidden states to read. Default: such as 2,15,27 of 30.")] = None,
    draft_vocab_size: Annotated[int, typer.Option(help="Tokens that can be drafted.")] = 8192,
    depths: Annotated[int, typer.Option(help="Draft steps that training unrolls.")] = 3,
    epochs: Annotated[int, typer.Option(help="Passes over the answers.")] = 4,
    step_tokens: Annotated[int, typer.Option(help="Tokens of a step, prompts included.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="The highest one.")] = 1e-3,
    held_out_fraction: Annotated[float, typer.Option(help="Share of the prompts kept for measuring.")] = 0.05,
    start: Annotated[Path | None, typer.Option(help="A draft head to train further.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop then; the same command goes on later.")] = None,
    cache: Cache = DEFAULT_CACHE,
    dtype: Dtype = "float32",
) -> None:
    """Distils a draft head: one layer that reads the target's hidden states and drafts what it says next.

    Example: `safespec distill-draft answers.jsonl --out draft --max-minutes 60`
    """
    from .distilling.distill import DistillSettings, distill_draft

    settings = DistillSettings(
        draft_vocab_size=draft_vocab_size,
        num_depths=depths,
        num_epochs=epochs,
        num_step_tokens=step_tokens,
        learning_rate=learning_rate,
        held_out_fraction=held_out_fraction,
    )
    where = (*_load_target(target, dtype), answers, out, cache)
    chosen = _parse_layers(layers) if layers else None
    record = distill_draft(*where, layers=chosen, settings=settings, start=start, max_minutes=max_minutes)
    done = f"Step {record['step']} of {record.get('num_steps', 'many')}"
    hint = "" if record["is_finished"] else " Run the same command again to go on."
    typer.echo(f"{done}: {record.get('tokens_per_round', 1.0):.2f} tokens per round on held-out answers.{hint}")


@app.command()
def push(
    head: Annotated[Path, typer.Argument(help="Folder of the head.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is missing.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card, and send nothing.")] = False,
) -> None:
    """Publishes a head, with its card, on the Hub.

    Example: `safespec push head owner/smollm2-135m-safety-head --dry-run`
    """
    from .heads.hub import describe_push, push_head

    if dry_run:
        typer.echo(describe_push(head, repo_id, revision=revision))
    else:
        typer.echo(push_head(head, repo_id, private=private, revision=revision))


@app.command()
def show(head: Annotated[str, typer.Argument(help="Folder or Hub id of a head.")]) -> None:
    """Prints a head's card and what it is bound to.

    Example: `safespec show owner/smollm2-135m-safety-head`
    """
    from .heads.hub import show_head

    typer.echo(show_head(head))


def _load_labelled(data: list[str], benign: list[str] | None) -> list[Example]:
    from .training.data import load_examples

    return [*load_examples(data), *(load_examples(benign, label=0) if benign else [])]


def _load_target(target: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .defaults.default_target import load_default_target

    if dtype not in ("float32", "bfloat16", "float16"):
        raise SafeSpecError(f"`--dtype` must be float32, bfloat16 or float16, but it is {dtype!r}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if target is None:
        return load_default_target(dtype=getattr(torch, dtype), device=device)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype), device_map=device).eval()
    return model, AutoTokenizer.from_pretrained(target)


def _parse_layers(layers: str) -> tuple[int, ...]:
    try:
        return tuple(int(layer) for layer in layers.split(","))
    except ValueError as error:
        raise SafeSpecError(
            f"Layers are numbers with commas between them, such as 12,18,24, not {layers!r}."
        ) from error


def _feature_settings(model: PreTrainedModel, layers: str | None, max_response_tokens: int) -> FeatureSettings:
    from .training.features import FeatureSettings

    total = model.config.get_text_config(decoder=True).num_hidden_layers
    # the paper found the first quarter of the layers useless and all from the middle on alike
    default = tuple(range(total // 2, total + 1, max(1, total // 10)))
    chosen = _parse_layers(layers) if layers else default
    if not all(0 <= layer <= total for layer in chosen):
        raise SafeSpecError(f"Layers must be from 0 to {total} for this target, but they are {list(chosen)}.")
    return FeatureSettings(layers=chosen, max_response_tokens=max_response_tokens)


def _extract(model: Any, tokenizer: Any, examples: list[Example], cache: Path, settings: FeatureSettings) -> Dataset:
    from .training.features import extract_features
    from .training.train import Dataset

    return Dataset(examples, extract_features(model, tokenizer, examples, cache.expanduser(), settings))


def _score(
    model: Any, tokenizer: Any, head: SafetyHead, examples: list[Example], cache: Path, limits: dict[str, int]
) -> Any:
    from .training.metrics import ScoredAnswers
    from .training.scores import read_risks

    return ScoredAnswers(examples, read_risks(model, tokenizer, head, examples, cache.expanduser(), **limits))


def _calibrate(head: SafetyHead, benign: Any, labelled: Any, alpha: float) -> dict[str, Any]:
    """Folds a temperature into the head, sets its threshold, and returns the record of it."""
    import torch

    from .training.calibrate import conformal_threshold, fit_temperature, fold_temperature, thresholds_by_source

    logits = torch.logit(torch.tensor(benign.highest()), eps=1e-9)
    temperature = 1.0
    if len(labelled.examples):
        highest = torch.logit(torch.tensor(labelled.highest()), eps=1e-9)
        temperature = fit_temperature(highest, torch.tensor(labelled.labels))
        fold_temperature(head, temperature)
    scores = torch.sigmoid(logits / temperature).tolist()
    head.config.risk_threshold = conformal_threshold(scores, alpha)
    by_source: dict[str, list[float]] = {}
    for example, score in zip(benign.examples, scores, strict=True):
        by_source.setdefault(example.source, []).append(score)
    return {
        "alpha": alpha,
        "num_answers": len(scores),
        "temperature": temperature,
        "risk_threshold": head.config.risk_threshold,
        "by_source": thresholds_by_source(by_source, alpha),
    }


def _read_record(head: Path) -> dict[str, Any]:
    file = head / "training.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _update_record(head: Path, **parts: Any) -> None:
    """What is known of a head's making lies beside it, in `training.json`."""
    (head / "training.json").write_text(json.dumps(_read_record(head) | parts, indent=2) + "\n")


def main() -> None:
    """Runs the command; errors that a user can mend are one line without a traceback."""
    try:
        app()
    except (SafeSpecError, OSError) as error:
        typer.secho(f"safespec: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
