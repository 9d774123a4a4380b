"""Training sees what drafting sees, and a stopped run ends with the weights of one that was not stopped."""

import copy
import dataclasses
import json
import time

import pytest
import torch
from samples import make_examples, run, write_lines
from tiny import build_model
from transformers import AutoModelForCausalLM, DynamicCache, GraniteConfig

from safespec_hf import DraftHead, HeadMismatchError, SafeSpecError, UnsupportedRequestError
from safespec_hf.distilling import states as distill_data
from safespec_hf.distilling.distill import DistillSettings, Trainer, distill_draft, learning_rate_at, new_draft
from safespec_hf.distilling.states import (
    StateSettings,
    choose_token_ids,
    collate,
    is_held_out,
    load_states,
    plan_epoch,
    read_states,
)
from safespec_hf.distilling.unroll import score_batch, to_figures, unroll

READING = StateSettings(layers=(0, 1, 2), num_shard_examples=5)
SETTINGS = DistillSettings(draft_vocab_size=24, num_epochs=3, num_step_tokens=200, held_out_fraction=0.3)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # the same float32 sums in another order, through several layers


@pytest.fixture
def texts(target, chat_tokenizer, tmp_path):
    return read_states(target, chat_tokenizer, make_examples(12), tmp_path / "cache", READING)


@pytest.fixture
def draft(target, chat_tokenizer, texts):
    draft = new_draft(target, chat_tokenizer, texts, READING.layers, SETTINGS)
    for weight in draft.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return draft.bind(target)


def drafted(draft, text, start, num_depths):
    """Logits of one chain, drafted step by step after the answer position `start`."""
    states, _ = load_states(text)
    cache, column = DynamicCache(), text.num_prompt + start
    block, state = text.ids[None, : column + 1], torch.cat([torch.zeros(1, 96), states[:column].float()])[None]
    logits = []
    for depth in range(num_depths):
        outputs = draft(block, state, cache, logits_to_keep=1)
        logits.append(outputs.logits[0, -1])
        block, state = text.ids[None, column + depth + 1 :][:, :1], outputs.hidden_states[:, -1:]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("num_depths", [1, 2, 4])
def test_training_computes_what_drafting_computes_at_every_depth(draft, texts, num_depths):
    batch = collate(texts[:5])
    hidden = unroll(draft, batch, num_depths)
    for row, text in enumerate(texts[:5]):
        for start in range(len(text.answer_ids) - num_depths + 1):
            for depth, logits in enumerate(drafted(draft, text, start, num_depths)):
                torch.testing.assert_close(draft.logits(hidden[depth])[row, start], logits, **CLOSE)


@torch.no_grad()
def test_loss_and_counts_are_those_of_positions_one_by_one(draft, target, texts):
    texts, tokens = texts[:3], draft.token_ids.tolist()
    losses, hits, chains = [[], [], []], [[], [], []], [[], [], []]
    for text in texts:
        answer, (_, last) = text.answer_ids.tolist(), load_states(text)
        probs = target.lm_head(last.float())[:, draft.token_ids].softmax(-1)
        for start in range(len(answer)):
            is_right = True
            for depth, logits in enumerate(drafted(draft, text, start, min(3, len(answer) - start))):
                position = start + depth
                is_last = position + 1 == len(answer)
                if is_last or answer[position + 1] in tokens:
                    losses[depth].append(torch.nn.functional.cross_entropy(logits, probs[position]))
                if not is_last:
                    hits[depth].append(tokens[int(logits.argmax())] == answer[position + 1])
                    is_right = is_right and hits[depth][-1]
                    chains[depth].append(is_right)
    figures = to_figures([score_batch(draft, collate(texts), 3, 0.5)])
    mean = [torch.stack(part).mean() * 0.5**depth for depth, part in enumerate(losses)]
    assert figures.loss == pytest.approx(float(sum(mean) / 1.75), rel=1e-4)
    assert figures.acceptance == pytest.approx([sum(part) / len(part) for part in hits])
    assert figures.tokens_per_round == pytest.approx(1 + sum(sum(part) / len(part) for part in chains))


def test_the_loss_trains_the_head_and_leaves_the_target_alone(draft, target, texts):
    score_batch(draft, collate(texts[:3]), 3, 0.8).loss.backward()
    assert all(bool(weight.grad.any()) for weight in draft.parameters())
    assert all(weight.grad is None for weight in target.parameters())


@torch.no_grad()
def test_states_are_those_of_the_target_in_the_order_of_the_examples(target, texts, chat_tokenizer):
    for example, text in zip(make_examples(12), texts, strict=True):
        assert chat_tokenizer.decode(text.answer_ids).split() == example.response.split()
        hidden = target(text.ids[None], output_hidden_states=True).hidden_states
        states, last = load_states(text)
        # kept as bfloat16, which has 8 bits of mantissa
        torch.testing.assert_close(states.float(), torch.cat(hidden, -1)[0], atol=1e-3, rtol=2**-7)
        torch.testing.assert_close(last.float(), hidden[2][0, text.num_prompt :], atol=1e-3, rtol=2**-7)


