"""Nothing that is flagged or taken back later ever reaches a streamer, and all that is returned does."""

import random

import pytest
import torch
from tiny import Recorder, build_coin_head, build_draft_head, build_model, cheap_drafts, is_before, perturb
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.answer.rows import Row
from safespec_hf.config import STANDS_FOR
from safespec_hf.decoding.assistant import Draft
from safespec_hf.decoding.drafts import make_drafting
from safespec_hf.decoding.loop import Decoder
from safespec_hf.decoding.monitor import RiskMonitor
from safespec_hf.decoding.plan import Plan
from safespec_hf.decoding.request import make_rows

PROMPT = torch.tensor([[11, 17, 23]])
NUM_RUNS, PARTS = 500, 10
# One layer of width 16 is enough: what is flagged is decided by a coin.
SMALL = {"hidden_size": 16, "num_hidden_layers": 1}


def random_policy(choose):
    name = choose.choice(["recover"] * 4 + ["recover_single", "recover_unreflected", "refuse", "stop"])
    fields = {"num_candidates": choose.randint(1, 3), "max_recoveries": choose.randint(0, 3)}
    fields |= {"keep_reflection": choose.random() < 0.3, "candidates_per_batch": choose.choice([None, None, 1])}
    fields = {field: value for field, value in fields.items() if field not in STANDS_FOR[name]}
    if name.startswith("recover_"):
        fields["max_recoveries"] = choose.randint(1, 3)
    policy = SafeSpecConfig(
        policy=name,
        **fields,
        candidate_choice=choose.choice(["safest", "likeliest_safe"]),
        safe_margin=choose.choice([0.0, 0.5]),
        reflection_scope="answer" if fields.get("keep_reflection") else choose.choice(["answer", "recovery"]),
        max_segment_tokens=choose.randint(1, 5),
        min_segment_tokens=choose.randint(1, 3),
        rollback_segments=choose.randint(0, 2),
        score_last_token=choose.choice([None, True, False]),
        adaptive_drafts=choose.random() < 0.5,
        lookup_drafts=choose.random() < 0.5,
        seed=choose.randrange(100),
    )
    return policy.resolved()


def stream_once(model, drafts, seed):
    """One run under random flags and a random policy; gives the decoder and what was streamed."""
    choose, streamer = random.Random(seed), Recorder()
    policy = random_policy(choose)
    prompts = PROMPT.expand(1, -1)
    rows = make_rows(
        prompts,
        torch.ones_like(prompts).bool(),
        max_length=3 + choose.randint(1, 14),
        policy=policy,
        newline_ids=frozenset({7, 8, 20, 30}),
        processors=LogitsProcessorList(),
    )
    drafting = choose.choice([*drafts, "lookup", "none"])
    model.generation_config.prompt_lookup_num_tokens = 3 if drafting == "lookup" else None
    plan = Plan(
        policy=policy,
        monitor=RiskMonitor(build_coin_head(model, choose.choice([0.05, 0.2, 0.4]), seed)),
        risk_threshold=0.5,
        num_draft_tokens=choose.randint(1, 4),
        do_sample=False,
        eos_ids=frozenset(choose.sample(range(40), 2)),
        criteria=StoppingCriteriaList(),
        reflection_ids=choose.choice([[4, 5], []]) if policy.reflection else [],
        refusal_ids=[6, 9],
        separator_ids=[8],
        max_context=512,
        seeds=[seed],
    )
    candidates = make_drafting(model, Draft(drafts.get(drafting)), model.generation_config, policy, 1)
    decoder = Decoder(model, rows, candidates, plan, streamer)
    decoder.run()
    return decoder, streamer


@pytest.fixture
def no_retraction(monkeypatch):
    """Fails as soon as a row takes back a token that was streamed."""
    truncate = Row.truncate

    def checked(row, kept):
        assert kept >= row.num_streamed, "a streamed token was taken back"
        truncate(row, kept)

    monkeypatch.setattr(Row, "truncate", checked)


