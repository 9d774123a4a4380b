"""What drafts for a call, and what drafting costs."""

from __future__ import annotations

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
from .assistant import Draft, agree, check_tokenizers, fit
from .companions import SHARED_KV, dflash_draft, mtp_draft, shared_kv_draft
from .measuring import MeasuredCosts, measure_costs
from .watch import Watch

LOOKUP_SIZE = 4  # longest n-gram looked up beside a draft model
SOON = 256  # new tokens that a call is measured for: most answers end long before they may get no longer


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
    own = [name for name in ("assistant_early_exit", "use_mtp") if getattr(config, name, None)]
    if own:
        others = {"assistant_model": assistant, "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens}
        names = own[1:] + [name for name, value in others.items() if value is not None]
        if names:
            raise UnsupportedRequestError(f"`{own[0]}` drafts, and so does `{names[0]}`. Choose one.")
    if config.assistant_early_exit is not None:
        return Draft(early_exit(model, config.assistant_early_exit), is_part=True)
    if own:
        return mtp_draft(model)
    if getattr(config, "speculation_type", None) == "dflash":
        return dflash_draft(model, assistant)
    if assistant is not None and assistant.config.model_type in SHARED_KV:
        return shared_kv_draft(model, assistant)
    if assistant_tokenizer is not None and assistant is None:
        check_tokenizers(tokenizer, assistant_tokenizer, "`assistant_tokenizer`, without an `assistant_model`,")
    if (
        assistant is None
        or assistant_tokenizer is None
        or (agree(tokenizer, assistant_tokenizer) and fit(model, assistant, tokenizer))
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
    is_by_token = policy.verification == "token"
    if config.prompt_lookup_num_tokens is not None:
        draft, ngram_size = Draft(None), config.max_matching_ngram_size or 2
    else:
        ngram_size = LOOKUP_SIZE if draft.model is not None and policy.lookup_drafts and is_by_token else 0
    has_costs = policy.adaptive_drafts and (draft.model is not None or ngram_size > 0)
    return DraftRouter(
        draft.model,
        num_rows=num_rows,
        vocab_size=model.config.get_text_config().vocab_size,
        max_matching_ngram_size=ngram_size,
        do_sample=bool(config.do_sample),
        costs=draft_costs(model, draft, policy, num_rows, num_context) if has_costs else None,
        is_adaptive=is_by_token,  # segments are as long as they are
        takes_trees=takes_trees(model),
        tokenizers=draft.tokenizers,
        make_drafter=draft.make_drafter,
    )


def make_watch(drafter: DraftRouter) -> Watch | None:
    """Where costs were measured, what plain steps take is known."""
    costs = drafter.costs
    return Watch(costs.target.at) if isinstance(costs, MeasuredCosts) else None


def draft_costs(
    model: PreTrainedModel, draft: Draft, policy: SafeSpecConfig, num_rows: int, num_context: int
) -> DraftCosts:
    """Costs by the seconds that forwards take, or by the weights that they read.

    A forward over few tokens spends most of its time on reading weights, but not on every machine.
    """
    assistant = draft.model
    if policy.costs == "measured" and draft.make_drafter is None and is_timed(model, num_read(model)):
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