def test_a_token_comes_with_the_state_before_it(texts):
    batch = collate(texts[:4])
    for row, text in enumerate(texts[:4]):
        columns = batch.is_token_BS[row]
        assert batch.ids_BS[row, columns].tolist() == text.ids.tolist()
        assert batch.position_ids_BS[row, columns].tolist() == list(range(len(text.ids)))
        states = batch.states_BSF[row, columns]
        assert not states[0].any()
        assert torch.equal(states[1:], load_states(text)[0][:-1].float())
        assert batch.next_BA[row, : len(text.answer_ids)].tolist() == [*text.answer_ids[1:].tolist(), -1]


def test_an_epoch_has_every_text_once_and_another_order_each_time():
    plans = [plan_epoch([5, 9, 7, 5, 30, 8], num_step_tokens=20, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    assert sorted(index for batch in plans[0] for index in batch) == list(range(6))


def test_what_is_held_out_does_not_depend_on_the_rest():
    held_out = [group for group in map(str, range(1000)) if is_held_out(group, 0.2)]
    assert 150 < len(held_out) < 250
    assert set(held_out) <= {group for group in map(str, range(1000)) if is_held_out(group, 0.3)}


def test_frequent_tokens_and_all_that_end_an_answer_can_be_drafted(texts):
    frequent = torch.cat([text.answer_ids for text in texts]).bincount().argmax()
    ids = choose_token_ids(texts, [2, 39], 4, 40)
    assert {2, 39, int(frequent)} <= set(ids.tolist())
    assert len(ids) == 4
    assert choose_token_ids(texts, [2], 99, 40).tolist() == list(range(40))


@pytest.mark.parametrize("num_stops", [1, 4])
def test_a_run_that_was_stopped_ends_with_the_same_weights(target, chat_tokenizer, texts, tmp_path, num_stops):
    def trainer(name):
        draft = new_draft(target, chat_tokenizer, texts[:9], READING.layers, SETTINGS).bind(target)
        return Trainer(draft, texts[:9], texts[9:], SETTINGS, tmp_path / name)

    whole, stopped = trainer("whole"), trainer("stopped")
    expected = whole.run()
    for _ in range(num_stops):
        assert not stopped.run(deadline=time.monotonic())["is_finished"]
        stopped = trainer("stopped")
    assert stopped.step == num_stops
    assert stopped.run() == expected
    for name, weight in whole.draft.state_dict().items():
        assert torch.equal(weight, stopped.draft.state_dict()[name]), name


def test_a_killed_run_loses_what_came_after_the_checkpoint_and_no_more(
    target, chat_tokenizer, texts, tmp_path, monkeypatch
):
    settings = dataclasses.replace(SETTINGS, checkpoint_minutes=0.0)
    draft = new_draft(target, chat_tokenizer, texts, READING.layers, settings).bind(target)
    trainer = Trainer(draft, texts[:9], texts[9:], settings, tmp_path / "x.pt")
    step = trainer._train_step
    monkeypatch.setattr(trainer, "_train_step", lambda batch: step(batch) if trainer.step < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert Trainer(draft, texts[:9], texts[9:], settings, tmp_path / "x.pt").step == 2


def test_the_learning_rate_rises_then_falls():
    rates = [learning_rate_at(step, 100, DistillSettings(warmup_fraction=0.1)) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.fixture
def answers(target_folder, tmp_path):
    """The target's own answers: what it says is what its states tell."""
    prompts = [{"prompt": f"w{10 + i % 25} w{10 + i // 25} think"} for i in range(60)]
    asked, out = write_lines(tmp_path / "prompts.jsonl", prompts), tmp_path / "answers.jsonl"
    run("collect", asked, "--label", "safe", "--out", out, "--max-new-tokens", 12, "--target", target_folder)
    return out


def test_from_answers_to_a_head_that_drafts(answers, target_folder, tmp_path):
    arguments = [answers, "--out", tmp_path / "draft", "--target", target_folder, "--cache", tmp_path / "cache"]
    arguments += ["--draft-vocab-size", 24, "--epochs", 30, "--step-tokens", 400, "--held-out-fraction", 0.2]
    assert "tokens per round" in run("distill-draft", *arguments)
    record = json.loads((tmp_path / "draft" / "training.json").read_text())
    assert record["is_finished"]
    assert record["provenance"]["data"]["answers.jsonl"]
    assert record["acceptance"][0] > 2 * record["history"][0]["acceptance"][0] or record["acceptance"][0] > 0.5
    draft = DraftHead.from_pretrained(tmp_path / "draft")
    assert draft.dtype == torch.bfloat16
    assert draft.bind(AutoModelForCausalLM.from_pretrained(target_folder)).config.draft_vocab_size == 24
    # all is done, so there is nothing to do again
    weights = (tmp_path / "draft" / "model.safetensors").read_bytes()
    run("distill-draft", *arguments)
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == weights


@pytest.fixture
def distill(answers, target, chat_tokenizer, tmp_path):
    """`distill_draft` of the target's answers, unless others are given."""
    settings = dataclasses.replace(SETTINGS, num_epochs=1)

    def call(files=(answers,), **kwargs):
        kwargs.setdefault("settings", settings)
        out = kwargs.pop("out", tmp_path / "draft")
        return distill_draft(target, chat_tokenizer, files, out, tmp_path / "cache", **kwargs)

    return call


def test_a_run_out_of_time_goes_on_later_and_a_finished_head_can_be_trained_further(distill, tmp_path):
    assert distill(max_minutes=0) == {"is_finished": False, "step": 0}
    record = distill()
    assert record["is_finished"]
    further = distill(start=tmp_path / "draft")
    assert further["history"][0]["loss"] < record["history"][0]["loss"]


def test_states_of_an_answer_are_read_once(distill, answers, tmp_path, monkeypatch):
    distill()
    first = write_lines(tmp_path / "first.jsonl", answers.read_text().splitlines()[:30])
    monkeypatch.setattr(distill_data, "read_hidden", lambda *_: 1 / 0)
    distill(settings=SETTINGS)
    distill([first])


@pytest.mark.parametrize("change", ["weights", "dtype", "template"])
def test_another_target_does_not_get_the_draft_of_the_first_one(answers, target, chat_tokenizer, tmp_path, change):
    def distill(model, tokenizer, cache):
        settings = dataclasses.replace(SETTINGS, num_epochs=1)
        out = tmp_path / f"{cache}-{model.dtype}"
        record = distill_draft(model, tokenizer, [answers], out, tmp_path / cache, settings=settings)
        return record["loss"], (out / "model.safetensors").read_bytes()

    distill(target, chat_tokenizer, "shared")
    other = build_model(seed=5) if change == "weights" else build_model()
    other = other.bfloat16() if change == "dtype" else other
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = chat_tokenizer.chat_template + ("w11 " if change == "template" else "")
    assert distill(other, tokenizer, "shared") == distill(other, tokenizer, "fresh")


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"layers": [1, 99]}, "from 0 to 2"),
        ({"layers": [2]}, "at least two layers"),
        ({"layers": [1, 1]}, "different numbers"),
        ({"max_minutes": -1}, "`max_minutes` must be"),
        ({"max_minutes": float("nan")}, "`max_minutes` must be"),
        ({"settings": dataclasses.replace(SETTINGS, held_out_fraction=1e-9)}, "both parts need some"),
    ],
)
def test_what_cannot_work_is_refused_before_the_target_reads_anything(distill, target, kwargs, said):
    target.forward = None
    with pytest.raises(SafeSpecError, match=said):
        distill(**kwargs)


