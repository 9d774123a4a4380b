"""The same guard inside vLLM: risks out of its own forwards, and recovery from outside, over its prefix cache.

Only `worker`, `runner` and `controller` import vLLM; everything else is plain Python and torch, and is tested without.
"""