@pytest.mark.parametrize("part", range(PARTS))
def test_under_random_flags_the_stream_is_the_answer_and_holds_nothing_flagged(part, no_retraction):
    model = build_model(**SMALL)
    drafts, num_flags = {"draft": perturb(model), "head": build_draft_head(model)}, 0
    for seed in range(part * NUM_RUNS // PARTS, (part + 1) * NUM_RUNS // PARTS):
        with cheap_drafts():
            decoder, streamer = stream_once(model, drafts, seed)
        output = decoder.output(PROMPT, 0)
        # a stream can't be changed, so being the answer in the end means having been its beginning all the time
        assert streamer.tokens == output.sequences[0, 3:].tolist(), seed
        assert streamer.num_ends == 1
        assert bool(((output.risks < 0.5) | output.risks.isnan()).all()), seed
        fewest = 0 if output.finish_reasons == ["safety_stop"] else 1
        assert fewest <= len(streamer.tokens) <= decoder.rows[0].max_new_tokens
        num_flags += decoder.statistics.num_flags
    assert num_flags > 10  # or else this would have shown nothing


class Watch(StoppingCriteria):
    """Notes, each time a token comes, how many there are and how many were streamed by then."""

    def __init__(self, streamer):
        self.streamer, self.seen = streamer, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.shape[1] - 3, len(self.streamer.tokens) - 3))
        return torch.tensor([False])


@pytest.mark.parametrize("rollback_segments", [0, 1, 2])
def test_tokens_reach_the_streamer_as_soon_as_nothing_can_take_them_back(target, never, tokenizer, rollback_segments):
    streamer = Recorder()
    watch, policy = (
        Watch(streamer),
        SafeSpecConfig(max_segment_tokens=3, min_segment_tokens=3, rollback_segments=rollback_segments),
    )
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    criteria = StoppingCriteriaList([watch])
    model.generate(
        PROMPT, max_new_tokens=20, do_sample=False, streamer=streamer, stopping_criteria=criteria, safespec=policy
    )
    # once token n is known to be safe, all before it were safe a round ago, and so many segments beyond any rollback
    assert watch.seen == [(num, max((num - 1) // 3 - rollback_segments, 0) * 3) for num in range(1, 20)]


def test_the_prompt_comes_first_as_in_plain_generate(target, never, tokenizer):
    streamers = [Recorder(), Recorder()]
    model = attach_safety_head(target, never, tokenizer=tokenizer)
    for streamer, safespec in zip(streamers, (None, True), strict=True):
        model.generate(PROMPT, max_new_tokens=10, do_sample=False, streamer=streamer, safespec=safespec)
    assert streamers[0].tokens == streamers[1].tokens
    assert streamers[1].tokens[:3] == PROMPT[0].tolist()


def test_a_text_streamer_gets_the_text_of_the_answer(target, noisy, tokenizer):
    model = attach_safety_head(target, noisy, tokenizer=tokenizer)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    policy = SafeSpecConfig(max_segment_tokens=4, reflection="pause think", refusal="no thanks")
    sequences = model.generate(PROMPT, max_new_tokens=16, do_sample=False, streamer=streamer, safespec=policy)
    text, alone = "".join(streamer), TextIteratorStreamer(tokenizer, skip_prompt=True)
    for ids in (PROMPT[0], *sequences[0, 3:, None]):
        alone.put(ids)
    alone.end()
    assert text == "".join(alone)
    # older streamers lose a space at the beginning of a line
    assert text == tokenizer.decode(sequences[0, 3:]) or is_before("5.23")


def test_streamed_tokens_are_ordinary_tensors(guarded):
    class Keeper(Recorder):
        def put(self, value):
            kept.append(value)
            super().put(value)

    kept, embedding = [], torch.nn.Embedding(40, 4)
    guarded.generate(PROMPT, max_new_tokens=4, do_sample=False, streamer=Keeper(), safespec=True)
    assert len(kept) == 5  # the prompt is the first
    assert not any(tokens.is_inference() for tokens in kept)
    embedding(torch.cat(kept[1:])).sum().backward()
