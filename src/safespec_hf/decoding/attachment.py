"""What a guarded model carries besides its weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SafeSpecConfig
from ..errors import UnsupportedRequestError
from ..heads.safety_head import SafetyHead, check_target
from .adapters import Weights


@dataclass(frozen=True, slots=True)
class Attachment:
    """`model.safety`: what [`attach_safety_head`] gave a model. No module, so that it is not saved with its weights.

    Attributes:
        head ([`SafetyHead`]): The head.
        policy ([`SafeSpecConfig`]): What `safespec=True` means.
        always (`bool`): Every `generate` is guarded.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): For calls that bring none of their own.
        ignore_mismatches (`tuple[str, ...]`): Fields of the target binding that are excused.
        draft ([`~transformers.PreTrainedModel`], *optional*): For calls that ask for no other drafts.
        origin (`tuple[str, str | None]`, *optional*): The exported repository that it came from; see [`origin_of`].
        draft_head ([`SafetyHead`], *optional*): Of the draft; sorts candidates and segments that it writes.
        weights ([`Weights`], *optional*): A glance at the target's weights and adapters when the head was attached.
    """

    head: SafetyHead
    policy: SafeSpecConfig
    always: bool
    tokenizer: PreTrainedTokenizerBase | None
    ignore_mismatches: tuple[str, ...]
    draft: PreTrainedModel | None = None
    origin: tuple[str, str | None] | None = None
    weights: Weights | None = None
    draft_head: SafetyHead | None = None

    @property
    def risk_threshold(self) -> float:
        """The threshold of `safespec=True`: the policy's, else the head's own."""
        return find_threshold(self.policy, self.head)

    def choose_tokenizer(
        self, model: PreTrainedModel, given: PreTrainedTokenizerBase | None
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of one call: the one it was given, if that is the head's, else the one of the attachment.

        Raises:
            HeadMismatchError: If the given one is not the head's.
            UnsupportedRequestError: If there is none at all.
        """
        if given is not None and given is not self.tokenizer:
            check_target(self.head, model, given, self.ignore_mismatches)
            return given
        if self.tokenizer is None:
            raise UnsupportedRequestError(
                f"No tokenizer was found at {model.config.name_or_path!r}, and guarded decoding needs one for "
                "segments and for the policy's texts. Pass `tokenizer=` to `attach_safety_head` or to `generate`."
            )
        return self.tokenizer


def find_threshold(policy: SafeSpecConfig, head: SafetyHead) -> float:
    """The threshold that a policy asks for: a number, one of the head's operating points, or the head's own.

    What earlier turns carry over lowers it.

    Raises:
        UnsupportedRequestError: If the head has no such operating point, or scores no prompts and they have a
            threshold.
    """
    try:
        threshold = policy.risk_threshold or head.config.threshold_at(policy.operating_point)
    except ValueError as error:
        raise UnsupportedRequestError(str(error)) from error
    if policy.prompt_threshold is not None and head.config.prompt_threshold is None:
        raise UnsupportedRequestError(
            f"`prompt_threshold={policy.prompt_threshold}` needs a head that scores prompts, and this one scores "
            "answers alone. `safespec train-prompts` gives it a probe."
        )
    return threshold * (1 - policy.carried_risk)


def find_prompt_threshold(policy: SafeSpecConfig, head: SafetyHead) -> float:
    """The threshold of prompts that a policy asks for; infinite where they are not scored."""
    limit = policy.prompt_threshold or head.config.prompt_threshold_at(policy.operating_point)
    return math.inf if limit is None or not policy.screen_prompts else limit * (1 - policy.carried_risk)


def with_threshold(policy: SafeSpecConfig, risk_threshold: float, head: SafetyHead) -> SafeSpecConfig:
    """A policy with another threshold of tokens, and the threshold of prompts that it had."""
    limit = find_prompt_threshold(policy, head)
    of_prompts = limit if limit < math.inf else None
    return replace(
        policy, risk_threshold=risk_threshold, operating_point=None, carried_risk=0.0, prompt_threshold=of_prompts
    )


def origin_of(name: str | os.PathLike[str], revision: str | None) -> tuple[str, str | None]:
    """What tells an exported repository from others: its path or id, and the revision that was asked for."""
    # transformers resolves a revision to a commit on the way, and keeps what was asked for beside it
    asked_for = getattr(revision, "initial", revision)
    return os.path.abspath(name) if os.path.isdir(name) else str(name), asked_for
