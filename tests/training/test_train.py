import dataclasses

import pytest
import torch
from samples import make_examples

from safespec_hf import SafeSpecError, SafetyHead
from safespec_hf.training.dataset import Dataset, auroc_of, partial_auroc_of, split_by_group
from safespec_hf.training.features import READINGS, FeatureSettings, Reading, extract_features
from safespec_hf.training.train import (
    Lessons,
    TrainSettings,
    _balance,
    _batches,
    _inputs,
    _loss,
    _weights,
    sweep_readings,
    train_head,
)

SETTINGS = FeatureSettings(layers=(1, 2), prefix_tokens=(2, 4, 8, 16))
MEAN = READINGS[2]
QUICK = TrainSettings(num_members=2, width=8, max_epochs=8, min_unsafe_tokens=4, batch_size=32, learning_rate=1e-2)


@pytest.fixture
def sets(target, chat_tokenizer, tmp_path):
    parts = split_by_group(make_examples(160), 0.3)
    return [Dataset(part, extract_features(target, chat_tokenizer, part, tmp_path, SETTINGS)) for part in parts]


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_of_a_split(seed):
    first, second = split_by_group(make_examples(60), 0.25, seed)
    assert len(first) + len(second) == 60
    assert not {example.group for example in first} & {example.group for example in second}


def test_a_split_needs_two_groups():
    with pytest.raises(SafeSpecError, match="at least 2 groups"):
        split_by_group(make_examples(4, num_groups=1), 0.5)


def test_training_refuses_groups_that_leak(sets):
    with pytest.raises(SafeSpecError, match="both training and validation"):
        train_head(sets[0], sets[0], [2], MEAN)


def test_training_refuses_a_set_of_one_class(sets):
    safe = [dataclasses.replace(example, label=0) for example in sets[0].examples]
    with pytest.raises(SafeSpecError, match="one class"):
        train_head(Dataset(safe, sets[0].features), sets[1], [2], MEAN)


def test_a_head_learns_and_survives_saving(sets, tmp_path):
    trained = train_head(*sets, [1, 2], MEAN, target={"model_id": "x"}, settings=QUICK)
    assert trained.validation_auroc > 0.95
    trained.head.save_pretrained(tmp_path / "head")
    inputs = _inputs(sets[1].features, [1, 2], MEAN)
    loaded = SafetyHead.from_pretrained(tmp_path / "head")
    torch.testing.assert_close(loaded.risk(inputs), trained.head.risk(inputs))
    assert (loaded.config.pooling, loaded.config.span, loaded.config.hidden_layers) == ("mean", "answer", [1, 2])


@pytest.mark.parametrize(
    ("layers", "reading", "said"),
    [([3], MEAN, r"layers \[1, 2\]"), ([], MEAN, "can't read"), ([1], Reading("ewma", "segment"), "ewma-segment")],
)
def test_what_the_features_lack_is_told(sets, layers, reading, said):
    with pytest.raises(SafeSpecError, match=said):
        train_head(*sets, layers, reading)


@pytest.mark.parametrize(
    "fields",
    [{"num_members": 0}, {"width": -1}, {"width": 1.5}, {"dropout": 1.0}, {"patience": 0}, {"seed": -1}],
    ids=str,
)
def test_a_setting_out_of_range_is_named(fields):
    with pytest.raises(SafeSpecError, match=f"`{next(iter(fields))}` must be"):
        TrainSettings(**fields)


@pytest.mark.parametrize("fraction", [0, 1, 2, -0.5, float("nan")])
def test_a_split_is_a_share(fraction):
    with pytest.raises(SafeSpecError, match=r"`fraction` must be a number in \(0, 1\)"):
        split_by_group(make_examples(60), fraction)


@pytest.mark.parametrize(("fraction", "num_groups"), [(0.9, 2), (0.99, 12), (0.5001, 2)])
def test_a_split_leaves_a_group_on_both_sides(fraction, num_groups):
    with pytest.raises(SafeSpecError, match=f"of {num_groups} groups are all of them"):
        split_by_group(make_examples(60, num_groups=num_groups), fraction)