def test_an_output_that_cannot_be_written_is_told_before_the_target_reads_anything(distill, target, tmp_path):
    (tmp_path / "file").write_text("")
    target.forward = None
    with pytest.raises(SafeSpecError, match="can be written to"):
        distill(out=tmp_path / "file")


def test_a_head_to_begin_with_keeps_its_layers_and_its_target(distill, draft, target, tmp_path):
    draft.save_pretrained(tmp_path / "start")
    target.forward = None
    with pytest.raises(SafeSpecError, match=r"reads layers \[0, 1, 2\], not \[1, 2\]"):
        distill(start=tmp_path / "start", layers=[1, 2])
    draft.config.target = {**draft.config.target, "vocab_size": 99}
    draft.save_pretrained(tmp_path / "other")
    with pytest.raises(HeadMismatchError, match="vocab_size"):
        distill(start=tmp_path / "other")


def test_too_few_prompts_to_hold_some_out_are_refused(target, chat_tokenizer, tmp_path):
    file = write_lines(tmp_path / "x.jsonl", [example.to_json() for example in make_examples(2)])
    with pytest.raises(SafeSpecError, match="both parts need some"):
        distill_draft(target, chat_tokenizer, [file], tmp_path, tmp_path, settings=SETTINGS, layers=[1, 2])


def test_a_target_that_scales_its_logits_is_refused(chat_tokenizer, tmp_path):
    sizes = dict(build_model().config.to_diff_dict()) | {"model_type": "granite", "logits_scaling": 4.0}
    target = AutoModelForCausalLM.from_config(GraniteConfig(**sizes)).eval()
    with pytest.raises(UnsupportedRequestError, match="scales or caps"):
        read_states(target, chat_tokenizer, make_examples(2), tmp_path, READING)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_depths": 0},
        {"num_depths": 1.5},
        {"held_out_fraction": 1.0},
        {"held_out_fraction": 2},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_fraction": 1.0},
        {"depth_decay": 0.0},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(fields):
    with pytest.raises(SafeSpecError, match=f"`{next(iter(fields))}` must be"):
        DistillSettings(**fields)


def test_settings_of_states_are_counts():
    with pytest.raises(SafeSpecError, match="`num_batch_tokens` must be"):
        StateSettings(layers=(1, 2), num_batch_tokens=0)
