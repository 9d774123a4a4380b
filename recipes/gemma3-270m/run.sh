#!/bin/sh
# Makes a head for Gemma 3 270M, a base model: sh run.sh DATA [WORK]. Every step goes on where it was interrupted.
set -eu
DATA=$1
WORK=${2:-work}
HERE=$(dirname "$0")
DEFAULT=$HERE/../smollm2-135m # the default head's recipe, for the same data
TARGET="--target $WORK/target --chat-template plain --dtype bfloat16"
COMMON="$TARGET --cache $WORK/cache --max-response-tokens 128"

mkdir -p "$WORK"
python "$HERE/load.py" "$WORK/target"
python "$DEFAULT/prepare.py" --data "$DATA" --out "$WORK/prepared"
python "$HERE/choose.py" --data "$DATA" --prepared "$WORK/prepared" --out "$WORK"
for PART in train validation calibration; do
    # shellcheck disable=SC2086  # options are words
    safespec collect "$WORK/safe_prompts_$PART.jsonl" --label safe --max-new-tokens 96 --temperature 0.7 \
        --batch-size 64 --out "$WORK/safe_$PART.jsonl" $TARGET
done
: >"$WORK/begun_train.jsonl" # none: Gemma's terms forbid to drive it to harmful answers
python "$DEFAULT/swap.py" "$WORK"

VALIDATION="--validation $WORK/validation.jsonl --validation $WORK/safe_validation.jsonl"
# shellcheck disable=SC2086
safespec train "$WORK/labelled.jsonl" "$WORK/second_round.jsonl" "$WORK/swapped.jsonl" --benign "$WORK/safe_train.jsonl" \
    --benign "$WORK/references.jsonl" $VALIDATION --out "$WORK/head" --layers 8,10,12,14,16,17 $COMMON
# shellcheck disable=SC2086
safespec calibrate "$WORK/head" --benign "$WORK/safe_calibration.jsonl" --alpha 0.02 --generated-tokens 96 \
    $VALIDATION $COMMON
# shellcheck disable=SC2086
safespec report "$WORK/head" "$WORK/held_out.jsonl" --benign "$WORK/safe_calibration.jsonl" --out "$WORK/report" $COMMON
