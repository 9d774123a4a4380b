"""Guarded answers of an offline engine: `GuardedLLM`, and what any loop around an engine needs to drive answers."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind

from ..config import SafeSpecConfig
from ..errors import UnsupportedRequestError
from .guard import Guard
from .request import GuardedRequest
from .rounds import GuardedResult, Submission
from .runner import verify_params
from .sampling import Sampling
from .spec import RiskRecord

TAKE, RELEASE, REPORT = "safespec_take", "safespec_release", "safespec_report"
"""What workers answer, by `collective_rpc`: `take(keys)`, `release(groups)` and `report()`."""


def to_params(submission: Submission) -> SamplingParams:
    """The parameters of a submission: what it gives is only ever new."""
    return SamplingParams(**submission.params, output_kind=RequestOutputKind.DELTA)


def new_tokens(output: RequestOutput) -> tuple[list[int], list[float] | None]:
    """New tokens of an output, and their log-probabilities or the prompt's, if asked for; as `feed` takes them."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    if output.prompt_logprobs:
        # of tokens that were read from the cache, and of the first one after them, nothing was computed
        num_unknown, of_prompt = 1 + (output.num_cached_tokens or 0), [math.nan]
        pairs = zip(output.prompt_token_ids or [], output.prompt_logprobs, strict=True)
        for token, of_token in list(pairs)[1:]:
            found = of_token.get(token) if of_token and len(of_prompt) >= num_unknown else None
            of_prompt.append(math.nan if found is None else float(found.logprob))
        return tokens, of_prompt
    if not completion.logprobs:
        return tokens, None
    pairs = zip(completion.logprobs, tokens, strict=True)
    return tokens, [float(of_token[token].logprob) for of_token, token in pairs]


