#!/bin/sh
# Makes the default head from scratch: sh run.sh DATA [WORK]. Every step goes on where it was interrupted.
set -eu
DATA=$1
WORK=${2:-work}
HERE=$(dirname "$0")
LAYERS=12,16,20,24,28
COMMON="--cache $WORK/cache --max-response-tokens 256 --dtype bfloat16"

python "$HERE/prepare.py" --data "$DATA" --out "$WORK"
for PART in train validation calibration; do
    safespec collect "$WORK/safe_prompts_$PART.jsonl" --label safe --max-new-tokens 128 --batch-size 64 \
        --dtype bfloat16 --out "$WORK/safe_$PART.jsonl"
done
for PART in train validation; do
    safespec collect "$WORK/begun_prompts_$PART.jsonl" --label unsafe --max-new-tokens 64 --batch-size 64 \
        --dtype bfloat16 --out "$WORK/begun_$PART.jsonl"
done
python "$HERE/swap.py" "$WORK"

VALIDATION="--validation $DATA/labelled/gptfuzz_evaluate.jsonl --validation $WORK/others_validation.jsonl"
VALIDATION="$VALIDATION --validation $WORK/begun_validation.jsonl --validation $WORK/safe_validation.jsonl"
# shellcheck disable=SC2086  # options are words
safespec train "$WORK/labelled.jsonl" "$WORK/second_round.jsonl" "$WORK/begun_train.jsonl" "$WORK/swapped.jsonl" \
    --benign "$WORK/safe_train.jsonl" --benign "$WORK/references.jsonl" $VALIDATION --out "$WORK/head" \
    --layers $LAYERS --read-layers 16,20,24 --reading mean+ewma-answer $COMMON
# Long answers have more chances to be flagged: the threshold is from answers of up to 1,024 tokens.
safespec calibrate "$WORK/head" --benign "$WORK/safe_calibration.jsonl" --benign "$WORK/others_calibration.jsonl" \
    --alpha 0.02 --validation "$DATA/labelled/gptfuzz_evaluate.jsonl" --cache "$WORK/cache" \
    --max-response-tokens 1024 --generated-tokens 1024 --dtype bfloat16
# A prompt that asks for harm is known before it is answered. Half of the prompts to calibrate on look harmful, and are not.
safespec train-prompts "$WORK/head" "$WORK/requests_train.jsonl" --calibration "$WORK/requests_calibration.jsonl" \
    --validation "$WORK/requests_validation.jsonl" --alpha 0.01 --cache "$WORK/cache"
# shellcheck disable=SC2086
safespec report "$WORK/head" "$WORK/others_validation.jsonl" --benign "$WORK/safe_calibration.jsonl" \
    --out "$WORK/report" $COMMON
