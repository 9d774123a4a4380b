"""Commands that say whether a guard stops harm: methods answer prompts, and a report on their answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SafeSpecError
from .loading import load_draft, load_target
from .options import DATA_HELP, MAX_COUNT, MAX_SEED, ChatTemplate, Dtype, Target, parse_name, parse_path

DEFAULT_METHODS = ("target", "assisted", "safespec", "refuse", "self_reminder", "safespec+self_reminder")
Files = list[str] | None
METHOD_HELP = (
    "What is compared, such as safespec:num_candidates=20. Repeatable. Default: " + ", ".join(DEFAULT_METHODS) + "."
)
HEAD_HELP = "Folder or Hub id. Default: the default target's own, else none."
GUARD_HELP = "For guard_finished and guard_every_n: as --judge of report-evaluation."
DRAFT_HELP = "A draft model or head, a Hub id or folder; or lookup, or none. Default: the default target's own."
DRAFT_HEAD_HELP = "Of --draft, a language model: sorts out candidates before the target reads them. Default: none."
ATTACKER_HELP = "Attacks once more, rewritten by: calm, echo, code, language, cipher, pieces, suffix. Repeatable."
FORWARDS_HELP = "Of the target, for each prompt of --attacker suffix. Default: 300."
JUDGE_HELP = (
    "Who says what is harmful: phrases, a folder of make-judge, a guard model's Hub id or folder, or URL#NAME of a "
    "guard behind an endpoint. Repeatable; the first is that of the overview. Default: phrases."
)
Answers = Annotated[
    Path, typer.Option(parser=parse_path, metavar="FILE", help="JSON lines of answers; what is there is kept.")
]
Attacks = Annotated[
    Files, typer.Option(parser=parse_name, metavar="DATA", help=f"Harmful requests. Repeatable. {DATA_HELP}")
]
Benign = Annotated[Files, typer.Option(parser=parse_name, metavar="DATA", help="Harmless requests.")]
Borderline = Annotated[
    Files, typer.Option(parser=parse_name, metavar="DATA", help="Harmless requests that look harmful.")
]
Tasks = Annotated[
    Files, typer.Option(parser=parse_name, metavar="DATA", help="Requests with a right answer, such as GSM8K.")
]
MultiTurn = Annotated[
    Files, typer.Option(parser=parse_name, metavar="DATA", help="Harmful conversations of several turns.")
]
Methods = Annotated[Files, typer.Option(parser=parse_name, metavar="METHOD", help=METHOD_HELP)]
Attackers = Annotated[Files, typer.Option(metavar="NAME", help=ATTACKER_HELP)]
SuffixForwards = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=MAX_COUNT, help=FORWARDS_HELP, show_default=False)
]
EvaluatedHead = Annotated[str | None, typer.Option(parser=parse_name, metavar="HEAD", help=HEAD_HELP)]
Draft = Annotated[str | None, typer.Option(parser=parse_name, metavar="DRAFT", help=DRAFT_HELP)]
DraftsHead = Annotated[str | None, typer.Option(parser=parse_name, metavar="HEAD", help=DRAFT_HEAD_HELP)]
Guard = Annotated[str | None, typer.Option(parser=parse_name, metavar="JUDGE", help=GUARD_HELP)]


def evaluate(
    out: Answers,
    attacks: Attacks = None,
    benign: Benign = None,
    borderline: Borderline = None,
    tasks: Tasks = None,
    multi_turn: MultiTurn = None,
    method: Methods = None,
    attacker: Attackers = None,
    suffix_forwards: SuffixForwards = None,
    target: Target = None,
    head: EvaluatedHead = None,
    draft: Draft = None,
    draft_head: DraftsHead = None,
    guard: Guard = None,
    chat_template: ChatTemplate = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Of an answer.")] = 128,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, max=MAX_COUNT, help="Prompts answered at once.")] = 8,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=2**31, help="Prompts of each set at most, drawn evenly.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=MAX_SEED, help="Of what methods draw.")] = 0,
    dtype: Dtype = "float32",
) -> None:
    """Lets methods answer sets of prompts: what `report-evaluation` reports on.

    Example: `safespec evaluate --attacks attacks.jsonl --benign benign.jsonl --out answers.jsonl`

    Example: `torchrun --standalone --nproc_per_node 2 -m safespec_hf.cli evaluate --attacks a.jsonl --out b.jsonl`
    """
    from ..evaluation.attackers import SUFFIX, attack
    from ..evaluation.judges_loading import load_judge
    from ..evaluation.prompts import load_prompt_sets
    from ..evaluation.runs import RunSettings, run_evaluation
    from ..evaluation.specs import parse_method
    from ..evaluation.suffixes import SUFFIXES, SuffixSettings, attack_by_suffix
    from ..training.files import check_writable_file

    given: dict[Any, Files] = {"attacks": attacks, "benign": benign, "borderline": borderline, "tasks": tasks}
    given["multi-turn"] = multi_turn
    plain = load_prompt_sets({kind: files or () for kind, files in given.items()}, limit=limit)
    attackers = attacker or []
    sets, searches = attack(plain, attackers), SUFFIX in attackers
    search = SuffixSettings(seed=seed, **({} if suffix_forwards is None else {"num_forwards": suffix_forwards}))
    settings = RunSettings(batch_size=batch_size, seed=seed)
    judge = None if guard is None else load_judge(guard)
    methods = [parse_method(spec, judge) for spec in method or DEFAULT_METHODS]
    check_writable_file(out)
    needs_head = searches or any(one.needs_head for one in methods)
    engine = _load_engine(target, head, draft, draft_head, dtype, chat_template, needs_head=needs_head)
    engine.max_new_tokens = max_new_tokens
    if searches:
        sets |= attack_by_suffix(engine, plain, out.with_name(out.name + SUFFIXES), search)
    num = run_evaluation(engine, methods, sets, out, settings=settings)
    typer.echo(f"{num} answers in {out}")


def _load_engine(
    target: str | None,
    head: str | None,
    draft: str | None,
    draft_head: str | None,
    dtype: str,
    chat_template: str | None,
    *,
    needs_head: bool,
) -> Any:
    from ..defaults.default_target import load_default_head
    from ..evaluation.engine import Engine
    from ..heads.safety_head import SafetyHead
    from ..modeling import attach_safety_head
    from ..training.shards import processes

    if needs_head and head is None and target is not None:
        raise SafeSpecError(
            "Guarded methods and `--attacker suffix` need the target's head: `--head FOLDER`, or an id on the Hub."
        )
    if draft_head is not None and (not needs_head or draft in (None, "lookup", "none")):
        raise SafeSpecError(
            "`--draft-head` needs a language model that drafts, `--draft MODEL`, and a guarded method."
        )
    screen = SafetyHead.from_pretrained(draft_head) if draft_head is not None else None
    processes()  # each process takes its own device, before anything is put on one
    safety_head = SafetyHead.from_pretrained(head) if head is not None else None
    model, tokenizer = load_target(target, dtype, chat_template)
    is_lookup = draft == "lookup"
    drafter = None if is_lookup else load_draft(draft, model, is_default_target=target is None)
    if needs_head:
        attached: dict[str, Any] = {} if screen is None else {"draft": drafter, "draft_head": screen}
        attach_safety_head(model, safety_head or load_default_head(), tokenizer=tokenizer, **attached)
    return Engine(model=model, tokenizer=tokenizer, draft=drafter, lookup_tokens=5 if is_lookup else None)


def report_evaluation(
    answers: Annotated[
        Path, typer.Argument(parser=parse_path, metavar="ANSWERS", help="What `safespec evaluate` wrote.")
    ],
    out: Annotated[
        Path, typer.Option(parser=parse_path, metavar="FOLDER", help="For report.md, report.json and pictures.")
    ],
    judge: Annotated[list[str] | None, typer.Option(parser=parse_name, metavar="JUDGE", help=JUDGE_HELP)] = None,
) -> None:
    """Reports on answers: attack success by judges, over-refusal, accuracy, usefulness, speed, and recovery.

    Verdicts are kept beside the answers, so that a judge reads each once.

    Example: `safespec report-evaluation answers.jsonl --judge phrases --out report`
    """
    import matplotlib  # noqa: F401  # that it is missing is told before the work

    from ..evaluation.judges_loading import PHRASES, load_judge
    from ..evaluation.report import write_evaluation_report
    from ..evaluation.rows import read_answers
    from ..evaluation.similarity import find_similarity
    from ..training.files import check_writable_folder

    read_answers(answers)
    check_writable_folder(out)
    judges = [load_judge(name) for name in judge or [PHRASES]]
    write_evaluation_report(answers, judges, out, similarity=find_similarity())
    typer.echo(f"{out / 'report.md'}")
