"""What `generate` returns of every step besides the tokens: scores, logits, hidden states and attentions.

Speculation reads several tokens at once, gives some of them up, and lets rows end at different times. So what plain
decoding would have had in its hands at each step is read in one forward over the finished answers, with the inputs that
the model itself prepares for them. Causal attention makes it the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StaticCache
from transformers.utils import ModelOutput

from ..answer.rows import Row
from ..engine.growing import model_layers
from ..engine.traits import CACHE_NAME

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


def read_steps(
    model: Any,
    rows: Sequence[Row],
    sequences: Tensor,
    prompt_length: int,
    *,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    num_cached: int = 0,
) -> dict[str, Steps]:
    """One forward over finished answers, cut into the steps in which plain decoding writes them.

    A row that has ended goes on with padding, as in plain decoding. Hidden reflections are read where they stand, and
    left out of what is returned.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        rows (`Sequence[Row]`): The finished batch.
        sequences (`torch.LongTensor` of shape `(B, prompt + N)`): As they are returned.
        prompt_length (`int`): Tokens of a prompt, padding included.
        config ([`~transformers.GenerationConfig`]): Of the call; says what is wanted.
        processors ([`~transformers.LogitsProcessorList`]): The caller's, for the whole batch.
        model_kwargs (`dict[str, Any]`): What `generate` prepared for the prompt.
        num_cached (`int`, defaults to 0): Tokens of the prompts that a cache of the caller held.

    Returns:
        `dict[str, tuple]`: Of each of [`wanted_outputs`] an entry per new token.
    """
    wanted, num_new = wanted_outputs(config), sequences.shape[1] - prompt_length
    if not wanted or num_new == 0:
        return {name: () for name in wanted}
    ids, columns = _whole_texts(rows, sequences, prompt_length)
    outputs = _forward(model, ids, prompt_length, wanted, model_kwargs)
    with torch.inference_mode(False), torch.no_grad():
        steps: dict[str, Steps] = {}
        if "scores" in wanted or "logits" in wanted:
            logits = _logits(outputs.logits, ids.shape[1], prompt_length, num_new, columns)
            steps["logits"] = tuple(logits)
            pairs = enumerate(logits)
            if "scores" in wanted:
                steps["scores"] = tuple(
                    processors(cast(Any, sequences[:, : prompt_length + index]), cast(Any, each.clone()))
                    for index, each in pairs
                )
        cuts = _cuts(prompt_length, num_new, num_cached, is_cached=config.use_cache is not False)
        seen = None if columns is None else _seen(columns, prompt_length)
        if "hidden_states" in wanted:
            steps["hidden_states"] = _by_step(outputs.hidden_states, seen, cuts, _states_of)
        if "attentions" in wanted:
            steps["attentions"] = _attentions(model, outputs.attentions, seen, cuts, config, model_kwargs)
    return {name: steps[name] for name in wanted}


def _whole_texts(rows: Sequence[Row], sequences: Tensor, prompt_length: int) -> tuple[Tensor, Tensor | None]:
    """What the target is to read, the last token left out; and where visible tokens lie, if any text is hidden."""
    if not any(row.has_hidden for row in rows):
        return sequences[:, :-1], None
    num_new, texts, columns = sequences.shape[1] - prompt_length, [], []
    for row, ids in zip(rows, sequences, strict=True):
        padding = ids[prompt_length + row.num_visible :].tolist()
        texts.append(ids[:prompt_length].tolist() + row.tokens + padding)
        first = prompt_length + len(row.tokens)
        columns.append([prompt_length + index for index in row.visible()] + list(range(first, first + len(padding))))
    width = max(map(len, texts)) - 1
    texts = [(text + [text[-1]] * width)[:width] for text in texts]
    return sequences.new_tensor(texts), sequences.new_tensor(columns).view(len(rows), num_new)


def _forward(model: Any, ids: Tensor, prompt_length: int, wanted: Sequence[str], model_kwargs: dict[str, Any]) -> Any:
    num_after = ids.shape[1] - prompt_length
    given = {name: value for name, value in model_kwargs.items() if not name.startswith("output_")}
    given |= {CACHE_NAME: None, "use_cache": False}
    if "logits_to_keep" in given:
        given["logits_to_keep"] = num_after + 1
    if num_after > 0:
        given = model._update_model_kwargs_for_generation(ModelOutput(), given, num_new_tokens=num_after)
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
    return model(
        **inputs,
        return_dict=True,
        output_hidden_states="hidden_states" in wanted,
        output_attentions="attentions" in wanted,
    )


def _logits(
    logits_BTV: Tensor, width: int, prompt_length: int, num_new: int, columns: Tensor | None
) -> list[Tensor]:
    """Before each new token what the target says of it, in float32 as in plain decoding."""
    start = width - logits_BTV.shape[1]  # not all models leave out what was not asked for
    if columns is None:
        chosen = logits_BTV[:, prompt_length - 1 - start :]
    else:
        chosen = logits_BTV.take_along_dim((columns - 1 - start)[..., None].to(logits_BTV.device), dim=1)
    return [chosen[:, index].to(torch.float32, copy=True) for index in range(num_new)]


def _seen(columns: Tensor, prompt_length: int) -> Tensor:
    """Columns of prompts and visible tokens, but for the last one, which nothing has read."""
    prompts = torch.arange(prompt_length, device=columns.device).expand(len(columns), -1)
    return torch.cat([prompts, columns[:, :-1]], dim=1)


def _cuts(prompt_length: int, num_new: int, num_cached: int, is_cached: bool) -> list[tuple[int, int]]:
    """From and to which token each step reads: without a cache, all of them again."""
    ends = range(prompt_length, prompt_length + num_new)
    starts = [num_cached, *range(prompt_length, prompt_length + num_new - 1)] if is_cached else [0] * num_new
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
    return states.take_along_dim(seen[:, start:end, None].to(states.device), dim=-2)


def _attentions(
    model: Any,
    layers: Sequence[Tensor | None],
    seen: Tensor | None,
    cuts: Sequence[tuple[int, int]],
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Steps:
    widths = _widths(model, len(layers), model_kwargs.get(CACHE_NAME)) if config.use_cache is not False else []

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
