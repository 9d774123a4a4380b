"""What is said of a head: its model card for the Hub, its evaluation results, and the text of `safespec show`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData

from ..errors import SafeSpecError
from .head_config import SafetyHeadConfig
from .loading import StrictModel

Report = Mapping[str, Any]

UNPUBLISHED = "path/to/this/folder"  # stands for the id of a head until it has one

_TAGS = ["safety", "guardrail", "speculative-decoding", "safespec"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_MARK = "<!-- Written by safespec-hf, and written anew when {thing} is published, unless edited: {digest} -->"
_COLUMNS = ("num_safe", "num_unsafe", "auroc", "auroc_non_refusal", "recall", "false_alarms")

_METHOD = """\
A safety head for `safespec-hf`. It reads hidden states of its target while the target verifies drafted tokens, and
gives every token a risk. An answer that reaches the threshold is rolled back and goes on from a safe one of several
sampled continuations.

The method is that of *SafeSpec: Fast and Safe LLM via Dynamic Reflective Sampling* (Xu et al., ICML 2026,
[arXiv:2606.19755](https://arxiv.org/abs/2606.19755)). This head and safespec-hf are an independent implementation, by
other people than the paper's authors."""

_LIMITS = """\
- It works for the target above only. A fine-tune, a merge or a heavy quantization moves hidden states: check the head
  on it first. A head that is given to another target is refused.
- A guarantee, where one is stated, bounds false alarms on answers like those it was calibrated on. Nothing bounds the
  unsafe answers that are missed: see the recall of each source, and expect less on sources that are not listed.
- Languages, topics and attacks that its data lacks are unmeasured. Someone who knows the head can try to evade it.
- It is one layer of defence, and replaces neither a target's own training nor moderation."""

_SNIPPET = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from safespec_hf import attach_safety_head

tokenizer = AutoTokenizer.from_pretrained("{target}"){template}
model = attach_safety_head(AutoModelForCausalLM.from_pretrained("{target}"), "{head}", tokenizer=tokenizer)

messages = [{{"role": "user", "content": "Tell me about tides."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, safespec=True, max_new_tokens=64, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0]), output.finish_reasons)
```"""


def model_card(
    head: StrictModel, *, report: Report | None = None, repo_id: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a head: method, binding, reading, threshold and its guarantee, data, metrics, limits, use.

    Args:
        head ([`SafetyHead`]): The head.
        report (`Mapping`, *optional*):
            Content of the `report.json` that `safespec report` writes. May also have `"training"`, the content of
            `training.json`, and `"data"` (also in that), rows of `name`, `license` and `use`.
        repo_id (`str`, *optional*): Where it will be published, for the snippet and the name.
        license (`str`, *optional*):
            Of the head's weights, as the Hub abbreviates it, such as `"apache-2.0"`. There is no default: whoever
            publishes chooses.

    Raises:
        SafeSpecError: If `license` is no such abbreviation.

    Returns:
        `huggingface_hub.ModelCard`: With metadata.

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.card import model_card
        >>> model_card(SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1]))).data.library_name
        'safespec-hf'
    """
    report = report or {}
    check_license(license)
    target = (head.config.target or {}).get("model_id") or "path/to/the/target"
    sections = {
        "What it reads": describe_reading(head.config) + f" Then {describe_size(head)}.",
        "Target": to_table([{"field": name, "value": value} for name, value in (head.config.target or {}).items()]),
        "Threshold": describe_threshold(head.config.risk_threshold, report) + _describe_points(head),
        **({} if head.config.prompt_threshold is None else {"Prompts": _describe_prompts(head, report)}),
        "Data and licences": _describe_data(report, license),
        "Metrics": _describe_metrics(report),
        "Limits": _LIMITS,
        "How to use": _SNIPPET.format(target=target, head=repo_id or UNPUBLISHED, template=_set_template(report)),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    title = (repo_id or "Safety head").split("/")[-1]
    metadata = _card_data(head, report, title, license).to_yaml()
    return mark_card(f"---\n{metadata}\n---\n\n# {title}\n\n{_METHOD}\n\n{body}\n\n")


def check_license(license: str | None) -> None:
    """Raises unless it is none, or could be an abbreviation of the Hub.

    Raises:
        SafeSpecError: Says what would be one.
    """
    if license is not None and not _LICENSE.fullmatch(license):
        raise SafeSpecError(
            "`license` must be abbreviated as on the Hub, such as 'apache-2.0', 'mit' or 'other', but it is "
            f"{license!r}."
        )


def mark_card(text: str, thing: str = "the head") -> ModelCard:
    """A card of that text, which [`is_unedited`] knows again."""
    return ModelCard(text + _MARK.format(thing=thing, digest=_digest(text)) + "\n")


def is_unedited(card: str, thing: str = "the head") -> bool:
    """Whether the text of a card is as [`mark_card`] wrote it, so that writing it anew loses nothing.

    Example:

        >>> from safespec_hf import SafetyHead, SafetyHeadConfig
        >>> from safespec_hf.heads.card import is_unedited, model_card
        >>> text = str(model_card(SafetyHead(SafetyHeadConfig(hidden_size=8, hidden_layers=[1]))))
        >>> is_unedited(text), is_unedited(text.replace("Safety head", "My head"))
        (True, False)
    """
    text, _, mark = card.rstrip().rpartition("\n")
    return mark == _MARK.format(thing=thing, digest=_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def _card_data(head: StrictModel, report: Report, title: str, license: str | None) -> ModelCardData:
    # No pipeline tag: its input is hidden states, and no pipeline could load it from its page.
    base_model = (head.config.target or {}).get("model_id")
    datasets = [row["name"] for row in _data_rows(report) if _HUB_ID.fullmatch(row["name"])]
    results = [
        EvalResult("text-classification", source, source, "roc_auc", round(row["auroc"], 6), metric_name="AUROC")
        for source, row in measured_sources(report).items()
    ]
    return ModelCardData(
        library_name="safespec-hf",
        license=license,
        base_model=base_model,
        # beside an unchanged base model, like an adapter, and not a fine-tune of it
        base_model_relation="adapter" if base_model else None,
        tags=_TAGS,
        datasets=datasets or None,
        metrics=["roc_auc"] if results else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def eval_results(report: Report, repo_id: str | None = None) -> list[EvalResultEntry]:
    """Entries for `.eval_results/`, which the Hub shows beside a benchmark: for sources with a data set there only.

    Args:
        report (`Mapping`):
            As for [`model_card`]. Its `"benchmarks"` maps a source to `dataset_id` and, if not "default", `task_id`;
            a source that is named like a Hub id needs no entry.
        repo_id (`str`, *optional*): Where the report will be published, to link to it.

    Example:

        >>> from safespec_hf.heads.card import eval_results
        >>> sources = {"owner/name": {"auroc": 0.93, "num_safe": 50, "num_unsafe": 60}, "local": {"auroc": 0.9}}
        >>> [entry.dataset_id for entry in eval_results({"results": {"sources": sources}})]
        ['owner/name']
    """
    named = {source: {"dataset_id": source} for source in measured_sources(report) if _HUB_ID.fullmatch(source)}
    benchmarks: Mapping[str, Mapping[str, str]] = named | dict(report.get("benchmarks", {}))
    link = f"https://huggingface.co/{repo_id}/blob/main/report.json" if repo_id else None
    return [
        EvalResultEntry(
            dataset_id=benchmarks[source]["dataset_id"],
            task_id=benchmarks[source].get("task_id", "default"),
            value=round(row["auroc"], 6),
            date=report.get("provenance", {}).get("time"),
            source_url=link,
            source_name="Report" if link else None,
            notes=f"AUROC of an answer's highest risk; {row['num_safe']} safe, {row['num_unsafe']} unsafe answers",
        )
        for source, row in measured_sources(report).items()
        if source in benchmarks
    ]


def measured_sources(report: Report) -> dict[str, Mapping[str, Any]]:
    """The sources of a report that have an AUROC, which needs answers of both classes."""
    sources: Mapping[str, Mapping[str, Any]] = report.get("results", {}).get("sources", {})
    return {source: row for source, row in sources.items() if row.get("auroc") is not None}


def describe_reading(config: SafetyHeadConfig) -> str:
    """Which hidden states are read, and how they are pooled."""
    span = {"segment": "the open segment", "answer": "the answer"}[config.span]
    described = {
        "last": "the token's own hidden state",
        "mean": f"the mean over {span} up to the token",
        "ewma": f"an exponentially weighted mean (decay {config.ewma_decay:g}) over {span} up to the token",
    }
    pooling = " and ".join(described[way] for way in config.pooling.split("+"))
    layers, total = config.hidden_layers or [], (config.target or {}).get("num_layers", "?")
    numbers = ", ".join(map(str, layers))
    return (
        f"Hidden states {numbers} of {total} (0 is the embeddings), {len(layers)} × {config.hidden_size}: {pooling}."
    )


def describe_size(head: StrictModel) -> str:
    """The MLP's widths, and its size."""
    widths = [head.config.num_features, *(weight.shape[0] for weight in head.parameters() if weight.dim() == 2)]
    arrows, dtype = " → ".join(map(str, widths)), str(head.dtype).removeprefix("torch.")
    size = f"{head.num_parameters():,} parameters, {head.get_memory_footprint() / 1e3:,.1f} kB in {dtype}"
    return f"an MLP {arrows}, {size}"


def describe_threshold(threshold: float, report: Report) -> str:
    """The threshold, and what is guaranteed of it: nothing unless the calibration's threshold is this very one."""
    said = f"A token is unsafe if its risk is {format_threshold(threshold)} or more."
    calibration = report.get("training", {}).get("calibration") or report.get("results", {}).get("calibration")
    if not calibration:
        return f"{said} No calibration is recorded, so no rate of false alarms is guaranteed."
    if calibration["risk_threshold"] != threshold:
        other = format_threshold(calibration["risk_threshold"])
        return f"{said} It was calibrated at {other}: that guarantee does not hold for this threshold."
    alpha, num, sources = calibration["alpha"], calibration["num_answers"], calibration.get("by_source", {})
    tokens = calibration.get("max_response_tokens")
    kind, read, where = "whole ", "", "anywhere"
    if tokens:
        kind, read, where = "", f" Answers were read up to {tokens} tokens.", f"in its first {tokens} tokens"
    return (
        f"{said} It was chosen by split conformal prediction on {num} {kind}benign answers"
        f"{' from ' + ', '.join(sources) if sources else ''}, with α = {alpha:g}: it lies just above the "
        f"⌈(n+1)(1−α)⌉-th smallest of their highest risks.{read} A new benign answer that is exchangeable with these "
        f"is flagged {where} with probability at most {alpha:.2%}, over the draw of both. On other sources of answers "
        "the rate may differ."
    )


def _describe_points(head: StrictModel) -> str:
    points = head.config.operating_points or {}
    rows = [
        {"operating point": name} | {key.replace("_", " "): value for key, value in point.items()}
        for name, point in points.items()
    ]
    said = "Other thresholds, for `SafeSpecConfig(operating_point=...)`, calibrated on the same answers:"
    return f"\n\n{said}\n\n{to_table(rows)}" if rows else ""


def _describe_prompts(head: StrictModel, report: Report) -> str:
    """What is said of prompts, and what was measured on those that the probe was not trained on."""
    threshold, record = head.config.prompt_threshold, report.get("training", {}).get("prompts") or {}
    said = (
        f"A prompt is unsafe if its risk is {format_threshold(threshold)} or more: a linear probe reads its last "
        "token, in the same layers. `SafeSpecConfig(screen_prompts=False)` leaves prompts alone."
    )
    if record.get("prompt_threshold") != threshold:
        return f"{said} No calibration is recorded for this threshold."
    num, rows = record["num_prompts"], record["flagged"].items()
    shares = [{"source": name, "prompts": row["num"], "flagged": f"{row['share']:.1%}"} for name, row in rows]
    return (
        f"{said} It was trained on {num['train']} prompts. The threshold was chosen by split conformal prediction on "
        f"{num['calibration']} harmless ones, with α = {record['alpha']:g}. Flagged, of prompts that it was not "
        f"trained on:\n\n{to_table(shares)}"
    )


def format_threshold(threshold: float) -> str:
    """As a card writes it, and exactly: nine digits tell all float32 apart, and thresholds may lie close to 1."""
    return f"{threshold:.9g}"


def _data_rows(report: Report) -> Sequence[Mapping[str, Any]]:
    """Data sets with their licences, from the report or from what `make-head` records of the training."""
    return report.get("data") or report.get("training", {}).get("data") or []


def _describe_data(report: Report, license: str | None) -> str:
    said = f"under `{license}`" if license else "under a licence that was not chosen: ask their owner"
    parts = [f"The head's own weights are {said}."]
    rows = _data_rows(report)
    parts.append(to_table(rows) if rows else "The licences of the data were not recorded.")
    for use, record in (("Training", report.get("training", {})), ("Evaluation", report)):
        files = record.get("provenance", {}).get("data", {})
        rows = [{"file": name, "SHA-256": digest} for name, digest in files.items()]
        parts += [f"{use} files:\n\n{to_table(rows)}"] if rows else []
    return "\n\n".join(parts)


def _describe_metrics(report: Report) -> str:
    sources = report.get("results", {}).get("sources", {})
    if not sources:
        return "No evaluation is recorded."
    rows = [{"source": source} | {name: row.get(name) for name in _COLUMNS} for source, row in sources.items()]
    threshold = format_threshold(report["results"]["risk_threshold"])
    return (
        f"An answer's score is its highest risk. Recall and false alarms are shares of unsafe and safe answers that "
        f"are flagged anywhere at {threshold}; `auroc_non_refusal` leaves out safe answers that refuse.\n\n"
        + to_table(rows)
    )


def _set_template(report: Report) -> str:
    """The line that gives a target's tokenizer the chat template of the head's data, if it has none of its own."""
    template = report.get("training", {}).get("chat_template")
    return f"\ntokenizer.chat_template = {template!r}" if template else ""


def to_json(content: Any) -> str:
    """Indented JSON, with `null` for NaN and infinities: Python would write these, but other readers refuse them.

    Example:

        >>> print(to_json({"auroc": float("nan")}), end="")
        {
          "auroc": null
        }
    """
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(finite, indent=2, allow_nan=False) + "\n"


def to_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table.

    Example:

        >>> print(to_table([{"source": "garden", "auroc": 0.51234}]))
        | source | auroc |
        |---|---|
        | garden | 0.512 |
    """
    if not rows:
        return "Unknown."
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(names), "|" + "---|" * len(names)]
    return "\n".join([*lines, *(_line(row.get(name) for name in names) for row in rows)])


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")
