import dataclasses
import subprocess
import sys
import time

import peft
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from samples import make_examples, run, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from safespec_hf import SafeSpecConfig, SafeSpecError
from safespec_hf.answer.pooling import PooledStates, find_newline_ids, pool, pooling_weights, segment_counts
from safespec_hf.distilling.states import StateSettings, load_states, read_states
from safespec_hf.training import features as features_module
from safespec_hf.training.data import load_examples
from safespec_hf.training.dataset import split_by_group
from safespec_hf.training.features import READINGS, FeatureSettings, Reading, extract_features
from safespec_hf.training.hidden import encode, read_hidden, score_answers
from safespec_hf.training.prompt_probe import read_prompts
from safespec_hf.training.scores import read_risks

SETTINGS = FeatureSettings(layers=(1, 2), prefix_tokens=(1, 4, 8), num_shard_examples=5, num_batch_tokens=64)


@pytest.fixture
def features(target, chat_tokenizer, examples, tmp_path):
    return extract_features(target, chat_tokenizer, examples, tmp_path, SETTINGS)


def decode_token_by_token(model, tokenizer, example, reading):
    """What decoding would see: one token at a time, pooled state by pooled state."""
    text = encode(tokenizer, example, 99, 99)
    newline_ids, policy, states, num_open = find_newline_ids(tokenizer), SafeSpecConfig(), PooledStates(), 0
    for index, token in enumerate(text.response_ids):
        ids = torch.tensor([text.prompt_ids + text.response_ids[: index + 1]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        (count,), num_open = segment_counts(
            num_open, [token in newline_ids], policy.min_segment_tokens, policy.max_segment_tokens
        )
        weights = pooling_weights(
            [count if reading.span == "segment" else index], reading.pooling, SETTINGS.ewma_decay
        )
        states.append(pool(states.last(), torch.cat([hidden[1][0, -1:], hidden[2][0, -1:]], dim=-1), weights))
        yield states.last()


@pytest.mark.parametrize("reading", READINGS, ids=lambda reading: reading.name)
def test_features_are_what_decoding_computes(target, chat_tokenizer, examples, features, reading):
    example = 3
    expected = list(decode_token_by_token(target, chat_tokenizer, examples[example], reading))
    is_mine = features.example == example
    for num_tokens, state in zip(features.num_tokens[is_mine], features.states[reading.name][is_mine], strict=True):
        # bfloat16 keeps 8 bits of mantissa
        torch.testing.assert_close(state.float().flatten(), expected[num_tokens - 1], rtol=2**-7, atol=2**-7)


def test_layers_above_the_highest_one_read_do_not_run(chat_tokenizer, examples):
    model, text, calls = tiny.build_model(num_hidden_layers=4), encode(chat_tokenizer, examples[0], 99, 99), []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    (hidden_TF,) = read_hidden(model, [text], [1])
    assert calls == [0, 1]
    assert model.config.num_hidden_layers == 4
    full = model(torch.tensor([text.prompt_ids + text.response_ids]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(hidden_TF, full[0, len(text.prompt_ids) :])


def test_risks_are_what_decoding_computes(target, chat_tokenizer, examples):
    head = tiny.build_head(target, hidden_layers=[1, 2], pooling="mean", span="segment")
    risks = dict(score_answers(target, chat_tokenizer, head, examples[:6], num_batch_tokens=80))
    states = list(decode_token_by_token(target, chat_tokenizer, examples[5], READINGS[1]))
    # sums in another order: float32 noise
    torch.testing.assert_close(risks[5], head.risk(torch.stack(states)).detach(), rtol=1e-4, atol=1e-5)


def test_a_target_that_was_left_in_training_mode_is_read_without_dropout(chat_tokenizer, examples, tmp_path):
    target = tiny.build_model("gpt2")
    head = tiny.build_head(target)
    expected = dict(score_answers(target, chat_tokenizer, head, examples))
    states = extract_features(target, chat_tokenizer, examples, tmp_path / "eval", SETTINGS).states["mean-answer"]
    target.train()
    for index, risks in score_answers(target, chat_tokenizer, head, examples):
        assert torch.equal(risks, expected[index])
    found = extract_features(target, chat_tokenizer, examples, tmp_path / "train", SETTINGS).states["mean-answer"]
    assert torch.equal(found, states)
    assert target.training


def test_a_head_in_16_bits_has_risks_of_its_own_in_the_cache(target, chat_tokenizer, examples, tmp_path):
    head = tiny.build_head(target).bfloat16()
    read_risks(target, chat_tokenizer, [head], examples, tmp_path / "shared")
    (found,) = read_risks(target, chat_tokenizer, [head.float()], examples, tmp_path / "shared")
    (fresh,) = read_risks(target, chat_tokenizer, [head], examples, tmp_path / "fresh")
    assert torch.equal(torch.cat(found), torch.cat(fresh))


def test_every_answer_has_its_prefixes_in_order(features, examples):
    assert features.example.unique_consecutive().tolist() == list(range(len(examples)))
    assert int(features.is_last.sum()) == len(examples)
    assert all(tensor.shape[1:] == (2, 32) for tensor in features.states.values())


def test_a_cache_is_read_and_not_made_again(target, chat_tokenizer, examples, features, tmp_path):
    target.forward = None
    again = extract_features(target, chat_tokenizer, examples, tmp_path, SETTINGS)
    assert torch.equal(again.states["mean-answer"], features.states["mean-answer"])


def test_parts_of_the_data_in_any_order_are_read_from_the_cache_of_the_whole(
    target, chat_tokenizer, examples, features, tmp_path
):
    target.forward = None
    for part in split_by_group(examples, 0.3):
        found = extract_features(target, chat_tokenizer, part, tmp_path, SETTINGS)
        for index, example in enumerate(part):
            is_whole, is_part = features.example == examples.index(example), found.example == index
            for name in features.states:
                assert torch.equal(found.states[name][is_part], features.states[name][is_whole])
            assert torch.equal(found.num_chars[is_part], features.num_chars[is_whole])


def test_a_file_of_the_cache_that_lacks_a_tensor_is_made_again(target, chat_tokenizer, examples, features, tmp_path):
    for file in tmp_path.rglob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            metadata = shard.metadata()
        tensors = load_file(file)
        tensors.pop("num_tokens")
        save_file(tensors, file, metadata=metadata)
    again = extract_features(target, chat_tokenizer, examples, tmp_path, SETTINGS)
    assert torch.equal(again.num_tokens, features.num_tokens)


def test_train_reads_nothing_that_features_has_read(target_folder, examples, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "x.jsonl", [example.to_json() for example in make_examples(60)])
    common = [data, "--target", target_folder, "--cache", tmp_path / "cache", "--layers", "1,2"]
    run("features", *common)
    monkeypatch.setattr(features_module, "read_hidden", lambda *_: 1 / 0)
    run("train", *common, "--out", tmp_path / "head", "--width", 0)


def test_of_more_data_only_what_is_new_is_read(target, chat_tokenizer, examples, features, tmp_path, monkeypatch):
    read, more = [], make_examples(3, seed=9)
    monkeypatch.setattr(features_module, "read_hidden", lambda *a: read.extend(a[1]) or read_hidden(*a))
    extract_features(target, chat_tokenizer, [*more, *examples], tmp_path, SETTINGS)
    assert len(read) == len(more)


def test_an_answer_that_occurs_twice_has_the_same_features_twice(target, chat_tokenizer, examples, tmp_path):
    twice = extract_features(target, chat_tokenizer, [examples[0], examples[1], examples[0]], tmp_path, SETTINGS)
    states = twice.states["mean-answer"]
    assert torch.equal(states[twice.example == 0], states[twice.example == 2])


def test_risks_of_a_part_are_read_from_the_cache_of_the_whole(target, chat_tokenizer, examples, tmp_path):
    head = tiny.build_head(target)
    (risks,) = read_risks(target, chat_tokenizer, [head], examples, tmp_path)
    target.forward = None
    assert torch.equal(read_risks(target, chat_tokenizer, [head], examples[5:6], tmp_path)[0][0], risks[5])


def test_several_heads_are_scored_as_each_alone(target, chat_tokenizer, examples, tmp_path):
    settings = [([1], "mean", 1), ([2, 1], "mean+ewma", 1), ([2], "last", 0)]
    heads = [
        tiny.build_head(target, hidden_layers=layers, pooling=pooling, unsafe_label=label)
        for layers, pooling, label in settings
    ]
    together = read_risks(target, chat_tokenizer, heads, examples, tmp_path / "together")
    for head, risks in zip(heads, together, strict=True):
        (alone,) = read_risks(target, chat_tokenizer, [head], examples, tmp_path / "alone")
        torch.testing.assert_close(risks, alone)


def test_a_head_that_speaks_for_safe_has_other_risks_in_the_cache(target, chat_tokenizer, examples, tmp_path):
    head = tiny.build_head(target)
    (risks,) = read_risks(target, chat_tokenizer, [head], examples, tmp_path)
    head.config.unsafe_label = 0
    (others,) = read_risks(target, chat_tokenizer, [head], examples, tmp_path)
    torch.testing.assert_close(others[0], 1 - risks[0])


def test_other_weights_have_another_cache(target, chat_tokenizer, examples, features, tmp_path):
    extract_features(tiny.perturb(target), chat_tokenizer, examples, tmp_path, SETTINGS)
    assert len(list(tmp_path.iterdir())) == 2


def scale_positions(model):
    """The same weights, with positions that are scaled."""
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    scaled = LlamaForCausalLM(tiny.CONFIGS["llama"](rope_parameters=rope)).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


def with_tuners(act):
    def change(model):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                act(module)
        return model

    return change


CHANGES = {
    "positions": scale_positions,
    "adapter": with_tuners(lambda layer: layer.set_adapter("other")),
    "no adapter": with_tuners(lambda layer: layer.enable_adapters(False)),
    "scale": with_tuners(lambda layer: layer.scale_layer(3.0)),
}


@pytest.fixture
def adapted(target):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(target, config)
    wrapped.add_adapter("other", config)
    return wrapped.get_base_model().eval()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_states_has_another_cache(request, target, chat_tokenizer, examples, tmp_path, change):
    model = target if change == "positions" else request.getfixturevalue("adapted")

    def read_all_kinds(model, cache):
        states = extract_features(model, chat_tokenizer, examples, cache, SETTINGS).states["mean-answer"]
        (risks,) = read_risks(model, chat_tokenizer, [head], examples, cache)
        prompts = read_prompts(model, chat_tokenizer, [1, 2], examples, cache)
        texts = read_states(model, chat_tokenizer, examples, cache, StateSettings(layers=(1, 2)))
        return [states, torch.cat(risks), prompts, torch.cat([load_states(text)[0] for text in texts])]

    head = tiny.build_head(target)
    before = read_all_kinds(model, tmp_path / "shared")
    changed = CHANGES[change](model)
    after = read_all_kinds(changed, tmp_path / "shared")
    fresh = read_all_kinds(changed, tmp_path / "fresh")
    assert all(torch.equal(one, other) for one, other in zip(after, fresh, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_a_model_that_was_saved_and_loaded_has_the_same_cache(
    target, chat_tokenizer, examples, features, tmp_path, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("saved")
    target.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded.config.pad_token_id = 3
    extract_features(loaded, chat_tokenizer, examples, tmp_path, SETTINGS)
    assert len(list(tmp_path.iterdir())) == 1


def test_states_that_overflow_are_refused_before_they_are_kept(target, chat_tokenizer, examples, tmp_path):
    target.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(SafeSpecError, match="are infinite or no numbers"):
        extract_features(target, chat_tokenizer, examples, tmp_path, SETTINGS)
    with pytest.raises(SafeSpecError, match="are infinite or no numbers"):
        read_risks(target, chat_tokenizer, [tiny.build_head(target)], examples, tmp_path)


def test_a_broken_head_gives_no_risks(target, chat_tokenizer, examples, tmp_path):
    head = tiny.build_head(target)
    torch.nn.init.constant_(head.mlp[-1].weight, float("nan"))
    with pytest.raises(SafeSpecError, match="risks that are no numbers"):
        read_risks(target, chat_tokenizer, [head], examples, tmp_path)


@pytest.mark.parametrize("layers", [(), (3,), (-1,), (1, 1), (0, 99)])
def test_layers_that_a_target_lacks_are_refused(target, chat_tokenizer, examples, tmp_path, layers):
    with pytest.raises(SafeSpecError, match="from 0 to 2"):
        extract_features(target, chat_tokenizer, examples, tmp_path, FeatureSettings(layers=layers))


@pytest.mark.parametrize("text", ["foo-bar", "mean", "", "mean-answer-x", "ewma-segment", "mean answer"])
def test_a_reading_is_one_of_a_list(text):
    with pytest.raises(SafeSpecError, match=r"last-answer.*mean-answer.*but it is '"):
        Reading.parse(text)
    assert [Reading.parse(reading.name) for reading in READINGS] == list(READINGS)
    assert Reading.parse("mean+last-answer").parts == [Reading("mean", "answer"), Reading("last", "answer")]


@pytest.mark.parametrize(
    "fields", [{"ewma_decay": 1.0}, {"prefix_tokens": (0,)}, {"max_response_tokens": 0}, {"readings": ()}], ids=str
)
def test_a_setting_out_of_range_is_named(fields):
    with pytest.raises(SafeSpecError, match=f"`{next(iter(fields))}` must"):
        FeatureSettings(layers=(1,), **fields)


def test_other_settings_have_another_cache(target, chat_tokenizer, examples, features, tmp_path):
    extract_features(target, chat_tokenizer, examples, tmp_path, dataclasses.replace(SETTINGS, layers=(2,)))
    assert len(list(tmp_path.iterdir())) == 2


READ = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
from safespec_hf.training.data import load_examples
from safespec_hf.training.data import load_examples
from safespec_hf.training.features import FeatureSettings, extract_features
folder, data, cache = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
settings = FeatureSettings(layers=(1, 2), prefix_tokens=(1, 4, 8), num_shard_examples=5, num_batch_tokens=64)
extract_features(model, tokenizer, load_examples([data]), cache, settings)
"""


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}


def test_a_killed_run_goes_on_and_gives_the_same_files(target_folder, tmp_path):
    data, killed = tmp_path / "x.jsonl", tmp_path / "killed"
    write_lines(data, [example.to_json() for example in make_examples(400)])
    process = subprocess.Popen([sys.executable, "-c", READ, str(target_folder), str(data), str(killed)])
    while process.poll() is None and len(read_all(killed)) < 3:
        time.sleep(0.005)
    process.kill()
    process.wait()
    num_before = len(read_all(killed))
    model = AutoModelForCausalLM.from_pretrained(target_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    for cache in (killed, tmp_path / "whole"):
        extract_features(model, tokenizer, load_examples([data]), cache, SETTINGS)
    assert 3 <= num_before < len(read_all(tmp_path / "whole"))
    assert read_all(killed) == read_all(tmp_path / "whole")
