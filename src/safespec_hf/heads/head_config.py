"""What is saved with a safety head: what it reads, how, and from which risk on something is unsafe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from ..checks import check_types, check_value, field_types
from .loading import StrictConfig

Pooling = Literal["last", "mean", "ewma"]
Span = Literal["segment", "answer"]


class SafetyHeadConfig(StrictConfig):
    """Architecture, reading rule, operating point and target binding of a [`SafetyHead`].

    Args:
        hidden_size (`int`): Hidden size of the target. Every layer that is read gives this many features.
        hidden_layers (`list[int]`):
            Which hidden states are read: 0 is the embeddings, `k` the output of layer `k`, and the target's number of
            layers its last, normed hidden state. Several layers are concatenated in this order.
        mlp_ratio (`float`, defaults to 0.5): Width of the hidden layers of the MLP over its number of inputs, > 0.
        num_mlp_layers (`int`, defaults to 2): Linear layers of the MLP, in [1, 100]; 1 is a linear probe.
        dropout (`float`, defaults to 0.1): Dropout between them while training, in [0, 1).
        pooling (`"last"`, `"mean"` or `"ewma"`, defaults to `"mean"`):
            What the MLP sees at a token: its own hidden state (the paper's boundary token), the mean over the scored
            span up to it, or an exponentially weighted mean. Several give their features side by side, in this order:
            `"mean+ewma"`.
        ewma_decay (`float`, defaults to 0.9): Weight of the past per token for `"ewma"`, in (0, 1).
        span (`"segment"` or `"answer"`, defaults to `"segment"`):
            Where pooling starts: at the segment's first token or at the answer's. Inserted text is never in it.
        unsafe_label (`int`, defaults to 1): 1 if the head's logit speaks for P(unsafe), 0 if for P(safe).
        risk_threshold (`float`, defaults to 0.5): A token is unsafe iff its risk is >= this, in (0, 1].
        operating_points (`dict`, *optional*):
            Other thresholds by name, chosen by `SafeSpecConfig(operating_point=)`: each a `dict` with `risk_threshold`
            in (0, 1] and what was measured there. `safespec calibrate` sets `"strict"`, `"balanced"` and
            `"permissive"`; with a `prompt_threshold`, which `safespec train-prompts` adds, for prompts as well.
        prompt_threshold (`float`, *optional*):
            A prompt is unsafe iff its risk is >= this, in (0, 1]. `None`: the head scores answers alone.
            `safespec train-prompts` sets it.
        target (`dict`, *optional*): [`target_binding`] of the target it was trained on.

    Raises:
        TypeError: If a value is of another type, or there is no such field.
        ValueError: If a value is outside of its range.

    Example:

        >>> from safespec_hf import SafetyHeadConfig
        >>> SafetyHeadConfig(hidden_size=576, hidden_layers=[22]).num_features
        576
    """

    model_type = "safespec_head"

    hidden_size: int = 0
    hidden_layers: list[int] | None = None
    mlp_ratio: float = 0.5
    num_mlp_layers: int = 2
    dropout: float = 0.1
    pooling: str = "mean"
    ewma_decay: float = 0.9
    span: str = "segment"
    unsafe_label: int = 1
    risk_threshold: float = 0.5
    operating_points: dict[str, Any] | None = None
    prompt_threshold: float | None = None
    target: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises for a value of a wrong type or outside of its range: fields can be set after loading, too.

        Raises:
            TypeError: Names the field, its legal type and its value.
            ValueError: Names the field, its legal range and its value.
        """
        check_types(self, field_types(SafetyHeadConfig))
        check_value("hidden_size", self.hidden_size, self.hidden_size >= 0, "an integer >= 0")
        layers = self.hidden_layers
        check_value("hidden_layers", layers, layers is None or (bool(layers) and min(layers) >= 0), "indices >= 0")
        check_value("mlp_ratio", self.mlp_ratio, self.mlp_ratio > 0, "> 0")
        check_value("num_mlp_layers", self.num_mlp_layers, 1 <= self.num_mlp_layers <= 100, "in [1, 100]")
        check_value("dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        ways, known = self.pooling.split("+"), get_args(Pooling)
        is_sound = set(ways) <= set(known) and len(set(ways)) == len(ways)
        check_value("pooling", self.pooling, is_sound, f"one of {known}, or several of them joined by '+'")
        check_value("ewma_decay", self.ewma_decay, 0 < self.ewma_decay < 1, "in (0, 1)")
        check_value("span", self.span, self.span in get_args(Span), f"one of {get_args(Span)}")
        check_value("unsafe_label", self.unsafe_label, self.unsafe_label in (0, 1), "0 or 1")
        check_value("risk_threshold", self.risk_threshold, 0 < self.risk_threshold <= 1, "in (0, 1]")
        limit = self.prompt_threshold
        check_value("prompt_threshold", limit, limit is None or 0 < limit <= 1, "in (0, 1] or None")
        points = self.operating_points or {}
        is_sound = all(_is_threshold(_get(point, "risk_threshold")) for point in points.values())
        check_value("operating_points", points, is_sound, "dicts with a `risk_threshold` in (0, 1], by name")
        is_sound = all(map(_is_threshold, self.prompt_thresholds.values()))
        check_value("operating_points", points, is_sound, "dicts whose `prompt_threshold`, if any, is in (0, 1]")

    def threshold_at(self, operating_point: str | None = None) -> float:
        """The threshold of an operating point; the head's own without one.

        Raises:
            ValueError: If there is no such point. Names those that there are.
        """
        if operating_point is None:
            return self.risk_threshold
        points = self.operating_points or {}
        if operating_point not in points:
            raise ValueError(
                f"The head has no operating point {operating_point!r}: it has {', '.join(points) or 'none'}. "
                "`safespec calibrate` sets them, or pass `risk_threshold=`."
            )
        return float(points[operating_point]["risk_threshold"])

    def prompt_threshold_at(self, operating_point: str | None = None) -> float | None:
        """The threshold of prompts at an operating point; the head's own where the point has none.

        Example:

            >>> from safespec_hf import SafetyHeadConfig
            >>> points = {"strict": {"risk_threshold": 0.3, "prompt_threshold": 0.5}}
            >>> config = SafetyHeadConfig(prompt_threshold=0.6, operating_points=points)
            >>> config.prompt_threshold_at("strict"), config.prompt_threshold_at()
            (0.5, 0.6)
        """
        if self.prompt_threshold is None or operating_point is None:
            return self.prompt_threshold
        return self.prompt_thresholds.get(operating_point, self.prompt_threshold)

    @property
    def prompt_thresholds(self) -> dict[str, float]:
        """The thresholds of prompts by the names of the operating points that have one."""
        points = self.operating_points or {}
        return {name: point["prompt_threshold"] for name, point in points.items() if "prompt_threshold" in point}

    def set_prompt_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Sets those of the operating points that are named, and takes away those of the others."""
        for name, point in (self.operating_points or {}).items():
            kept = {key: value for key, value in point.items() if key != "prompt_threshold"}
            named = {"prompt_threshold": thresholds[name]} if name in thresholds else {}
            self.operating_points = {**(self.operating_points or {}), name: kept | named}

    @property
    def num_tapped(self) -> int:
        """Numbers that are read at a token: hidden size times the number of layers."""
        return self.hidden_size * len(self.hidden_layers or [])

    @property
    def num_features(self) -> int:
        """Inputs of the MLP: what is read at a token, for every way of pooling."""
        return self.num_tapped * len(self.pooling.split("+"))


def _get(point: object, name: str) -> object:
    return point.get(name) if isinstance(point, Mapping) else None


def _is_threshold(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
