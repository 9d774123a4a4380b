"""An exported repository answers guarded in code that does not know us, or it does not load."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tiny import PROMPT, attach, build_head, build_model, build_noisy_head
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    TextStreamer,
    pipeline,
)
from transformers.generation import GenerationMixin

from safespec_hf import (
    GuardedModel,
    HeadFileError,
    HeadMismatchError,
    SafeSpecConfig,
    SafeSpecOutput,
    UnsupportedRequestError,
    detach_safety_head,
    export_guarded,
)
from safespec_hf.exporting import loading

POLICY = SafeSpecConfig(**tiny.FIELDS, adaptive_drafts=False)
SHORT = {"max_new_tokens": 12, "do_sample": False}
TRUST = {"trust_remote_code": True}


@pytest.fixture
def exported(target, chat_tokenizer, tmp_path):
    """A target whose head flags about a third of all tokens."""
    head = build_noisy_head(target, tokenizer=chat_tokenizer)
    model = attach(target, chat_tokenizer, head, policy=POLICY)
    return export_guarded(model, tmp_path / "export", draft=tiny.build_draft_head(target))


@pytest.fixture
def expected(target, exported):
    """What the exported model says, guarded."""
    return target.generate(PROMPT, **SHORT, safespec=POLICY, assistant_model=tiny.build_draft_head(target))


def edit(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    config["safespec"] |= entries
    (folder / "config.json").write_text(json.dumps(config))


def test_from_pretrained_gives_the_target_guarded_for_every_call(exported, expected):
    model = AutoModelForCausalLM.from_pretrained(exported, **TRUST)
    assert isinstance(model, LlamaForCausalLM)
    assert torch.equal(model.generate(PROMPT, **SHORT), expected)
    output = model.generate(PROMPT, **SHORT, return_dict_in_generate=True)
    assert isinstance(output, SafeSpecOutput)
    assert output.events[0]
    assert output.statistics.num_draft_tokens > 0
    with pytest.raises(UnsupportedRequestError, match="always=True"):
        model.generate(PROMPT, **SHORT, safespec=False)


@pytest.mark.skipif(not hasattr(transformers, "AutoModelForDecision"), reason="this transformers has no such class")
def test_a_server_that_first_asks_for_a_decision_model_goes_on(chat_tokenizer, tmp_path):
    # it does so for Qwen 2, and takes a ValueError for a no
    sizes = {**tiny.SIZES, **tiny.ATTENTION, "eos_token_id": None, "pad_token_id": 0}
    target = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)).eval()
    folder = export_guarded(attach(target, chat_tokenizer, build_head(target, tokenizer=chat_tokenizer)), tmp_path)
    with pytest.raises(ValueError, match="takes no decisions"):
        transformers.AutoModelForDecision.from_pretrained(folder, **TRUST)
    # servers take the class by the name in the config
    architecture = getattr(transformers, AutoConfig.from_pretrained(folder, **TRUST).architectures[0])
    assert isinstance(architecture.from_pretrained(folder, **TRUST), GuardedModel)


def test_a_moved_export_is_the_same(exported, expected, tmp_path, monkeypatch):
    exported.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained("moved", **TRUST).generate(PROMPT, **SHORT), expected)
    plain = build_model()
    assert torch.equal(plain.generate(PROMPT, **SHORT, custom_generate="moved", **TRUST), expected)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
        lambda folder: pipeline("text-generation", str(folder), trust_remote_code=False),
        lambda folder: LlamaForCausalLM.from_pretrained(folder),
        lambda folder: LlamaForCausalLM.from_pretrained(folder, **TRUST),
        lambda folder: AutoModelForCausalLM.from_pretrained(
            folder, config=AutoConfig.from_pretrained(folder, **TRUST), trust_remote_code=False
        ),
    ],
)
def test_without_its_code_the_repository_does_not_load(exported, load):
    with pytest.raises((ValueError, OSError), match=r"trust_remote_code=True|no file named"):
        load(exported)


def test_the_plain_target_has_to_be_asked_for_by_its_folder(exported, target):
    plain = AutoModelForCausalLM.from_pretrained(exported, subfolder="target")
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(plain.generate(PROMPT, **SHORT), build_model().generate(PROMPT, **SHORT))


def test_the_targets_folder_with_the_repositorys_code_is_guarded_for_every_call(exported, expected):
    model = AutoModelForCausalLM.from_pretrained(exported, subfolder="target", **TRUST)
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, **SHORT), expected)


def test_the_tokenizer_needs_no_code(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    assert len(tokenizer) == tiny.VOCAB_SIZE
    assert tokenizer.chat_template


def test_generation_settings_are_those_of_the_repository(exported):
    GenerationConfig(max_new_tokens=3, pad_token_id=0).save_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, **TRUST)
    assert model.generate(PROMPT, do_sample=False).shape[1] == PROMPT.shape[1] + 3


def test_arguments_of_from_pretrained_reach_the_target(exported):
    model, info = AutoModelForCausalLM.from_pretrained(
        exported, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=True, **TRUST
    )
    assert not info["missing_keys"]
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert isinstance(model, GuardedModel)


def test_a_loaded_model_is_copied_pickled_and_saved_as_any_guarded_one(exported, expected, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(exported, **TRUST)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.generate(PROMPT, **SHORT), expected)
    model.save_pretrained(tmp_path / "saved")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is LlamaForCausalLM
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_an_export_of_a_loaded_export_is_the_same(exported, expected, tmp_path):
    again = export_guarded(AutoModelForCausalLM.from_pretrained(exported, **TRUST), tmp_path / "again")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again, **TRUST).generate(PROMPT, **SHORT), expected)


@pytest.mark.parametrize("name", ["head", "target", "guarded.py", "tokenizer.json"])
def test_a_repository_with_a_part_missing_does_not_load(exported, name):
    (exported / name).rename(exported.parent / name)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(exported, **TRUST)


def test_another_targets_weights_are_refused(exported):
    build_model(num_hidden_layers=3).save_pretrained(exported / "target")
    with pytest.raises(HeadMismatchError, match="num_layers"):
        AutoModelForCausalLM.from_pretrained(exported, **TRUST)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": 2, "version": "9.1"}, r"written by safespec-hf 9\.1"),
        ({"head": {}}, "damaged"),
        ({"policy": {"unknown": 1}}, "damaged"),
    ],
)
def test_a_manifest_that_this_version_can_not_read_is_refused(exported, entries, message):
    edit(exported, **entries)
    with pytest.raises(HeadFileError, match=message):
        AutoModelForCausalLM.from_pretrained(exported, **TRUST)


@pytest.mark.parametrize("entry", [{"risk_threshold": 1.0}, {"policy": "observe"}, False])
def test_a_generation_config_does_not_loosen_the_guard(exported, entry):
    # a client of `transformers serve` may send one
    model = AutoModelForCausalLM.from_pretrained(exported, **TRUST)
    with pytest.raises(UnsupportedRequestError):
        model.generate(PROMPT, generation_config=GenerationConfig(**SHORT, safespec=entry))


def test_a_policy_that_only_observes_is_refused(exported):
    edit(exported, policy={"policy": "observe"})
    with pytest.raises(UnsupportedRequestError, match="guards nothing"):
        AutoModelForCausalLM.from_pretrained(exported, **TRUST)


def test_without_our_package_both_doors_raise(exported):
    code = """
