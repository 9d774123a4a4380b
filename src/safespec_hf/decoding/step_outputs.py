"""What `generate` returns of every step besides the tokens: scores, logits, hidden states and attentions.

Speculation reads several tokens at once, gives some of them up, and lets rows end at different times. So what plain
decoding would have had at each step is read in one forward over the finished answers, with the inputs that the model
itself prepares for them. Causal attention makes it the same. Where a cache of the caller's holds what no token says,
such as an image, answers are read on from a copy of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StaticCache

from ..engine.growing import model_layers
from ..engine.mixers import Mixers, Parts, mixers_of
from ..engine.private_names import is_user_cache, next_model_kwargs
from ..engine.traits import CACHE_NAME, prepare_inputs, reads_alone
from ..outputs import SafeSpecOutput
from .prompts import placeholders

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
    config: GenerationConfig,
    processors: LogitsProcessorList,
    model_kwargs: dict[str, Any],
    before: Any = None,
) -> SafeSpecOutput:
    """An output with what was asked for besides: finished answers are read once more, and cut into plain steps.

    A row that has ended goes on with padding, as in plain decoding.

    Args:
        output ([`SafeSpecOutput`]): Without them.
        model ([`~transformers.PreTrainedModel`]): The target.
        config ([`~transformers.GenerationConfig`]): Of the call; says what is wanted.
        processors ([`~transformers.LogitsProcessorList`]): The caller's, for the whole batch.
        model_kwargs (`dict[str, Any]`): What `generate` prepared for the prompt.
        before ([`~transformers.Cache`], *optional*): What the call began with: empty, or the caller's. It is filled.
    """
    wanted, steps = wanted_outputs(config), dict[str, Any]()
    assert output.risks is not None
    assert output.statistics is not None
    start, num_new = time.perf_counter(), output.risks.shape[1]
    if num_new == 0:
        steps.update(dict.fromkeys(wanted, ()))
        return replace(output, **steps)
    ids, answer = output.sequences[:, :-1], output.sequences[:, -num_new:]
    given = {name: value for name, value in model_kwargs.items() if not name.startswith("output_")}
    if before is not None and (is_user_cache(before) or _has_placeholders(model, answer)):
        parts, num_forwards = _read_on(model, ids, num_new, wanted, {**given, CACHE_NAME: before})
    else:
        is_cached = config.use_cache is not False
        parts, num_forwards = _read_at_once(model, ids, num_new, wanted, given, is_cached), 1
    output.statistics.num_target_forwards += num_forwards
    output.statistics.target_seconds += time.perf_counter() - start
    with torch.inference_mode(False), torch.no_grad():
        steps |= {name: _own(parts[name]) for name in wanted if name in parts}
        if "scores" in wanted or "logits" in wanted:
            steps["logits"] = tuple(each.to(torch.float32, copy=True) for each in parts["logits"])
        if "scores" in wanted:
            steps["scores"] = _scores(steps["logits"], output.sequences, processors)
    return replace(output, **{name: each for name, each in steps.items() if name in wanted})


def _has_placeholders(model: Any, answer: Tensor) -> bool:
    """Whether an answer has tokens that stand for images: read with the prompt, they would ask for some."""
    unknown = torch.tensor(sorted(placeholders(model.config)), device=answer.device)
    return bool(torch.isin(answer, unknown).any())


def _read_at_once(
    model: Any, ids: Tensor, num_new: int, wanted: Sequence[str], given: dict[str, Any], is_cached: bool
) -> dict[str, Steps]:
    """What one forward over prompts and answers says, the last token left out, by steps."""
    embedded = given.get("inputs_embeds")
    num_places = ids.shape[1] + 1 - num_new if embedded is None else embedded.shape[1]
    outputs, steps = _forward(model, ids, num_new, wanted, given), dict[str, Steps]()
    # not all models leave out what was not asked for
    steps["logits"] = outputs.logits[:, -num_new:].unbind(dim=1)
    cuts = _cuts(num_places, num_new, is_cached)
    if "hidden_states" in wanted:
        steps["hidden_states"] = tuple(tuple(each[..., cut, :] for each in outputs.hidden_states) for cut in cuts)
    if "attentions" in wanted:
        widths = _widths(model, len(outputs.attentions), given.get(CACHE_NAME)) if is_cached else []
        steps["attentions"] = tuple(_attentions(outputs.attentions, cut, widths) for cut in cuts)
    return steps


def _read_on(
    model: Any, ids: Tensor, num_new: int, wanted: Sequence[str], given: dict[str, Any], num_cached: int | None = None
) -> tuple[dict[str, Steps], int]:
    """The same as plain decoding reads it, after what a cache holds; and the number of forwards.

    All of an answer is read at once where only logits are wanted, and states can go on from several tokens: in parts,
    if those of a single token are other ones.
    """
    embedded, num_prompt = given.get("inputs_embeds"), ids.shape[1] + 1 - num_new
    num_cached = int(given[CACHE_NAME].get_seq_length()) if num_cached is None else num_cached
    num_first = (num_prompt if embedded is None else embedded.shape[1]) - num_cached
    is_by_token = bool({"hidden_states", "attentions"} & set(wanted)) or reads_alone(model)
    mixers = _mixers(model)
    width = 1 if is_by_token else max(num_new - 1, 1)
    given, outputs = {**given, "use_cache": True}, list[Any]()
    for end in range(num_prompt, num_prompt + num_new, width):
        num_read = width if outputs else num_first
        for _ in range(width if outputs else 0):
            given = next_model_kwargs(model, given)
        cut = {"next_sequence_length": num_read} if outputs or num_cached else {}
        inputs = prepare_inputs(model, ids[:, :end], is_first_iteration=not outputs, **cut, **given)
        cuts = [] if mixers is None or mixers.reads_blocks or not outputs else list(range(1, width))
        with nullcontext() if mixers is None else mixers.reading(Parts(given[CACHE_NAME], width, cuts)):
            outputs.append(_ask(model, inputs, wanted, width if outputs else 1))
    logits = [
        each for part, one in enumerate(outputs) for each in one.logits[:, -width if part else -1 :].unbind(dim=1)
    ]
    names = [name for name in ("hidden_states", "attentions") if name in wanted]
    return {"logits": tuple(logits)} | {name: tuple(each[name] for each in outputs) for name in names}, len(outputs)


def read_into(model: Any, cache: Any, ids: Tensor, num_new: int, model_kwargs: dict[str, Any]) -> int:
    """Reads prompts and answers into an empty cache, the last token left out; returns the number of forwards.

    Args:
        model ([`~transformers.PreTrainedModel`]): The target.
        cache ([`~transformers.Cache`]): What `generate` made for it.
        ids (`torch.LongTensor` of shape `(B, L)`): Prompts, but for those that are embeddings, and answers without
            their last token.
        num_new (`int`): Tokens of the answers, the last one counted.
        model_kwargs (`dict[str, Any]`): What `generate` prepared for the prompt.
    """
    given = {name: value for name, value in model_kwargs.items() if not name.startswith("output_")}
    mixers = _mixers(model)
    is_by_steps = mixers is not None and not mixers.reads_blocks  # a state of all at once would be another one
    if num_new > 1 and (is_by_steps or _has_placeholders(model, ids[:, 1 - num_new :])):
        return _read_on(model, ids, num_new, (), {**given, CACHE_NAME: cache}, num_cached=0)[1]
    _forward(model, ids, num_new, (), given, cache)
    return 1


def _mixers(model: Any) -> Mixers | None:
    """What keeps recurrent states, where that is known."""
    return None if reads_alone(model) else mixers_of(model)


def _forward(
    model: Any, ids: Tensor, num_new: int, wanted: Sequence[str], given: dict[str, Any], cache: Any = None
) -> Any:
    """Reads prompts and answers, the last token left out, as the model itself prepares them."""
    num_after = num_new - 1
    given = given | {CACHE_NAME: None, "use_cache": False}
    if num_after > 0:
        for _ in range(num_after):  # of several at once transformers says other things
            given = next_model_kwargs(model, given)
        if (embedded := given.get("inputs_embeds")) is not None:
            new = model.get_input_embeddings()(ids[:, -num_after:].to(embedded.device))
            given["inputs_embeds"] = torch.cat([embedded, new.to(embedded.dtype)], dim=1)
    if cache is not None:
        given |= {CACHE_NAME: cache, "use_cache": True}
    inputs = prepare_inputs(model, ids, is_first_iteration=True, **given)
    return _ask(model, inputs, wanted, num_new if cache is None else 1)


def _ask(model: Any, inputs: dict[str, Any], wanted: Sequence[str], num_logits: int) -> Any:
    if "logits_to_keep" in inputs:  # some models have a number of their own for it, whatever they are given
        inputs["logits_to_keep"] = num_logits
    return model(
        **inputs,
        return_dict=True,
        output_hidden_states="hidden_states" in wanted,
        output_attentions="attentions" in wanted,
    )


def _own(steps: Any) -> Any:
    """The same in memory of its own."""
    if isinstance(steps, tuple):
        return tuple(map(_own, steps))
    return None if steps is None else steps.clone()


def _scores(logits: Steps, sequences: Tensor, processors: LogitsProcessorList) -> Steps:
    """The same as the caller's processors leave it."""
    first = sequences.shape[1] - len(logits)
    return tuple(
        processors(cast(Any, sequences[:, : first + index].clone()), each.to(sequences.device, copy=True))
        for index, each in enumerate(logits)
    )


def _cuts(num_places: int, num_new: int, is_cached: bool) -> list[slice]:
    """The places that each step reads: without a cache, all of them again."""
    ends = range(num_places, num_places + num_new)
    starts = [0, *ends[:-1]] if is_cached else [0] * num_new
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def _attentions(layers: Sequence[Tensor | None], cut: slice, widths: Sequence[Width]) -> Steps:
    """The weights of one step; those of a layer that gives none are `None`, as in plain decoding."""
    steps = [None if each is None else each[..., cut, : cut.stop] for each in layers]
    if not widths:
        return tuple(steps)
    return tuple(None if each is None else width.fit(each) for width, each in zip(widths, steps, strict=True))


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
