"""Whether an answer is still about its request, by sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from .judges_embedding import EMBEDDER_PACKAGE, SentenceEmbedder, default_embedder
from .summaries import Similarity


def find_similarity() -> Similarity | None:
    """The cosine of the embeddings of request and answer; `None` where the encoder is not installed."""
    return None if find_spec(EMBEDDER_PACKAGE) is None else by_embedding(default_embedder())


def by_embedding(embedder: SentenceEmbedder) -> Similarity:
    """The cosine of the embeddings of request and answer.

    Args:
        embedder ([`SentenceEmbedder`]): Gives vectors of length 1.
    """

    def similarity(requests: Sequence[str], answers: Sequence[str]) -> list[float]:
        requests_ND, answers_ND = embedder.embed([*requests, *answers]).split(len(answers))
        cosines: list[float] = (requests_ND * answers_ND).sum(-1).tolist()
        return cosines

    return similarity
