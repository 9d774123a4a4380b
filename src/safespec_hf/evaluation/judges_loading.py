"""A judge by its name, as commands take it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import SafeSpecError
from .judges import Judge, RefusalPhrases
from .judges_guard import EndpointJudge, GuardModel
from .judges_offline import CONFIG_NAME, OfflineJudge

PHRASES = "phrases"
KEY_VARIABLE = "SAFESPEC_JUDGE_KEY"


def load_judge(name: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Judge:
    """Loads a judge.

    Args:
        name (`str` or `os.PathLike`):
            `"phrases"`; a folder that `safespec make-judge` wrote; a guard model's folder or id on the Hub; or the
            URL of an OpenAI-compatible endpoint, `#`, and the guard's name there, such as
            `http://localhost:8000/v1#Qwen/Qwen3Guard-Gen-0.6B`. If the server wants a key, it is read from the
            environment variable `SAFESPEC_JUDGE_KEY`.
        device (`torch.device` or `str`, *optional*): Where to put a model. Default: a GPU if there is one.

    Returns:
        [`Judge`]: A [`RefusalPhrases`], [`OfflineJudge`], [`GuardModel`] or [`EndpointJudge`].

    Raises:
        SafeSpecError: If there is no such judge.

    Example:

        >>> load_judge("phrases").judge(["When to prune roses?"], ["In late winter."])
        [1.0]
    """
    phrases = RefusalPhrases()
    if str(name) in (PHRASES, phrases.name):
        return phrases
    if str(name).startswith(("http://", "https://")):
        url, _, model = str(name).partition("#")
        if not model:
            raise SafeSpecError(f"Say which guard {url} runs: {url}#NAME, such as {url}#Qwen/Qwen3Guard-Gen-0.6B.")
        return EndpointJudge(url, model, key_variable=KEY_VARIABLE if os.environ.get(KEY_VARIABLE) else None)
    if Path(name, CONFIG_NAME).is_file():
        return OfflineJudge.from_pretrained(name, device=device)
    return GuardModel(name, device=device)