import sys
sys.modules["safespec_hf"] = None
from transformers import AutoModelForCausalLM
import torch
for load in (
    lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True),
    lambda: AutoModelForCausalLM.from_pretrained(sys.argv[1], subfolder="target").generate(
        torch.tensor([[12]]), custom_generate=sys.argv[1], trust_remote_code=True),
):
    try:
        load()
    except ImportError as error:
        assert "safespec" in str(error), error
    else:
        sys.exit("it loaded")
"""
    done = subprocess.run([sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_custom_generate_guards_any_model_whose_head_it_is(exported, expected):
    model = build_model()
    arguments = {"custom_generate": str(exported), **TRUST}
    for _ in range(2):
        assert torch.equal(model.generate(PROMPT, **SHORT, **arguments), expected)
    assert torch.equal(model.generate(PROMPT, **SHORT), build_model().generate(PROMPT, **SHORT))
    assert torch.equal(model.generate(PROMPT, generation_config=GenerationConfig(**SHORT), **arguments), expected)
    assert detach_safety_head(model) is model


def test_custom_generate_takes_another_policy_as_well_the_second_time(exported):
    model, refusing = build_model(), SafeSpecConfig(policy="refuse", refusal="no thanks")
    for _ in range(2):
        output = model.generate(
            PROMPT, **SHORT, custom_generate=str(exported), **TRUST, safespec=refusing, return_dict_in_generate=True
        )
        assert output.finish_reasons == ["safety_refusal"]


def test_custom_generate_refuses_a_model_that_the_head_is_not_for(exported):
    model = build_model(num_hidden_layers=3)
    with pytest.raises(HeadMismatchError, match="num_layers"):
        model.generate(PROMPT, **SHORT, custom_generate=str(exported), **TRUST)
    assert not isinstance(model, GuardedModel)


def test_custom_generate_refuses_a_model_that_has_another_head(exported, chat_tokenizer):
    model = attach(build_model(), chat_tokenizer)
    with pytest.raises(UnsupportedRequestError, match="has one from elsewhere"):
        model.generate(PROMPT, **SHORT, custom_generate=str(exported), **TRUST)


def test_custom_generate_without_safety_contradicts_itself(exported):
    with pytest.raises(UnsupportedRequestError, match="contradicts"):
        build_model().generate(PROMPT, **SHORT, custom_generate=str(exported), **TRUST, safespec=False)


def test_the_repository_is_read_from_a_variable_that_transformers_has():
    # `custom_generate` names it in no other way; if this fails, `_asked_repository` has to look elsewhere
    code = loading._generate_code()
    assert code.co_name == "generate"
    assert code.co_filename.endswith(str(Path("transformers", "generation", "utils.py")))
    assert "custom_generate" in code.co_varnames
    assert GenerationMixin.generate is not None


def test_streams_and_pipelines_are_guarded(exported, expected, chat_tokenizer, capsys):
    chat = pipeline("text-generation", str(exported), **TRUST)
    words = chat_tokenizer.decode(PROMPT[0])
    answer = chat(words, **SHORT, return_full_text=False)[0]["generated_text"]
    assert answer.split() == chat_tokenizer.decode(expected[0, PROMPT.shape[1] :], skip_special_tokens=True).split()
    chat.model.generate(PROMPT, **SHORT, streamer=TextStreamer(chat_tokenizer))
    assert capsys.readouterr().out.split() == chat_tokenizer.decode(expected[0]).split()


def test_the_attached_draft_gives_way_to_others(exported):
    model = AutoModelForCausalLM.from_pretrained(exported, **TRUST)
    output = model.generate(PROMPT, **SHORT, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    assert output.statistics.num_draft_forwards == 0
    output = model.generate(PROMPT, **SHORT, return_dict_in_generate=True)
    assert output.statistics.num_draft_forwards > 0


def test_a_policy_in_the_generation_config_is_exported_as_the_policy(target, chat_tokenizer, tmp_path):
    model = attach(target, chat_tokenizer, build_noisy_head(target, tokenizer=chat_tokenizer))
    model.generation_config.safespec = SafeSpecConfig(policy="refuse", refusal="no thanks")
    loaded = AutoModelForCausalLM.from_pretrained(export_guarded(model, tmp_path), **TRUST)
    assert loaded.safety.policy == model.generation_config.safespec
    assert loaded.generate(PROMPT, **SHORT, return_dict_in_generate=True).finish_reasons == ["safety_refusal"]


def test_a_draft_model_is_exported_and_loaded_too(target, draft, chat_tokenizer, tmp_path):
    model = attach(target, chat_tokenizer, build_head(target, tokenizer=chat_tokenizer), policy=POLICY)
    folder = export_guarded(model, tmp_path, draft=draft)
    output = AutoModelForCausalLM.from_pretrained(folder, **TRUST).generate(
        PROMPT, **SHORT, return_dict_in_generate=True
    )
    assert output.statistics.num_draft_forwards > 0
    assert torch.equal(output.sequences, build_model().generate(PROMPT, **SHORT))
