"""What `generate` returns of every step besides the tokens: scores, logits, hidden states and attentions.

Speculation reads several tokens at once, gives some of them up, and lets rows end at different times. So what plain
decoding would have had at each step is read in one forward over the finished answers, with the inputs that the model
itself prepares for them. Causal attention makes it the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StaticCache
from transformers.utils import ModelOutput

from ..answer.rows import Row
from ..engine.growing import model_layers
from ..engine.traits import CACHE_NAME
from ..outputs import SafeSpecOutput

NAMES = ("scores", "logits", "attentions", "hidden_states")
Steps = tuple[Any, ...]


class Width(NamedTuple):
    """How many keys the attention of a layer sees at a step, beside those of all tokens.

    Attributes:
        window (`int`, *optional*): Of a sliding layer; `None` where all tokens are seen.
        length (`int`, *optional*): Of a static cache, whose unused places are seen as well, with weights of 0.
    """

    window: int | None = None
    length: int | None = None

    def fit(self, weights_BHQK: Tensor) -> Tensor:
        """The weights, over the keys that plain decoding has: of all tokens so far, the last ones are the queries."""
        num_queries, num_keys = weights_BHQK.shape[2:]
        if self.window is not None:
            weights_BHQK = weights_BHQK[..., -min(num_keys, self.window - 1 + num_queries) :]
        missing = (self.length or 0) - weights_BHQK.shape[-1]
        return torch.nn.functional.pad(weights_BHQK, (0, missing)) if missing > 0 else weights_BHQK


def wanted_outputs(config: GenerationConfig) -> tuple[str, ...]:
    """Which of [`NAMES`] a call asks for: none, if it wants nothing but the tokens."""
    return tuple(name for name in NAMES if config.return_dict_in_generate and getattr(config, f"output_{name}"))


def with_steps(
    output: SafeSpecOutput,
    model: Any,
    rows: Sequence[Row],
    *,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    num_cached: int = 0,
) -> SafeSpecOutput:
    """An output with what was asked for besides: one forward over finished answers, cut into plain decoding's steps.

    A row that has ended goes on with padding, as in plain decoding. Hidden reflections are read where they stand, and
    left out of what is returned.

    Args:
        output ([`SafeSpecOutput`]): Without them.
        model ([`~transformers.PreTrainedModel`]): The target.
        rows (`Sequence[Row]`): The finished batch.
        config ([`~transformers.GenerationConfig`]): Of the call; says what is wanted.
        processors ([`~transformers.LogitsProcessorList`]): The caller's, for the whole batch.
        model_kwargs (`dict[str, Any]`): What `generate` prepared for the prompt.
        num_cached (`int`, defaults to 0): Tokens of the prompts that a cache of the caller held.
    """
    wanted = wanted_outputs(config)
    if not wanted or output.risks is None:
        return output
    start, num_new = time.perf_counter(), output.risks.shape[1]
    if num_new == 0:
        return replace(output, **{name: () for name in wanted})
    text = _Text.of(rows, output.sequences, num_new, model_kwargs)
    outputs = _forward(model, text, wanted, model_kwargs)
    if output.statistics is not None:
        output.statistics.num_target_forwards += 1
        output.statistics.target_seconds += time.perf_counter() - start
    with torch.inference_mode(False), torch.no_grad():
        steps: dict[str, Steps] = {}
        if "scores" in wanted or "logits" in wanted:
            steps["logits"] = _logits(outputs.logits, text)
        if "scores" in wanted:
            steps["scores"] = _scores(steps["logits"], output.sequences, processors)
        cuts = _cuts(text, num_cached, is_cached=config.use_cache is not False)
        if "hidden_states" in wanted:
            steps["hidden_states"] = _by_step(outputs.hidden_states, text.seen, cuts, _states_of)
        if "attentions" in wanted:
            cache = None if config.use_cache is False else model_kwargs.get(CACHE_NAME)
            steps["attentions"] = _attentions(model, outputs.attentions, text.seen, cuts, cache)
    return replace(output, **{name: steps[name] for name in wanted})


class _Text(NamedTuple):
    """What the target is to read, the last token left out.

    Attributes:
        ids (`torch.LongTensor` of shape `(B, T)`): As far as they are known.
        num_places (`int`): Of the prompts, padding, images and embeddings included.
        num_new (`int`): Tokens after them that are returned.
        width (`int`): Places of the whole, text that the caller does not see included.
        columns (`torch.LongTensor` of shape `(B, num_new)`, *optional*): Where visible tokens lie, if not in order.
    """

    ids: Tensor
    num_places: int
    num_new: int
    width: int
    columns: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[Row], sequences: Tensor, num_new: int, model_kwargs: dict[str, Any]) -> _Text:
        num_ids, embedded = sequences.shape[1] - num_new, model_kwargs.get("inputs_embeds")
        num_places = num_ids if embedded is None else embedded.shape[1]
        if not any(row.has_hidden for row in rows):
            return cls(sequences[:, :-1], num_places, num_new, num_places + num_new - 1, None)
        texts, columns = [], []
        for row, ids in zip(rows, sequences, strict=True):
            padding = ids[num_ids + row.num_visible :].tolist()
            texts.append(ids[:num_ids].tolist() + row.tokens + padding)
            first = num_places + len(row.tokens)
            columns.append([num_places + index for index in row.visible()] + list(range(first, first + len(padding))))
        width = max(map(len, texts)) - 1
        texts = [(text + [text[-1]] * width)[:width] for text in texts]
        places = sequences.new_tensor(columns).view(len(rows), num_new)
        return cls(sequences.new_tensor(texts), num_places, num_new, num_places + width - num_ids, places)

    @property
    def seen(self) -> Tensor | None:
        """Columns of prompts and visible tokens, but for the last one, which nothing has read."""
        if self.columns is None:
            return None
        prompts = torch.arange(self.num_places, device=self.columns.device).expand(len(self.columns), -1)
        return torch.cat([prompts, self.columns[:, :-1]], dim=1)


def _forward(model: Any, text: _Text, wanted: Sequence[str], model_kwargs: dict[str, Any]) -> Any:
    num_after = text.width - text.num_places
    given = {name: value for name, value in model_kwargs.items() if not name.startswith("output_")}
    given |= {CACHE_NAME: None, "use_cache": False}
    if "logits_to_keep" in given:
        given["logits_to_keep"] = num_after + 1
    if num_after > 0:
        given = model._update_model_kwargs_for_generation(ModelOutput(), given, num_new_tokens=num_after)
        if (embedded := given.get("inputs_embeds")) is not None:
            new = model.get_input_embeddings()(text.ids[:, -num_after:].to(embedded.device))
            given["inputs_embeds"] = torch.cat([embedded, new.to(embedded.dtype)], dim=1)
    inputs = model.prepare_inputs_for_generation(text.ids, is_first_iteration=True, **given)
    return model(
        **inputs,
        return_dict=True,
        output_hidden_states="hidden_states" in wanted,
        output_attentions="attentions" in wanted,
    )


def _logits(logits_BTV: Tensor, text: _Text) -> Steps:
    """Before each new token what the target says of it, in float32 as in plain decoding."""
    start = text.width - logits_BTV.shape[1]  # not all models leave out what was not asked for
    if text.columns is None:
        chosen = logits_BTV[:, text.num_places - 1 - start :]
    else:
        chosen = logits_BTV.take_along_dim((text.columns - 1 - start)[..., None].to(logits_BTV.device), dim=1)
    return tuple(chosen[:, index].to(torch.float32, copy=True) for index in range(text.num_new))


def _scores(logits: Steps, sequences: Tensor, processors: LogitsProcessorList) -> Steps:
    """The same as the caller's processors leave it."""
    first = sequences.shape[1] - len(logits)
    return tuple(
        processors(cast(Any, sequences[:, : first + index].clone()), each.to(sequences.device, copy=True))
        for index, each in enumerate(logits)
    )


