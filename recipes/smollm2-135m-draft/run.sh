#!/bin/sh
# Distils a draft head for SmolLM2-135M-Instruct: sh run.sh WORK PROMPTS... Every step goes on where it was interrupted;
# SESSION_MINUTES=60 stops the last step after an hour, to be run again.
set -eu
WORK=$1
shift
HERE=$(dirname "$0")

collect() {
    safespec collect "$1" --label safe --max-new-tokens 128 --batch-size 192 --dtype bfloat16 --out "$2"
}

mkdir -p "$WORK"
python "$HERE/compose.py" --num 1700 --out "$WORK/composed.jsonl"
python "$HERE/prepare.py" --out "$WORK/prompts.jsonl" "$@" "$WORK/composed.jsonl"
collect "$WORK/prompts.jsonl" "$WORK/answers.jsonl"
python "$HERE/compose.py" --answers "$WORK/answers.jsonl" --num 700 --seed 1 --out "$WORK/about.jsonl"
python "$HERE/prepare.py" --out "$WORK/prompts_about.jsonl" "$WORK/about.jsonl"
collect "$WORK/prompts_about.jsonl" "$WORK/answers_about.jsonl"
# shellcheck disable=SC2086  # options are words
safespec distill-draft "$WORK/answers.jsonl" "$WORK/answers_about.jsonl" --out "$WORK/draft" --cache "$WORK/cache" \
    --layers 2,15,27 --draft-vocab-size 8192 --depths 3 --epochs 4 --step-tokens 2048 --dtype bfloat16 \
    ${SESSION_MINUTES:+--max-minutes $SESSION_MINUTES}
