import dataclasses

import pytest
from samples import make_examples

from safespec_hf import SafeSpecError
from safespec_hf.training.data import Example
from safespec_hf.training.parts import check_num_calibration, split_groups, split_parts

LABELLED = make_examples(120, num_groups=30)


def make_prompts(num, **fields):
    texts = [f"rose {index}" for index in range(num)]
    prompts = [{"role": "user", "content": text} for text in texts]
    rows = zip(texts, prompts, strict=True)
    return [Example(id=text, messages=(prompt,), group=text, **{"label": 0, **fields}) for text, prompt in rows]


def groups(examples):
    return {example.group for example in examples}


def test_shares_are_those_that_are_said_and_no_group_is_in_two_parts():
    parts = split_parts(make_prompts(100), LABELLED, alpha=0.1)
    assert {name: len(part) for name, part in parts.prompts.items()} == {
        "train": 60,
        "validation": 10,
        "calibration": 30,
    }
    assert (len(groups(parts.train)), len(groups(parts.validation))) == (24, 6)
    assert not groups(parts.train) & groups(parts.validation)
    assert sorted(example.id for example in [*parts.train, *parts.validation]) == sorted(e.id for e in LABELLED)


def test_the_split_depends_on_names_and_seed_only():
    names = [f"rose {index}" for index in range(50)]
    shares = {"train": 0.5, "validation": 0.5}
    assert split_groups(names, shares) == split_groups(names[::-1] * 2, shares)
    assert split_groups(names, shares) != split_groups(names, shares, seed=1)


def test_a_prompt_that_labelled_answers_answer_goes_where_they_are():
    prompts = make_prompts(100)
    labelled = [dataclasses.replace(e, group=prompts[i % 40].group) for i, e in enumerate(LABELLED)]
    parts = split_parts(prompts, labelled, alpha=0.1)
    assert groups(parts.prompts["train"]) >= groups(parts.train)
    assert groups(parts.prompts["validation"]) >= groups(parts.validation)
    assert len(parts.prompts["calibration"]) == 18  # 30 % of the 60 others


def test_validation_answers_that_are_given_are_all_of_them():
    held_out = [dataclasses.replace(e, group="held out") for e in make_examples(4, source="other")]
    parts = split_parts(make_prompts(100), LABELLED, held_out, alpha=0.1)
    assert (parts.train, parts.validation) == (LABELLED, held_out)
    with pytest.raises(SafeSpecError, match="in both training and validation"):
        split_parts(make_prompts(100), LABELLED, LABELLED[:2], alpha=0.1)


def test_both_parts_have_unsafe_answers_even_if_few_groups_do():
    labelled = [e for e in make_examples(200, num_groups=200) if e.label == 0] + LABELLED[1:6:2]
    parts = split_parts(make_prompts(100), labelled, alpha=0.1)
    assert {example.label for example in parts.validation} == {example.label for example in parts.train} == {0, 1}


@pytest.mark.parametrize(("alpha", "enough"), [(0.1, 30), (0.05, 64), (0.02, 164), (0.01, 330), (0.005, 664)])
def test_as_many_prompts_as_an_error_asks_for_are_enough(alpha, enough):
    split_parts(make_prompts(enough), LABELLED, alpha=alpha)
    with pytest.raises(SafeSpecError, match=rf"alpha={alpha} needs.*at least {enough} harmless prompts"):
        split_parts(make_prompts(enough - 5), LABELLED, alpha=alpha)


def test_the_alpha_that_an_error_offers_is_legal():
    with pytest.raises(SafeSpecError, match=r"30 of 100.*`--alpha` 0\.0323 or more"):
        check_num_calibration(30, 100, alpha=0.02)
    check_num_calibration(30, 100, alpha=0.0323)


def test_prompts_that_are_labelled_unsafe_are_refused():
    with pytest.raises(SafeSpecError, match="'rose 0' is labelled unsafe"):
        split_parts(make_prompts(100, label=1), LABELLED, alpha=0.1)


def test_unsafe_answers_are_asked_for():
    safe = [example for example in LABELLED if example.label == 0]
    with pytest.raises(SafeSpecError, match=r"None of 60 labelled answers is unsafe.*--from-hub"):
        split_parts(make_prompts(100), safe, alpha=0.1)
