"""Measures the guard inside vLLM, on the default target and head. Exits with 1 if a bar is missed.

make vllm-env
.venv-vllm/bin/python benchmarks/engine.py                      # half an hour on 2 cores
.venv-vllm/bin/python benchmarks/engine.py --only same,speed    # some

same      with a silent head, greedy tokens are those of vLLM without us, in batches of 8: without drafts, with
          n-grams, with a draft model, 16 tokens of a prefill at a time, at least 20 preemptions, beside sampled ones
risks     of all those answers, at least 2,000 tokens, within 1e-4 of our own forwards
flags     at least 300 requests, half of them flagged at a random position: stopped at that very token, neighbours'
          tokens unchanged, nothing flagged in any answer, no state left
recovery  at least 100 recoveries end as our own decoding ends with the same candidates; share of prefix-cache hits
speed     head on over head off, tokens per second in batches of 8, at least 20 pairs in turns: >= .95; at most 64 KiB
          of state per request
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from engine_parts import PARTS, hold


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine.json"))
    options = parser.parse_args()
    return hold({name: partial(run, options) for name, run in PARTS.items()}, options.only, options.out)


if __name__ == "__main__":
    sys.exit(main())