def merge_records(answers: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, RiskRecord]:
    """What all workers answered to `safespec_take`, by key. Workers of a tensor-parallel group say the same."""
    return {key: RiskRecord.from_plain(values) for answer in answers for key, values in answer.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardedOutput(GuardedResult):
    """A [`GuardedResult`] with its words.

    Attributes:
        prompt_token_ids (`list[int]`): The prompt.
        text (`str`): The answer, up to a stop string if one ended it.
    """

    prompt_token_ids: list[int]
    text: str


class GuardedLLM(LLM):
    """vLLM's offline engine, guarded: batches, caches and drafts are its own, flags and recoveries ours.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub id of the target.
        head (`str` or `os.PathLike`): Folder or Hub id of a safety head that was trained for it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*): Default: the target's.
        policy ([`SafeSpecConfig`], *optional*): What follows a flag, for calls that don't say. Default: a recovery.
        max_model_len (`int`, *optional*): Tokens of prompt and answer. Default: what the target was made for.
        reserved_id (`int`, *optional*): A token that no answer has. Default: one is found.
        ignore_mismatches (`tuple[str, ...]`): Fields of the head's binding to excuse.
        kwargs: `vllm.LLM`'s own.

    Raises:
        HeadMismatchError: If the head was trained for another target. Before anything is loaded.
        UnsupportedRequestError: For an option under which nothing can be promised.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        head: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        policy: SafeSpecConfig | None = None,
        max_model_len: int | None = None,
        reserved_id: int | None = None,
        ignore_mismatches: tuple[str, ...] = (),
        **kwargs: Any,
    ):
        self.guard = Guard.load(
            model,
            head,
            tokenizer=tokenizer,
            policy=policy,
            max_model_len=max_model_len,
            reserved_id=reserved_id,
            ignore_mismatches=ignore_mismatches,
        )
        super().__init__(**self.guard.engine_args(**kwargs))

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        safespec: SafeSpecConfig | Sequence[SafeSpecConfig] | None = None,
        use_tqdm: bool = True,
    ) -> list[GuardedOutput]:
        """Answers prompts, all of them guarded.

        Args:
            prompts (`str`, `list[int]`, `dict` with `prompt_token_ids`, or a list of these): The prompts.
            sampling_params (`vllm.SamplingParams` or `dict`, or a list with one per prompt, *optional*): Theirs.
            safespec ([`SafeSpecConfig`], or a list with one per prompt, *optional*):
                What follows a flag. Default: the engine's policy.
            use_tqdm (`bool`, *optional*, defaults to `True`): Show a bar.

        Returns:
            `list[GuardedOutput]`: In the order of the prompts.

        Raises:
            UnsupportedRequestError: For a parameter that a guarded answer can't have. Nothing has been answered then.
        """
        answers = self._make_answers(prompts, sampling_params, safespec)
        with tqdm(total=len(answers), desc="guarded answers", disable=None if use_tqdm else True) as bar:
            Driver(self).run(answers, bar.update)
        return [self._output(answer) for answer in answers]

    def chat(
        self,
        messages: Any,
        sampling_params: Any = None,
        *,
        safespec: SafeSpecConfig | Sequence[SafeSpecConfig] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[GuardedOutput]:
        """Answers conversations, all of them guarded.

        Args:
            messages (`list[dict]` or `list[list[dict]]`): One conversation or several.
            sampling_params, safespec, use_tqdm: As for [`~GuardedLLM.generate`].
            template: For the tokenizer's `apply_chat_template`.

        Raises:
            UnsupportedRequestError: For a parameter that a guarded answer can't have.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        options = {"add_generation_prompt": True, **template, "tokenize": True, "return_dict": False}
        prompts = [list(self.guard.tokenizer.apply_chat_template(chat, **options)) for chat in chats]
        return self.generate(prompts, sampling_params, safespec=safespec, use_tqdm=use_tqdm)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: nothing but answers leaves, and the head knows the weights that were loaded.

        Raises:
            UnsupportedRequestError: Always.
        """
        raise UnsupportedRequestError("A guarded engine has `generate` and `chat`, and keeps the weights it has.")

    beam_search = enqueue = enqueue_chat = encode = embed = classify = score = _refuse
    init_weight_transfer_engine = start_weight_update = start_draft_weight_update = update_weights = _refuse

    def report(self) -> list[dict[str, Any]]:
        """Counts of every worker: requests that are known, failures, seconds of the head, bytes of state."""
        return self.collective_rpc(REPORT)

    def _make_answers(
        self, prompts: Any, params: Any, policy: SafeSpecConfig | Sequence[SafeSpecConfig] | None
    ) -> list[GuardedRequest]:
        is_one = isinstance(prompts, (str, Mapping)) or (bool(prompts) and isinstance(prompts[0], int))
        given = [prompts] if is_one else list(prompts)
        all_params = _one_each(params, len(given), "sampling parameters")
        policies = _one_each(policy, len(given), "policies")
        call = uuid.uuid4().hex
        answers = [
            self.guard.request(f"{call}-{index}", self._encode(prompt), of_prompt, its_policy)
            for index, (prompt, of_prompt, its_policy) in enumerate(zip(given, all_params, policies, strict=True))
        ]
        for of_prompt in all_params:
            verify_params(of_prompt, self.llm_engine.vllm_config)
        return answers

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.guard.tokenizer.encode(prompt))
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" not in prompt or set(prompt) - {"prompt_token_ids", "prompt"}:
                raise UnsupportedRequestError(f"A prompt is a text or `prompt_token_ids`, but has {sorted(prompt)}.")
            return list(prompt["prompt_token_ids"])
        return list(prompt)

    def _output(self, answer: GuardedRequest) -> GuardedOutput:
        result = answer.result()
        fields = {name: getattr(result, name) for name in GuardedResult.__slots__}
        text = to_text(self.guard.tokenizer, result.token_ids, answer.sampling)
        return GuardedOutput(**fields, prompt_token_ids=answer.row.prompt, text=text)


def _one_each(given: Any, num: int, what: str) -> list[Any]:
    """One for each prompt, of one for all of them or a list."""
    of_each = list(given) if isinstance(given, (list, tuple)) else [given] * num
    if len(of_each) != num:
        raise UnsupportedRequestError(f"There are {num} prompts, but {len(of_each)} {what}.")
    return of_each


def to_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], sampling: Sampling) -> str:
    """The words of an answer, up to the first of its stop strings."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=sampling.skip_special_tokens))
    found = [(text.find(stop), stop) for stop in sampling.stop if stop in text]
    if not found:
        return text
    at, stop = min(found)
    return text[: at + len(stop) * sampling.include_stop_str_in_output]


class Driver:
    """Takes answers through an offline engine, all at once; each goes on as soon as its own round is over.

    Args:
        llm (`LLM`): A guarded engine.
    """

    def __init__(self, llm: LLM):
        self.engine = llm.llm_engine
        self.llm = llm
        self._running: dict[str, GuardedRequest] = {}  # by the key of a submission
        self._rounds: dict[str, list[str]] = {}  # keys of an answer's round, by the answer's

    def run(self, answers: Sequence[GuardedRequest], done: Any = None) -> None:
        """Runs answers to their end; whatever happens, nothing of them stays in the engine."""
        try:
            for answer in answers:
                self._submit(answer, answer.begin())
            while self._running:
                for output in self.engine.step():
                    self._take(output, done)
        finally:
            self.engine.abort_request(list(self._running))
            self.llm.collective_rpc(RELEASE, args=([answer.key for answer in answers],))

    def _submit(self, answer: GuardedRequest, submissions: Sequence[Submission]) -> None:
        self._rounds[answer.key] = [submission.key for submission in submissions]
        for submission in submissions:
            self._running[submission.key] = answer
            prompt: Any = {"prompt_token_ids": submission.prompt_ids}
            self.engine.add_request(submission.key, prompt, to_params(submission))

    def _take(self, output: RequestOutput, done: Any) -> None:
        key = output.request_id
        answer = self._running.get(key)
        if answer is None:  # aborted, but it had been in the step already
            return
        is_over = answer.feed(key, *new_tokens(output))
        if is_over and not output.finished:
            self.engine.abort_request([key])
        if not is_over and not output.finished:
            return
        del self._running[key]
        keys = self._rounds[answer.key]
        if any(other in self._running for other in keys):
            return
        records = merge_records(self.llm.collective_rpc(TAKE, args=(keys,)))
        self._submit(answer, answer.advance(records))
        if answer.is_finished:
            self.llm.collective_rpc(RELEASE, args=([answer.key],))
            if done is not None:
                done(1)
