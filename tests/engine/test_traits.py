"""What is known of a model before it runs: its device, its windows, and how many positions it has."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny import build_draft_head, build_head, build_model, build_noisy_head, cheap_drafts, perturb
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTNeoConfig,
    Llama4TextConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.engine.traits import has_windows, input_device, is_offloaded, max_positions, takes_trees

PROMPT = torch.tensor([[12, 18, 24, 13]])
NUM_POSITIONS = 24
SPECIAL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SCORED = SafeSpecConfig(score_last_token=True)
# older releases of transformers take the place of offloaded weights for that of the inputs
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device")


def build(config, std=0.3):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=std)
    return model


def neo(kinds=("global", "local"), **config):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "window_size": 4}
    return build(GPTNeoConfig(**SPECIAL, **{**sizes, **config}, attention_types=[[list(kinds), 1]]))


def learned(kind, num=NUM_POSITIONS):
    if kind == "gpt2":
        return build_model("gpt2", n_positions=num)
    if kind == "gpt_neo":
        return neo(max_position_embeddings=num)
    if kind == "gptj":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": num}
        return build(GPTJConfig(**SPECIAL, **sizes))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    return build(OPTConfig(**SPECIAL, **sizes, word_embed_proj_dim=32, max_position_embeddings=num))


def offload(model, how, folder):
    if how == "cpu":
        return cpu_offload(model)
    if how == "disk":
        return disk_offload(model, str(folder))
    first, second = [name for name, _ in model.named_children()]
    devices = {first: "disk", second: "cpu"} if how == "first" else {first: "cpu", second: "disk"}
    return dispatch_model(model, devices, main_device="cpu", offload_dir=str(folder))


@pytest.mark.filterwarnings("ignore:.*offloaded")
@pytest.mark.parametrize("how", ["cpu", "disk", "first", "second"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_offloaded_model_answers_as_it_does_alone(kind, how, tokenizer, tmp_path):
    expected = build_model(kind).generate(PROMPT, max_new_tokens=12, do_sample=False)
    model = offload(build_model(kind), how, tmp_path / "target")
    draft = offload(perturb(build_model(kind)), how, tmp_path / "draft")
    head = build_head(build_model(kind))
    attach_safety_head(model, head, tokenizer=tokenizer)
    for assistant in (None, draft):
        with cheap_drafts():
            found = model.generate(
                PROMPT, max_new_tokens=12, do_sample=False, safespec=SCORED, assistant_model=assistant
            )
        assert torch.equal(found, expected)
    assert {weight.device.type for weight in head.parameters()} == {"cpu"}


def test_an_offloaded_model_recovers(tokenizer, tmp_path):
    head = build_noisy_head(build_model(), 0.8)
    policy = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no thanks")
    answers = []
    for model in (build_model(), cpu_offload(build_model())):
        attach_safety_head(model, head, tokenizer=tokenizer)
        answers.append(model.generate(PROMPT, max_new_tokens=20, do_sample=False, safespec=policy))
    assert torch.equal(*answers)


@pytest.mark.filterwarnings("ignore:.*offloaded")
@pytest.mark.parametrize("how", ["cpu", "disk", "first"])
def test_a_draft_head_of_an_offloaded_target_is_refused_before_the_first_forward(how, tokenizer, tmp_path):
    draft = build_draft_head(build_model())
    draft._embedding = ()
    model = offload(build_model(), how, tmp_path)
    attach_safety_head(model, build_head(build_model()), tokenizer=tokenizer)
    model.forward = lambda **_: pytest.fail("a forward ran")
    with pytest.raises(UnsupportedRequestError, match="are offloaded"):
        model.generate(PROMPT, max_new_tokens=4, do_sample=False, safespec=True, assistant_model=draft)


def test_what_is_offloaded_is_known(tmp_path):
    model = offload(build_model(), "second", tmp_path)
    assert is_offloaded(model)
    assert not is_offloaded(build_model())
    assert input_device(model) == torch.device("cpu")


def test_inputs_of_an_ordinary_model_go_where_its_weights_are():
    assert input_device(build_model()) == torch.device("cpu")
    assert input_device(build_model().to("meta")) == torch.device("meta")


class Strange(PreTrainedConfig):
    model_type = "strange"
    num_hidden_layers: int = 1
    attention_window: int = 7


@pytest.mark.parametrize(
    ("model", "is_windowed"),
    [
        (build_model, False),
        (lambda: build_model("sliding"), True),
        (lambda: build_model("alternating"), True),
        (lambda: build_model("gpt2"), False),
        (neo, True),
        (lambda: neo(("global", "global")), False),
        (lambda: build(Qwen2Config(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, **SPECIAL)), False),
    ],
)
def test_windows_are_known_and_keep_trees_away(model, is_windowed):
    model = model()
    assert has_windows(model) is is_windowed
    assert takes_trees(model) is not is_windowed


@pytest.mark.parametrize("config", [Llama4TextConfig(attention_chunk_size=8), Strange()])
def test_chunks_and_unknown_windows_are_windows(config):
    model = build_model()
    model.config = config
    assert has_windows(model) is True


@pytest.mark.parametrize("num_rows", [1, 3])
def test_local_attention_with_drafts_is_the_targets(num_rows, tokenizer):
    model = neo()
    prompts = torch.randint(10, 40, (num_rows, 9))
    arguments = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": 30, "do_sample": False}
    expected = model.generate(prompts, **arguments)
    attach_safety_head(model, build_head(model), tokenizer=tokenizer)
    with cheap_drafts():
        found = model.generate(prompts, safespec=True, assistant_model=perturb(model, 0.02), **arguments)
    assert torch.equal(found, expected)


KINDS = ["gpt2", "gpt_neo", "gptj", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_positions_is_a_limit_and_rotary_embeddings_are_none(kind):
    assert max_positions(learned(kind)) == NUM_POSITIONS
    assert max_positions(build_model(max_position_embeddings=NUM_POSITIONS)) is None
    assert max_positions(build_draft_head(build_model())) == 64


def guard(model, tokenizer):
    return attach_safety_head(model, build_head(model), tokenizer=tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_new", [1, 2, 5])
@pytest.mark.parametrize("with_draft", [False, True])
def test_answers_up_to_the_last_position_are_the_targets(kind, num_new, with_draft, tokenizer):
    model = learned(kind)
    prompt = torch.randint(10, 40, (1, NUM_POSITIONS + 1 - num_new))
    expected = model.generate(prompt, max_new_tokens=num_new, do_sample=False)
    draft = perturb(model, 0.02) if with_draft else None
    with cheap_drafts():
        found = guard(model, tokenizer).generate(
            prompt, max_new_tokens=num_new, do_sample=False, safespec=SCORED, assistant_model=draft
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_up_to_the_last_position_are_the_targets(kind, tokenizer):
    model = learned(kind)
    prompts, lengths = torch.randint(10, 40, (3, NUM_POSITIONS - 5)), [NUM_POSITIONS - 5, 7, 3]
    mask = torch.stack([torch.arange(NUM_POSITIONS - 5) >= NUM_POSITIONS - 5 - length for length in lengths]).long()
    arguments = {"max_new_tokens": 6, "do_sample": False}
    alone = [
        model.generate(row[None, -length:], **arguments)[0, length:]
        for row, length in zip(prompts, lengths, strict=True)
    ]
    with cheap_drafts():
        found = guard(model, tokenizer).generate(
            prompts * mask, attention_mask=mask, safespec=SCORED, assistant_model=perturb(model, 0.02), **arguments
        )
    assert torch.equal(found[:, -6:], torch.stack(alone))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_prompt", "num_new"), [(NUM_POSITIONS + 1, 1), (NUM_POSITIONS, 2), (5, 60)])
def test_answers_past_the_last_position_are_refused_before_the_first_forward(kind, num_prompt, num_new, tokenizer):
    model = guard(learned(kind), tokenizer)
    model.forward = lambda **_: pytest.fail("a forward ran")
    with pytest.raises(UnsupportedRequestError, match=f"The target has {NUM_POSITIONS} positions"):
        model.generate(torch.full((1, num_prompt), 11), max_new_tokens=num_new, do_sample=False, safespec=True)


def test_an_answer_that_may_end_in_time_ends_with_the_last_position(tokenizer):
    model = guard(learned("gpt2"), tokenizer)
    prompt = torch.randint(10, 40, (1, NUM_POSITIONS - 3))
    output = model.generate(
        prompt, max_new_tokens=9, eos_token_id=2, do_sample=False, safespec=True, return_dict_in_generate=True
    )
    assert output.finish_reasons == ["length"]
    assert output.sequences.shape[1] == NUM_POSITIONS + 1


def test_rotary_embeddings_go_on_past_their_config(tokenizer):
    model = build_model(max_position_embeddings=16)
    expected = model.generate(PROMPT, max_new_tokens=30, do_sample=False)
    with cheap_drafts():
        found = guard(model, tokenizer).generate(
            PROMPT, max_new_tokens=30, do_sample=False, safespec=True, assistant_model=perturb(model)
        )
    assert torch.equal(found, expected)
