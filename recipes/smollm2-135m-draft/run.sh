#!/bin/sh
# Distils a draft head for SmolLM2-135M-Instruct: sh run.sh WORK PROMPTS... Every step goes on where it was interrupted;
# SESSION_MINUTES=60 stops the last step after an hour, to be run again.
set -eu
WORK=$1
shift
HERE=$(dirname "$0")

python "$HERE/prepare.py" --out "$WORK/prompts.jsonl" "$@"
safespec collect "$WORK/prompts.jsonl" --label safe --max-new-tokens 128 --batch-size 192 --dtype bfloat16 \
    --out "$WORK/answers.jsonl"
# shellcheck disable=SC2086  # options are words
safespec distill-draft "$WORK/answers.jsonl" --out "$WORK/draft" --cache "$WORK/cache" \
    --layers 2,15,27 --draft-vocab-size 8192 --depths 3 --epochs 4 --dtype bfloat16 \
    ${SESSION_MINUTES:+--max-minutes $SESSION_MINUTES}
