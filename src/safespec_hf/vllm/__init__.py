"""The same guard inside vLLM: risks out of its own forwards, and recovery from outside, over its prefix cache.

Only `worker`, `cpu_worker`, `runner`, `controller`, `serving`, `routes` and `server` import vLLM, and `metrics` what
comes with it; everything else is plain Python and torch, and is tested without.
"""
