"""What every way of running a model is asked, and how: see `surfaces`."""

from typing import Any

import torch

PROMPTS = ["Two flowers that bloom in spring are", "The sea has tides because"]
NUM_TOKENS = 12
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "do_sample": False}
# float32, or rounding in blocks of another shape could change a token
LOAD: dict[str, Any] = {"trust_remote_code": True, "dtype": torch.float32}
SECONDS = 900  # on a machine that does much else


def messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
