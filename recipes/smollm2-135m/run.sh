#!/bin/sh
# Makes the default head from scratch: sh run.sh DATA [WORK]. Every step goes on where it was interrupted.
set -eu
DATA=$1
WORK=${2:-work}
HERE=$(dirname "$0")
LAYERS=12,16,18,20,22,24,26
COMMON="--cache $WORK/cache --max-response-tokens 192"

python "$HERE/prepare.py" --data "$DATA" --out "$WORK"
safespec collect "$WORK/prompts_train.jsonl" --label safe --max-new-tokens 96 --out "$WORK/own_train.jsonl"
safespec collect "$WORK/prompts_calibration.jsonl" --label safe --max-new-tokens 96 --out "$WORK/own_calibration.jsonl"
safespec collect "$WORK/prompts_begun.jsonl" --label unsafe --max-new-tokens 64 --out "$WORK/own_begun.jsonl"

safespec train "$WORK/labelled.jsonl" "$WORK/own_begun.jsonl" --out "$WORK/head" \
    --benign "$WORK/own_train.jsonl" --benign "$WORK/references.jsonl" \
    --validation "$DATA/labelled/gptfuzz_evaluate.jsonl" --layers $LAYERS $COMMON
safespec calibrate "$WORK/head" --benign "$WORK/own_calibration.jsonl" \
    --validation "$DATA/labelled/gptfuzz_evaluate.jsonl" --alpha 0.02 $COMMON
safespec report "$WORK/head" "$DATA/labelled/gptfuzz_evaluate.jsonl" --benign "$WORK/own_calibration.jsonl" \
    --out "$WORK/report" $COMMON