def test_the_highest_seed_is_one(sets):
    settings = dataclasses.replace(QUICK, seed=2**31 - 1, max_epochs=1)
    assert train_head(*sets, [2], MEAN, settings=settings).validation_auroc > 0
    assert all(map(len, split_by_group(make_examples(60), 0.5, seed=2**31 - 1)))
    with pytest.raises(SafeSpecError, match="`seed` must be"):
        TrainSettings(seed=2**31)


def test_several_poolings_give_their_features_side_by_side(sets, tmp_path):
    reading = Reading.parse("mean+ewma-answer")
    head = train_head(*sets, [1, 2], reading, settings=QUICK).head
    assert (head.config.pooling, head.config.num_features) == ("mean+ewma", 4 * head.config.hidden_size)
    inputs = _inputs(sets[1].features, [1, 2], reading)
    parts = [_inputs(sets[1].features, [1, 2], part) for part in reading.parts]
    assert torch.equal(inputs, torch.cat(parts, dim=1))
    head.save_pretrained(tmp_path / "head")
    torch.testing.assert_close(SafetyHead.from_pretrained(tmp_path / "head").risk(inputs), head.risk(inputs))


def test_a_spike_anywhere_in_a_safe_answer_costs_what_an_unsafe_answer_without_one_costs():
    quiet, spike = torch.tensor([-4.0, -4.0, -4.0, -4.0]), torch.tensor([-4.0, -4.0, 4.0, -4.0])
    batch = Lessons(
        torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]), torch.zeros(4), torch.tensor([0.0, 0.0]), torch.ones(2)
    )
    assert _loss(quiet, batch, 1.0) < 0.1 < 2 < _loss(spike, batch, 1.0)
    unsafe = batch._replace(labels_N=torch.tensor([0.0, 1.0]))
    assert _loss(spike, unsafe, 1.0) < 0.1 < 2 < _loss(quiet, unsafe, 1.0)
    # on their own, prefixes without a weight teach nothing
    assert _loss(spike, batch, 0.0) == 0


def test_batches_hold_whole_answers(sets):
    features = sets[0].features
    numbers = torch.arange(len(features.example)).float()[:, None]
    weights_P, weights_N = _weights(sets[0], QUICK)
    batches = list(_batches(Lessons(numbers, features.example, weights_P, sets[0].labels, weights_N), 7))
    assert sum(len(batch.labels_N) for batch in batches) == len(sets[0].examples)
    rows = torch.cat([batch.inputs_PF[:, 0] for batch in batches]).long()
    assert sorted(rows.tolist()) == list(range(len(features.example)))
    for batch in batches:
        found = features.example[batch.inputs_PF[:, 0].long()]
        assert torch.equal(sets[0].labels[found], batch.labels_N[batch.example_P])
        assert torch.equal(weights_P[batch.inputs_PF[:, 0].long()], batch.weights_P)