def _cuts(text: _Text, num_cached: int, is_cached: bool) -> list[tuple[int, int]]:
    """From and to which place each step reads: without a cache, all of them again."""
    ends = range(text.num_places, text.num_places + text.num_new)
    starts = [num_cached, *ends[:-1]] if is_cached else [0] * text.num_new
    return list(zip(starts, ends, strict=True))


def _by_step(
    layers: Sequence[Tensor | None],
    seen: Tensor | None,
    cuts: Sequence[tuple[int, int]],
    cut: Callable[[Tensor, Tensor | None, int, int], Tensor],
) -> Steps:
    return tuple(
        tuple(None if layer is None else cut(layer, seen, start, end) for layer in layers) for start, end in cuts
    )


def _states_of(states: Tensor, seen: Tensor | None, start: int, end: int) -> Tensor:
    if seen is None:
        return states[..., start:end, :].clone()
    at = seen[:, start:end, None].to(states.device)
    return states.take_along_dim(at.view(*[1] * (states.dim() - 3), *at.shape), dim=-2)  # of several streams, each


def _attentions(
    model: Any,
    layers: Sequence[Tensor | None],
    seen: Tensor | None,
    cuts: Sequence[tuple[int, int]],
    cache: Any,
) -> Steps:
    widths = [] if cache is None else _widths(model, len(layers), cache)

    def weights_of(weights: Tensor, seen: Tensor | None, start: int, end: int) -> Tensor:
        if seen is None:
            return weights[..., start:end, :end].clone()
        at = seen.to(weights.device)[:, None]
        return weights.take_along_dim(at[..., start:end, None], dim=2).take_along_dim(at[..., None, :end], dim=3)

    steps = _by_step(layers, seen, cuts, weights_of)
    if not widths:
        return steps
    return tuple(
        tuple(None if each is None else width.fit(each) for width, each in zip(widths, step, strict=True))
        for step in steps
    )


def _widths(model: Any, num_layers: int, cache: Any) -> list[Width]:
    """For each layer that attends, what its keys are in the cache of a plain call; none where that is not known."""
    is_static = isinstance(cache, StaticCache)
    layers = cache.layers if is_static else model_layers(model)
    if len(layers) != num_layers:
        return []
    return [
        Width(
            window=getattr(layer, "max_cache_len" if is_static else "sliding_window", None)
            if getattr(layer, "is_sliding", False)
            else None,
            length=getattr(layer, "max_cache_len", None) if is_static else None,
        )
        for layer in layers
    ]
