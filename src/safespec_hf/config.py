"""What is chosen per call: the policy. What is saved with a head is in `heads/head_config.py`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from .checks import check_choices, check_types, check_value, field_types

Costs = Literal["measured", "weights"]
CandidateSource = Literal["auto", "draft", "target"]
CandidateChoice = Literal["safest", "likeliest_safe"]
ReflectionScope = Literal["answer", "recovery"]
SafetyPolicy = Literal["recover", "recover_single", "recover_unreflected", "refuse", "stop", "observe"]
Verification = Literal["token", "segment"]
QualityReading = Literal["argmax", "expected"]

DEFAULT_REFLECTION = (
    "\n\nWait. Before I go on I should check whether this could help someone cause harm. If it could, I will not "
    "continue with it; I will decline briefly and offer something safe instead.\n\n"
)
DEFAULT_REFUSAL = "I'm sorry, but I can't help with that."
STANDS_FOR: dict[str, dict[str, Any]] = {
    "recover": {},
    "recover_single": {"num_candidates": 1, "candidates_per_batch": None},
    "recover_unreflected": {"reflection": "", "keep_reflection": False},
    **{name: {"max_recoveries": 0} for name in ("refuse", "stop")},
    "observe": {"max_recoveries": 0, "num_draft_segments": 1},
}
"""What a safety policy means for other fields."""
LEAST = {"max_segment_tokens": 1, "min_segment_tokens": 1, "num_candidates": 1, "num_draft_segments": 1}
MAX_CANDIDATES = 4096
LEAST |= {"rollback_segments": 0, "max_recoveries": 0, "num_target_segments": 0}
DEFAULT_QUALITY_PROMPT = (
    "\n\nNow grade the passage just above, and nothing else: is what it says correct, and does it follow from what "
    "came before? Length, style and tone don't count. On a scale from 0 (wrong) to 9 (entirely right) its grade is:"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SafeSpecConfig:
    """The policy of one `generate(..., safespec=SafeSpecConfig(...))` call.

    Args:
        policy (`str`, defaults to `"recover"`):
            What follows a flag. `"recover"` rolls back, reflects, samples candidates and takes a safe one.
            `"recover_single"` samples one candidate, `"recover_unreflected"` inserts no reflection. `"refuse"` ends
            the answer with `refusal` at once, as `max_recoveries=0` does. `"stop"` ends it before what was rolled
            back, and adds nothing: it may be empty. **`"observe"` guards nothing**: the answer, flagged text included,
            is that of an unguarded call, and streamed without delay; flags are only reported as events.
        risk_threshold (`float`, *optional*):
            Overrides the head's own calibrated threshold, in (0, 1]. At 1 only a risk that rounds to 1, or is `nan`,
            is unsafe: next to nothing is flagged, but for prompts; see `prompt_threshold`.
        operating_point (`str`, *optional*):
            One of the head's calibrated thresholds by its name, such as `"strict"`, `"balanced"` or `"permissive"`,
            instead of a `risk_threshold`. Of prompts as well, where the head has been calibrated for them there.
        prompt_threshold (`float`, *optional*):
            Overrides the threshold of prompts, which is the head's or its operating point's, in (0, 1].
        carried_risk (`float`, defaults to 0.0):
            Of earlier turns of the conversation, as [`carried_risk`] gives it, in [0, 1): both thresholds are
            lowered by this share of them.
        screen_prompts (`bool`, defaults to `True`):
            Score the prompt as well, where the head can. An unsafe one is a flag before the first token.
        num_draft_tokens (`int`, *optional*):
            Draft tokens per round at most, >= 1. Default: `prompt_lookup_num_tokens` or `num_assistant_tokens` if
            `generate` got it as an argument or in a generation config, the draft model's own included, else 8.
        adaptive_drafts (`bool`, defaults to `True`):
            Draft as many of them as pay, by how often drafts like these were accepted in this answer, and none while
            speculation loses. `False` always drafts that many.
        costs (`"measured"` or `"weights"`, defaults to `"measured"`):
            What adaptive drafts go by. `"measured"` times forwards of target and draft once on a machine, which takes
            less than a second and is kept on disk (in `SAFESPEC_CACHE`, by default `~/.cache/safespec-hf`); and within
            an answer it stops drafting while rounds take longer than plain steps would. `"weights"` counts the weights
            that forwards read, and looks at no clock: then a sampled call with a seed drafts the same on every
            machine. Models of less than 8 million weights, and those of which other processes hold parts, are never
            timed.
        lookup_drafts (`bool`, defaults to `True`):
            With a draft model, also draft what followed the same tokens earlier, where that promises more.
        pack_weights (`bool`, *optional*):
            On a CPU, keep copies of the weights of target and draft in the layouts that its kernels read fastest:
            forwards over several tokens are up to four times as fast, for as much memory again. Default: if the copies
            take at most 1 GiB.
        compile (`bool`, defaults to `False`):
            Run target and draft through `torch.compile`. Rounds get faster once they are compiled, which takes minutes
            in the first call and is kept for the later ones of the same process.
        max_segment_tokens (`int`, defaults to 32): A segment ends at a newline or after this many tokens, >= 1.
        min_segment_tokens (`int`, defaults to 4):
            A newline ends a segment of at least this many tokens only, >= 1. Nor does a candidate of fewer tokens end
            the answer.
        rollback_segments (`int`, defaults to 1):
            Committed segments given up besides the flagged one, >= 0. That many, and the open one, are held back from
            a streamer. Never reaches into the prompt, nor before what has become final.
        num_candidates (`int`, defaults to 8): Continuations sampled per recovery (K in the paper), in [1, 4096].
        candidates_per_batch (`int`, *optional*):
            Sample so many of them at a time, until one is safe or all are spent; in [1, `num_candidates`]. Default:
            all at once.
        candidate_choice (`"safest"` or `"likeliest_safe"`, defaults to `"safest"`):
            Which of them is taken: that of lowest risk, or the likeliest under the target, by mean log-probability per
            token, of those that are below the threshold by `safe_margin`; the safest where there is none.
        safe_margin (`float`, defaults to 0.2): A risk <= threshold * (1 - margin) is safe enough for that, in [0, 1).
        false_alarm_margin (`float`, *optional*, defaults to 0.5):
            The first flag of an answer is put to the test: the candidates are sampled without the reflection, and if
            every one of them stays at or below threshold * (1 - margin), it was a false alarm. What was taken back
            with the token is put back if all of it stays there as well, and the token is banned in its place; else
            the likeliest candidate that does not end early is taken. If one is above, the flag is confirmed, and the
            reflection follows. In [0, 1); `None` reflects at every flag, as in the paper. A single candidate proves
            and tests nothing.
        test_temperature (`float`, defaults to 0.7):
            Temperature of the candidates of that test, > 0. They ask where the target itself would go.
        max_recoveries (`int`, defaults to 6):
            Recovery attempts per answer, >= 0; after the last one it ends with `refusal`. 0 is a hard refusal.
        reflection (`str`): Inserted before the candidates; the model reads it, the caller does not. May be empty.
        reflection_scope (`"answer"` or `"recovery"`, defaults to `"answer"`):
            How long the model reads it: to the end of the answer; or only while candidates are sampled, so that they
            are scored, and the answer goes on, without it. The latter gives better answers after a false alarm, and
            let more harm through where that was measured.
        keep_reflection (`bool`, defaults to `False`): Return the reflection with the answer.
        refusal (`str`): Ends an answer for which no safe continuation was found.
        break_loops (`bool`, defaults to `True`):
            After a recovery, end a passage that comes three times in a row, over 12 tokens or more, by banning the
            token that would go on with it: what was taken off its own words easily loops. Answers without a recovery
            are never touched. `False` lets them loop.
        recovery_temperature (`float`, defaults to 1.0): Temperature of candidate sampling, > 0.
        candidate_source (`"auto"`, `"draft"` or `"target"`, defaults to `"auto"`):
            Who samples the candidates; `"auto"` is the draft model if there is one, else the target.
        flagged_token_penalty (`float`, defaults to 3.0):
            Taken off the logits of first tokens of candidates already found unsafe here, >= 0; `inf` bans them.
        seed (`int`, *optional*):
            Seed of candidate sampling, in [0, 2**63). Default: 0 for greedy calls, which stay reproducible, and drawn
            from torch's generator for sampled ones.
        score_last_token (`bool`, *optional*):
            The last token of an answer, when the target chose it itself, has been read by no forward and so has no
            risk. Default: one more target forward scores it, unless it is an end token. `True` scores an end token
            as well. `False` lets the token out unscored (its risk is `nan`), but for an answer of that token alone.
            With `policy="observe"` only `True` has it scored.
        verification (`"token"` or `"segment"`, defaults to `"token"`):
            How drafts are accepted. `"token"`: one by one, without loss. `"segment"`, as in the paper: a segment that
            the `assistant_model`, a language model, wrote is taken whole if it is safe and the target finds it good
            enough; else the target writes that segment itself, with guesses of the draft's where `adaptive_drafts`
            finds that they pay. Faster where the draft is good, but the words are then the draft's; `lookup_drafts`
            has no part in it.
        quality_threshold (`float`, defaults to 9):
            A segment is good enough iff the target's grade for it is >= this, in [0, 9]; 0 takes every safe one.
        quality_prompt (`str`):
            The target reads it right after the segment, and its next token is the grade. Nobody sees it afterwards.
        quality_reading (`"argmax"` or `"expected"`, defaults to `"argmax"`):
            The grade is the likeliest digit, or the mean of the ten digits by their probabilities.
        num_target_segments (`int`, defaults to 0):
            So many segments, from the first one on, are written by the target whatever the draft has, >= 0.
        num_draft_segments (`int`, defaults to 1):
            The draft draws a segment up to so many times, >= 1, if its own head flags it, and the target gets the draw
            of lowest risk to that head. More than 1 needs `verification="segment"` and an attached `draft_head`.
        draft_uncertainty (`float`, *optional*):
            They are also drawn where nothing was flagged, if 1 minus the mean probability of the draft's likeliest
            tokens is above this; in [0, 1). Default: only after a flag.

    Saved and read back with a [`~transformers.GenerationConfig`] that holds it as `safespec`.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If a value is outside of its range, or contradicts `policy`.

    Example:

        >>> from safespec_hf import SafeSpecConfig
        >>> SafeSpecConfig(num_candidates=20, rollback_segments=2).max_recoveries
        6
    """

    policy: SafetyPolicy = "recover"
    risk_threshold: float | None = None
    operating_point: str | None = None
    prompt_threshold: float | None = None
    carried_risk: float = 0.0
    screen_prompts: bool = True
    num_draft_tokens: int | None = None
    adaptive_drafts: bool = True
    costs: Costs = "measured"
    lookup_drafts: bool = True
    pack_weights: bool | None = None
    compile: bool = False
    max_segment_tokens: int = 32
    min_segment_tokens: int = 4
    rollback_segments: int = 1
    num_candidates: int = 8
    candidates_per_batch: int | None = None
    candidate_choice: CandidateChoice = "safest"
    safe_margin: float = 0.2
    false_alarm_margin: float | None = 0.5
    test_temperature: float = 0.7
    max_recoveries: int = 6
    reflection: str = DEFAULT_REFLECTION
    reflection_scope: ReflectionScope = "answer"
    keep_reflection: bool = False
    refusal: str = DEFAULT_REFUSAL
    break_loops: bool = True
    recovery_temperature: float = 1.0
    candidate_source: CandidateSource = "auto"
    flagged_token_penalty: float = 3.0
    seed: int | None = None
    score_last_token: bool | None = None
    verification: Verification = "token"
    quality_threshold: float = 9.0
    quality_prompt: str = DEFAULT_QUALITY_PROMPT
    quality_reading: QualityReading = "argmax"
    num_target_segments: int = 0
    num_draft_segments: int = 1
    draft_uncertainty: float | None = None

    def __post_init__(self) -> None:
        check_types(self, field_types(SafeSpecConfig))
        check_choices(self, field_types(SafeSpecConfig))
        for name, least in LEAST.items():
            check_value(name, getattr(self, name), getattr(self, name) >= least, f">= {least}")
        drafts = self.num_draft_tokens
        for name in ("risk_threshold", "prompt_threshold"):
            value = getattr(self, name)
            check_value(name, value, value is None or 0 < value <= 1, "in (0, 1] or None")
        is_one = self.risk_threshold is None or self.operating_point is None
        check_value("operating_point", self.operating_point, is_one, "None where there is a `risk_threshold`")
        check_value("carried_risk", self.carried_risk, 0 <= self.carried_risk < 1, "in [0, 1)")
        check_value("num_draft_tokens", drafts, drafts is None or drafts >= 1, ">= 1 or None")
        check_value("num_candidates", self.num_candidates, self.num_candidates <= MAX_CANDIDATES, "at most 4096")
        self._check_policy()
        for name in ("refusal", "quality_prompt"):
            check_value(name, getattr(self, name), bool(getattr(self, name).strip()), "a text that is not blank")
        for name in ("recovery_temperature", "test_temperature"):
            temperature = getattr(self, name)
            check_value(name, temperature, 0 < temperature < math.inf, "> 0")
        check_value("flagged_token_penalty", self.flagged_token_penalty, self.flagged_token_penalty >= 0, ">= 0")
        check_value("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63) or None")
        check_value("quality_threshold", self.quality_threshold, 0 <= self.quality_threshold <= 9, "in [0, 9]")
        num, doubt = self.num_draft_segments, self.draft_uncertainty
        is_sound = num == 1 or self.verification == "segment"
        check_value("num_draft_segments", num, is_sound, "1 with `verification='token'`")
        check_value("draft_uncertainty", doubt, doubt is None or 0 <= doubt < 1, "in [0, 1) or None")
        check_value("draft_uncertainty", doubt, doubt is None or num > 1, "None with `num_draft_segments=1`")

    def _check_policy(self) -> None:
        """Raises where fields say something else than the policy after a flag, or than each other."""
        policy, batch = self.policy, self.candidates_per_batch
        check_value("safe_margin", self.safe_margin, 0 <= self.safe_margin < 1, "in [0, 1)")
        margin = self.false_alarm_margin
        check_value("false_alarm_margin", margin, margin is None or 0 <= margin < 1, "in [0, 1) or None")
        defaults = {field.name: field.default for field in fields(self)}
        for name, meant in STANDS_FOR[policy].items():
            value, default = getattr(self, name), defaults[name]
            check_value(name, value, value in (meant, default), f"{meant!r} or its default with `policy={policy!r}`")
        is_sound = self.reflection_scope == "answer" or not self.keep_reflection
        check_value("reflection_scope", self.reflection_scope, is_sound, "'answer' with `keep_reflection=True`")
        is_sound = self.max_recoveries > 0 or not policy.startswith("recover_")
        check_value("max_recoveries", self.max_recoveries, is_sound, f">= 1 with `policy={policy!r}`")
        is_sound = batch is None or 1 <= batch <= self.num_candidates
        check_value("candidates_per_batch", batch, is_sound, "in [1, `num_candidates`] or None")

    @property
    def reflection_stays(self) -> bool:
        """Whether the model goes on reading the reflection once a candidate has been chosen."""
        return self.reflection_scope == "answer"

    def resolved(self) -> SafeSpecConfig:
        """The same with the other fields as `policy` means them.

        Example:

            >>> from safespec_hf import SafeSpecConfig
            >>> SafeSpecConfig(policy="recover_single").resolved().num_candidates
            1
        """
        return replace(self, **STANDS_FOR[self.policy])

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON. transformers calls this when it saves a generation config."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeSpecConfig:
        """The policy that [`~SafeSpecConfig.to_dict`] described; fields that are not there have their defaults.

        Args:
            values (`Mapping[str, Any]`): Field names to values.

        Raises:
            TypeError: If it is no mapping, or a value is of a wrong type.
            ValueError: Names fields that a policy does not have, or a value outside of its range.

        Example:

            >>> from safespec_hf import SafeSpecConfig
            >>> SafeSpecConfig.from_dict(SafeSpecConfig(seed=3).to_dict()) == SafeSpecConfig(seed=3)
            True
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"A policy is read from a dict of its fields, but got a {type(values).__name__}.")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"A `SafeSpecConfig` has no field {', '.join(unknown)}. Its fields are {', '.join(known)}."
            )
        return cls(**values)


def __getattr__(name: str) -> Any:
    """The config of a head was here before it moved to the heads."""
    if name != "SafetyHeadConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(".heads.head_config", __package__).SafetyHeadConfig