def test_training_twice_gives_the_same_head(sets):
    first, second = (train_head(*sets, [2], MEAN, settings=QUICK).head.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_linear_probe_is_one_layer(sets):
    head = train_head(*sets, [2], MEAN, settings=dataclasses.replace(QUICK, width=0)).head
    assert len(head.mlp) == 1


def test_the_sweep_tries_every_layer_and_reading_and_then_sets_of_layers(sets):
    results = sweep_readings(*sets, READINGS)
    singles = [result for result in results if len(result["hidden_layers"]) == 1]
    assert len([result for result in singles if "+" not in result["reading"][0]]) == 8
    assert {tuple(result["hidden_layers"]) for result in results} >= {(1,), (2,), (1, 2)}
    assert results[0]["partial_auroc"] == max(result["partial_auroc"] for result in results)
    pooled_twice = {tuple(result["reading"]) for result in results if "+" in result["reading"][0]}
    # poolings of one span side by side; those of a segment are alone here
    assert pooled_twice >= {("last+mean", "answer"), ("last+ewma", "answer"), ("mean+ewma", "answer")}
    assert all(reading[1] == "answer" for reading in pooled_twice)


def test_a_sweep_chooses_by_what_is_caught_at_few_false_alarms(sets):
    """Of two scores with one AUROC the one that is right where it is sure wins."""
    validation = sets[1]
    labels = validation.labels
    order = torch.arange(len(labels)).float()
    sure = torch.where(labels == 1, 2 + order, 1 + order / len(order))
    sure[(labels == 1).nonzero()[0]] = -1.0  # the lowest of all: misses one, and nothing else
    alarmed = torch.where(labels == 1, 2 + order / len(order), 1 + order / len(order))
    alarmed[(labels == 0).nonzero()[0]] = 1e6  # the highest of all: a false alarm before anything is caught
    first, second = (scores[validation.features.example] for scores in (sure, alarmed))
    assert auroc_of(second, validation) > 0.9
    assert partial_auroc_of(first, validation) > partial_auroc_of(second, validation)


def test_early_prefixes_of_unsafe_answers_are_left_out(sets):
    weights_P, weights_N = _weights(sets[0], QUICK)
    is_unsafe = sets[0].labels[sets[0].features.example] == 1
    is_early = (sets[0].features.num_tokens < 4) & ~sets[0].features.is_last
    assert bool((weights_P[is_early & is_unsafe] == 0).all())
    assert bool((weights_N > 0).all())
    assert bool((weights_P[~is_unsafe] > 0).all())


def test_prefixes_before_an_answer_turns_unsafe_are_left_out(sets):
    late = [dataclasses.replace(example, unsafe_from=30 * example.label) for example in sets[0].examples]
    data = Dataset(late, sets[0].features)
    weights_P, _ = _weights(data, QUICK)
    is_unsafe = data.labels[data.features.example] == 1
    is_before = (data.features.num_chars < 30) & ~data.features.is_last & is_unsafe
    assert is_before.any()
    assert bool((weights_P[is_before] == 0).all())


def cut_short(data, num):
    """The data, in which the first unsafe answers turn unsafe behind all that was read of them."""
    unsafe = [index for index, example in enumerate(data.examples) if example.label == 1][:num]
    chosen = set(unsafe)
    examples = [
        dataclasses.replace(example, unsafe_from=10_000 if index in chosen else 0)
        for index, example in enumerate(data.examples)
    ]
    return Dataset(examples, data.features), unsafe


def test_an_answer_that_was_cut_before_its_unsafe_part_teaches_nothing(sets):
    data, cut = cut_short(sets[0], 9)
    weights_P, weights_N = _weights(data, QUICK)
    assert weights_N.nonzero().flatten().tolist() == [i for i in range(len(data.examples)) if i not in cut]
    assert not weights_P[torch.isin(data.features.example, torch.tensor(cut))].any()
    is_unsafe = data.labels == 1
    assert weights_N[is_unsafe].sum() == pytest.approx(float(weights_N[~is_unsafe].sum()))
    # batches of one answer: those of the ones that were cut have no weight at all
    head = train_head(data, sets[1], [2], MEAN, settings=dataclasses.replace(QUICK, batch_size=1, max_epochs=1)).head
    assert all(bool(weight.isfinite().all()) for weight in head.parameters())


def test_an_answer_that_was_cut_before_its_unsafe_part_counts_for_neither_class(sets):
    data, cut = cut_short(sets[1], 3)
    risks_P = data.labels[data.features.example] * ~torch.isin(data.features.example, torch.tensor(cut))
    assert auroc_of(risks_P, sets[1]) < 1 == auroc_of(risks_P, data) == partial_auroc_of(risks_P, data)


def test_a_set_without_anything_unsafe_in_what_was_read_is_refused(sets):
    data, _ = cut_short(sets[1], 1000)
    with pytest.raises(SafeSpecError, match=r"unsafe answers in the validation set .*`--max-response-tokens`"):
        train_head(sets[0], data, [2], MEAN, settings=QUICK)


def test_classes_weigh_the_same_and_sources_by_a_power_of_their_size():
    examples = make_examples(20) + [
        dataclasses.replace(example, id=f"{i}", source="kitchen", label=0)
        for i, example in enumerate(make_examples(40))
    ]
    weights = torch.tensor(_balance(examples, 0.5))
    labels = torch.tensor([example.label for example in examples])
    in_kitchen = torch.tensor([example.source == "kitchen" for example in examples])
    assert weights[labels == 1].sum() == pytest.approx(30)
    assert weights[in_kitchen].sum() / weights[(labels == 0) & ~in_kitchen].sum() == pytest.approx((40 / 10) ** 0.5)
