"""A silent head changes nothing of what is sampled: it is the target's distribution, whatever was drafted."""

import pytest
import torch
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after, probe
from tiny import ADAPTIVE, DRAFTING, POLICY, PROMPT, attach, build_draft_head, build_model, drafting
from transformers import LogitsProcessor, LogitsProcessorList

# The sampler itself is held against more draws in test_verification.py; a mistake in its use would show in these.
SAMPLES, ROWS = 1_500, 500
CHANCES = {10: {20: 0.5, 21: 0.3, 22: 0.2}, 20: {30: 0.6, 31: 0.4}, 21: {30: 0.1, 31: 0.9}, 22: {30: 0.5, 31: 0.5}}
DRAFT_CHANCES = {
    10: {20: 0.2, 21: 0.2, 22: 0.6},
    20: {30: 0.9, 31: 0.1},
    21: {30: 0.5, 31: 0.5},
    22: {30: 0.2, 31: 0.8},
}
JOINT = {(one, two): CHANCES[10][one] * CHANCES[one][two] for one in CHANCES[10] for two in (30, 31)}


@pytest.mark.parametrize("source", ["draft", "lookup", "none"])
def test_samples_are_distributed_as_the_targets(tokenizer, source):
    model = ScriptedModel(count_after(CHANCES))
    attach(model, tokenizer, probe(model))
    draft = {"draft": {"assistant_model": ScriptedModel(count_after(DRAFT_CHANCES))}}.get(
        source, drafting(source, model)
    )
    # the lookup finds 20 after 10 and 30 after 20
    ids = torch.tensor([[10, 20, 30, 10]]).expand(ROWS, -1)
    arguments = {"max_new_tokens": 2, "do_sample": True, "top_k": 0, **draft}
    pairs = torch.cat([model.generate(ids, safespec=POLICY, **arguments)[:, 4:] for _ in range(SAMPLES // ROWS)])
    counts = [int((pairs == torch.tensor(pair)).all(dim=1).sum()) for pair in JOINT]
    assert sum(counts) == SAMPLES
    # a right sampler fails once in ten thousand seeds, and the seed is fixed
    assert chisquare(counts, [chance * SAMPLES for chance in JOINT.values()]).pvalue > 1e-4


@pytest.mark.parametrize("policy", [POLICY, ADAPTIVE], ids=["constant", "adaptive"])
def test_samples_from_head_drafts_are_distributed_as_the_targets(tokenizer, policy):
    target, length = build_model(vocab_size=8), 3
    tokens = torch.cartesian_prod(*[torch.arange(8)] * length)
    with torch.no_grad():
        log_probs = target(torch.cat([torch.tensor([[1, 2]]).expand(len(tokens), -1), tokens], 1)).logits.log_softmax(
            -1
        )
    joint = log_probs[:, 1:-1].gather(2, tokens[..., None]).sum((1, 2)).exp().double()
    draft = build_draft_head(target, draft_vocab_size=2)  # it knows two of the eight tokens
    attach(target, tokenizer)
    ids, arguments = torch.tensor([[1, 2]]).expand(ROWS, -1), {"do_sample": True, "top_k": 0, "assistant_model": draft}
    found = [target.generate(ids, max_new_tokens=length, safespec=policy, **arguments)[:, 2:] for _ in range(8)]
    counts = torch.cat(found).matmul(8 ** torch.arange(length - 1, -1, -1)).bincount(minlength=len(tokens)).double()
    is_rare, expected = joint * counts.sum() < 5, joint * counts.sum()
    pairs = [torch.cat([part[~is_rare], part[is_rare].sum()[None]]) for part in (counts, expected)]
    # a right sampler fails once in ten thousand seeds, and the seed is fixed
    assert chisquare(*pairs, sum_check=False).pvalue > 1e-4


SAMPLING = {
    "free": {"top_k": 0},
    "warped": {"temperature": 0.6, "top_k": 12, "top_p": 0.9},
    "penalised": {"top_k": 0, "repetition_penalty": 1.4},
}


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_is_sampled_does_not_depend_on_the_drafts(target, tokenizer, cheap_drafts, name, num_rows):
    attach(target, tokenizer)
    ids = PROMPT.repeat(num_rows, 1) + torch.arange(num_rows)[:, None]
    draft, num_accepted = build_draft_head(target), 0
    for seed in range(4):
        texts = []
        for drafts in ({}, drafting("lookup", target), {"assistant_model": draft}):
            torch.manual_seed(seed)
            arguments = {"max_new_tokens": 40, "do_sample": True, "return_dict_in_generate": True, **SAMPLING[name]}
            output = target.generate(ids, safespec=ADAPTIVE, **arguments, **drafts)
            texts.append(output.sequences.tolist())
            num_accepted += output.statistics.num_accepted_tokens
        assert texts[0] == texts[1] == texts[2]
    assert num_accepted > 0


class LeaveNothing(LogitsProcessor):
    """From a length on no token has a finite score."""

    def __init__(self, length, score):
        self.length, self.score = length, score

    def __call__(self, input_ids, scores):
        return scores if input_ids.shape[1] < self.length else torch.full_like(scores, self.score)


@pytest.mark.parametrize("source", DRAFTING)
@pytest.mark.parametrize("score", [-torch.inf, torch.nan])
def test_where_no_token_can_be_drawn_sampling_fails_as_plain_generate_does(target, tokenizer, source, score):
    attach(target, tokenizer)
    processors = LogitsProcessorList([LeaveNothing(8, score)])
    arguments = {"do_sample": True, "logits_processor": processors, **drafting(source, target)}
    with pytest.raises(RuntimeError, match=r"after 4 tokens of answer 0|probability tensor"):
        target.generate(PROMPT, max_new_tokens=10, safespec=ADAPTIVE, **arguments)
    # what lies behind the end of an answer is nobody's
    assert target.generate(PROMPT, max_new_tokens=4, safespec=ADAPTIVE, **arguments).shape == (1, 8)


def test_a_token_of_which_nothing_is_known_is_flagged_before_its_scores_are_missed(tokenizer):
    target = build_model()
    token = target.generate(PROMPT, max_new_tokens=4, pad_token_id=0)[0, -1].item()
    with torch.no_grad():
        target.model.embed_tokens.weight[token] = torch.nan
    attach(target, tokenizer)
    torch.manual_seed(0)
    arguments = {"do_sample": True, "temperature": 0.01, "return_dict_in_generate": True, "pad_token_id": 0}
    output = target.generate(PROMPT, max_new_tokens=16, safespec=POLICY, **arguments)
    assert output.events[0]
    assert token not in output.sequences[0, PROMPT.shape[1] :].tolist()


def test_an_answer_may_end_by_a_criterion_where_no_token_can_be_drawn_any_more(target, tokenizer):
    attach(target, tokenizer)
    arguments = {
        "do_sample": True,
        "temperature": 0.01,
        "logits_processor": LogitsProcessorList([LeaveNothing(8, -torch.inf)]),
        "stopping_criteria": [lambda ids, scores: torch.full((1,), ids.shape[1] == 8)],
    }
    for source in DRAFTING:
        answer = target.generate(PROMPT, max_new_tokens=10, safespec=POLICY, **arguments, **drafting(source, target))
        assert answer.shape == (1, 8)


def test_temperature_and_top_k_shape_samples_as_in_plain_generate(tokenizer):
    model = ScriptedModel(count_after(CHANCES))
    attach(model, tokenizer, probe(model))
    draft = ScriptedModel(count_after(DRAFT_CHANCES))
    arguments = {"max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "top_k": 2, "assistant_model": draft}
    ids = torch.tensor([[10]]).expand(ROWS, -1)
    tokens = torch.cat([model.generate(ids, safespec=POLICY, **arguments)[:, 1] for _ in range(SAMPLES // ROWS)])
    # the two likeliest, each chance squared: 25 to 9
    counts = tokens.bincount(minlength=40)
    assert counts[20] + counts[21] == SAMPLES
    assert chisquare(counts[20:22].double(), torch.tensor([25.0, 9.0]).double() / 34 * SAMPLES).pvalue > 1e-4
