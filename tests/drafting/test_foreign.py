"""Drafts of a model with another tokenizer: it reads the whole context, and samples stay the target's."""

import random

import pytest
import torch
from drafting_methods import SHUFFLED, letters_tokenizer, shuffled_model, shuffled_tokenizer
from scipy.stats import chisquare
from scripted import ScriptedModel, count_after, probe
from test_sampled import CHANCES, DRAFT_CHANCES, JOINT
from tiny import ADAPTIVE, POLICY, PROMPT, attach, build_model, make_row

from safespec_hf import SafeSpecConfig, UnsupportedRequestError
from safespec_hf.drafting.router import DraftRouter
from safespec_hf.drafting.translation import TokenizerPair, Translation
from safespec_hf.outputs import Provenance

ROWS, SAMPLES = 500, 1_500


@pytest.fixture
def letters(tokenizer):
    return TokenizerPair(tokenizer, letters_tokenizer(), target_lookbehind=3, draft_lookbehind=4)


@pytest.fixture
def shuffled(tokenizer):
    return TokenizerPair(tokenizer, shuffled_tokenizer())


def test_a_word_becomes_several_tokens_and_several_tokens_a_word(letters):
    w, space = letters.draft.convert_tokens_to_ids(["w", " "])
    one, two, eight, four = letters.draft.convert_tokens_to_ids(list("1284"))
    context = letters.to_draft([12, 18])
    assert context == [w, one, two, space, w, one, eight]
    assert letters.to_target([12, 18], context, [space, w, two, four]) == [24]
    assert letters.to_target([12, 18], context, []) == []


def test_special_tokens_keep_their_role_and_end_a_draft(letters, tokenizer):
    end = letters.draft.eos_token_id
    context = letters.to_draft([tokenizer.bos_token_id, 12])
    assert context[0] == letters.draft.bos_token_id
    w, space, one = letters.draft.convert_tokens_to_ids(["w", " ", "1"])
    new = [space, w, one, one, end, w, one]
    assert letters.to_target([12], context, new) == [11, tokenizer.eos_token_id]


@pytest.mark.parametrize("seed", range(4))
def test_a_translation_that_grew_and_was_rolled_back_is_that_of_the_whole_text(letters, seed):
    choose, translation, context = random.Random(seed), Translation(letters), []
    for _ in range(40):
        if context and choose.random() < 0.3:
            del context[choose.randrange(len(context)) :]
            translation.keep(len(context))
        context += [choose.randrange(10, 39) for _ in range(choose.randint(1, 9))]
        space = letters.draft.convert_tokens_to_ids(" ")
        # a space between two parts is lost where they are decoded apart, which costs a draft at most
        found = [token for token in translation.of(context) if token != space]
        assert found == [token for token in letters.to_draft(context) if token != space]


def test_only_the_end_of_a_long_text_is_translated_again(letters, monkeypatch):
    translation, context, lengths = Translation(letters), [10] * 400, []
    to_draft = TokenizerPair.to_draft
    translation.of(context)
    monkeypatch.setattr(
        TokenizerPair, "to_draft", lambda self, ids, **more: lengths.append(len(ids)) or to_draft(self, ids, **more)
    )
    for _ in range(40):
        context.append(11)
        translation.of(context)
    assert max(lengths) <= 8 * 3 + 1


def test_shared_tokens_are_those_of_the_same_text(shuffled):
    assert dict(zip(shuffled.shared.target, shuffled.shared.draft, strict=True)) == dict(enumerate(SHUFFLED.tolist()))


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_round_after_rollbacks_drafts_what_a_fresh_start_does(shuffled, do_sample):
    model, row, choose = shuffled_model(build_model()), make_row([11, 12, 13]), random.Random(0)
    made = {"vocab_size": 40, "do_sample": do_sample, "tokenizers": shuffled}
    router = DraftRouter(model, **made)
    for _ in range(12):
        torch.manual_seed(1)
        drafts = router.draft([row], [4]).drafts
        torch.manual_seed(1)
        assert drafts == DraftRouter(model, **made).draft([make_row(row.prompt + row.tokens)], [4]).drafts
        if row.tokens and choose.random() < 0.4:
            row.truncate(choose.randrange(len(row.tokens)))
        for token in [*drafts[0][: choose.randint(0, 4)], choose.randrange(10, 40)]:
            row.append(token, Provenance.TARGET)
        router.keep([row.num_context - 1])


def test_letters_draft_for_words_and_greedy_answers_stay_the_same(tokenizer):
    target, other = build_model(), letters_tokenizer()
    expected = target.generate(PROMPT, max_new_tokens=16, do_sample=False)
    attach(target, tokenizer)
    draft = build_model(vocab_size=len(other), seed=3)
    for policy in (POLICY, ADAPTIVE):
        arguments = {"assistant_model": draft, "assistant_tokenizer": other, "safespec": policy}
        assert torch.equal(target.generate(PROMPT, max_new_tokens=16, do_sample=False, **arguments), expected)


def test_samples_are_distributed_as_the_targets(tokenizer):
    model = ScriptedModel(count_after(CHANCES))
    attach(model, tokenizer, probe(model))
    shuffle = {
        int(SHUFFLED[at]): {int(SHUFFLED[token]): chance for token, chance in after.items()}
        for at, after in DRAFT_CHANCES.items()
    }
    draft = ScriptedModel(count_after(shuffle))
    ids = torch.tensor([[11, 12, 13, 10]]).expand(ROWS, -1)
    arguments = {"max_new_tokens": 2, "do_sample": True, "top_k": 0, "assistant_model": draft}
    arguments |= {"assistant_tokenizer": shuffled_tokenizer(), "safespec": POLICY, "return_dict_in_generate": True}
    outputs = [model.generate(ids, **arguments) for _ in range(SAMPLES // ROWS)]
    pairs = torch.cat([output.sequences[:, 4:] for output in outputs])
    counts = [int((pairs == torch.tensor(pair)).all(dim=1).sum()) for pair in JOINT]
    assert sum(counts) == SAMPLES
    assert sum(output.statistics.num_accepted_tokens for output in outputs) > 0
    # a right sampler fails once in ten thousand seeds, and the seed is fixed
    assert chisquare(counts, [chance * SAMPLES for chance in JOINT.values()]).pvalue > 1e-4


def test_what_a_translated_draft_can_t_do_is_refused_by_name(guarded):
    arguments = {"assistant_model": build_model(), "assistant_tokenizer": shuffled_tokenizer(), "max_new_tokens": 4}
    for policy in (SafeSpecConfig(candidate_source="draft"), SafeSpecConfig(verification="segment")):
        with pytest.raises(UnsupportedRequestError, match="a model with another tokenizer"):
            guarded.generate(PROMPT, **arguments, safespec=policy)
    small = {**arguments, "assistant_model": build_model(vocab_size=20)}
    with pytest.raises(UnsupportedRequestError, match="knows 40 tokens, but the draft model only 20"):
        guarded.generate(PROMPT, **small, safespec=True)
    with pytest.raises(UnsupportedRequestError, match="must be a tokenizer"):
        guarded.generate(PROMPT, **{**arguments, "assistant_tokenizer": "words"}, safespec=True)
