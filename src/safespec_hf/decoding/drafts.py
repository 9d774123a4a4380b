"""What drafts for a call, and what drafting costs."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import SafeSpecConfig
from ..drafting.draft_length import DraftCosts
from ..drafting.router import DraftRouter
from ..drafting.translation import LOOKBEHIND, TokenizerPair
from ..engine.cache import takes_trees
from ..engine.early_exit import early_exit
from ..engine.speeds import is_timed
from ..errors import UnsupportedRequestError
from ..heads.draft_head import DraftHead
from .assistant import agree, fit
from .measuring import MeasuredCosts, measure_costs
from .watch import Watch

LOOKUP_SIZE = 4  # longest n-gram looked up beside a draft model
SOON = 256  # new tokens that a call is measured for: most answers end long before they may get no longer


class Draft(NamedTuple):
    """What drafts for a call.

    Attributes:
        model ([`~transformers.PreTrainedModel`] or [`DraftHead`], *optional*): The draft model.
        tokenizers ([`TokenizerPair`], *optional*): The target's and the draft's, if they are not the same.
        is_part (`bool`): Whether its weights are the target's.
    """

    model: PreTrainedModel | None
    tokenizers: TokenizerPair | None = None
    is_part: bool = False


def choose_draft(
    model: PreTrainedModel,
    assistant: PreTrainedModel | None,
    config: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
) -> Draft:
    """The draft that the arguments of a call ask for.

    Raises:
        UnsupportedRequestError: If there are two, or the target can't be its own draft.
    """
    num_layers = config.assistant_early_exit
    if num_layers is not None:
        if assistant is not None or config.prompt_lookup_num_tokens is not None:
            other = "assistant_model" if assistant is not None else "prompt_lookup_num_tokens"
            raise UnsupportedRequestError(f"`assistant_early_exit` drafts, and so does `{other}`. Choose one.")
        return Draft(early_exit(model, num_layers), is_part=True)
    if assistant_tokenizer is None or (
        agree(tokenizer, assistant_tokenizer) and (assistant is None or fit(model, assistant, tokenizer))
    ):
        return Draft(assistant)
    lookbehinds = config.target_lookbehind or LOOKBEHIND, config.assistant_lookbehind or LOOKBEHIND
    return Draft(assistant, TokenizerPair(tokenizer, assistant_tokenizer, *lookbehinds))


def make_drafting(
    model: PreTrainedModel,
    draft: Draft,
    config: GenerationConfig,
    policy: SafeSpecConfig,
    num_rows: int,
    num_context: int = SOON,
) -> DraftRouter:
    """Prompt lookup if it is asked for, else the draft model if there is one, beside which a lookup costs nothing.

    `num_context`: tokens that a row will have about.
    """
    assistant, is_by_token = draft.model, policy.verification == "token"
    if config.prompt_lookup_num_tokens is not None:
        assistant, ngram_size = None, config.max_matching_ngram_size or 2
    else:
        ngram_size = LOOKUP_SIZE if assistant is not None and policy.lookup_drafts and is_by_token else 0
    is_adaptive = policy.adaptive_drafts and is_by_token and (assistant is not None or ngram_size > 0)
    return DraftRouter(
        assistant,
        num_rows=num_rows,
        vocab_size=model.config.get_text_config().vocab_size,
        max_matching_ngram_size=ngram_size,
        do_sample=bool(config.do_sample),
        costs=draft_costs(model, assistant, policy, num_rows, num_context) if is_adaptive else None,
        takes_trees=takes_trees(model),
        tokenizers=draft.tokenizers,
    )


def make_watch(drafter: DraftRouter) -> Watch | None:
    """Where costs were measured, what plain steps take is known."""
    costs = drafter.costs
    return Watch(costs.target.at) if isinstance(costs, MeasuredCosts) else None


def draft_costs(
    model: PreTrainedModel, assistant: PreTrainedModel | None, policy: SafeSpecConfig, num_rows: int, num_context: int
) -> DraftCosts:
    """Costs by the seconds that forwards take, or by the weights that they read.

    A forward over few tokens spends most of its time on reading weights, but not on every machine.
    """
    if policy.costs == "measured" and is_timed(model, num_read(model)):
        return measure_costs(
            model,
            assistant,
            num_rows=num_rows,
            num_context=num_context,
            layers=[] if not isinstance(assistant, DraftHead) else list(assistant.config.hidden_layers or []),
            how={"pack_weights": policy.pack_weights, "compile": policy.compile},
        )
    return DraftCosts(draft=0.0 if assistant is None else num_read(assistant) / num_read(model))


def num_read(model: PreTrainedModel) -> int:
    """Weights that a forward reads: all but the rows of the embeddings."""
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    multiplied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    num = sum(weight.numel() for weight in model.parameters() if id(weight) not in embedded - multiplied)
    if isinstance(model, DraftHead):
        num += model.config.draft_vocab_size * model.config.hidden_size
    return max(num, 1)
