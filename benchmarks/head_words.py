"""What words alone tell: TF-IDF and logistic regression on answers, for a head to be held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from safespec_hf.training.data import Example


class BagOfWords:
    """Reads answers only, without prompt, order or context; single words and pairs of them.

    Args:
        examples (`Sequence[Example]`): Labelled answers to train on.
    """

    def __init__(self, examples: Sequence[Example]):
        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=200_000)
        # the strength of the penalty is scikit-learn's default: nothing is chosen here
        self._pipeline = make_pipeline(words, LogisticRegression(max_iter=1000, class_weight="balanced"))
        weights = np.array([example.weight for example in examples])
        labels = [example.label for example in examples]
        texts = [example.response for example in examples]
        self._pipeline.fit(texts, labels, logisticregression__sample_weight=weights)

    def risks(self, examples: Sequence[Example]) -> list[float]:
        """P(unsafe) of each answer."""
        return [float(risk) for risk in self._pipeline.predict_proba([e.response for e in examples])[:, 1]]
