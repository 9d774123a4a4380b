"""Where models live: offloaded, recast, quantized, tuned, wrapped, in several threads and processes."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from tiny import build_draft_head, build_head, build_model, build_noisy_head, perturb
from transformers import AutoModelForCausalLM

from safespec_hf import GuardedModel, SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding import adapters, proof

PROMPT = torch.tensor([[12, 18, 24, 13]])
GREEDY = {"max_new_tokens": 12, "do_sample": False}
POLICY = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no thanks")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("FutureWarning", "DeprecationWarning")]
# older releases of transformers take the place of offloaded weights for that of the inputs
pytestmark += [pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device")]


@pytest.fixture(autouse=True)
def _unproven(monkeypatch):
    monkeypatch.setattr(proof, "_proven", {})


def attach(model, tokenizer):
    return attach_safety_head(model, build_head(build_model()), tokenizer=tokenizer)


def agrees(model, draft=None):
    expected = model.generate(PROMPT, **GREEDY)
    return torch.equal(model.generate(PROMPT, **GREEDY, assistant_model=draft, safespec=True), expected)


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(adapters.logger, "warning_once", said.append)
    return said


class Forgetful(torch.nn.Module):
    """An attention layer that shifts what it gives wherever a cache is in use."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        states, *rest = self.layer(*args, **kwargs)
        has_cache = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        return (states + 9 * has_cache, *rest)


def test_an_offloaded_model_is_proven_like_any_other(tokenizer):
    model = build_model()
    model.model.layers[0].self_attn = Forgetful(model.model.layers[0].self_attn)
    with pytest.raises(UnsupportedRequestError, match="differ from those of the tokens alone"):
        attach(cpu_offload(model), tokenizer)


def test_a_model_without_weights_is_refused_until_it_has_them(tokenizer, never):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_model().config)
    attach(model, tokenizer)
    with pytest.raises(UnsupportedRequestError, match="`meta` device"):
        model.generate(PROMPT, **GREEDY, safespec=True)
    model.to_empty(device="cpu")
    model.load_state_dict(build_model().state_dict())
    model.model.rotary_emb = build_model().model.rotary_emb
    assert agrees(model.eval())
    assert proof._proven


def test_what_is_loaded_after_a_head_was_attached_is_proven_before_the_first_call(tokenizer):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_model().config)
    attach(model, tokenizer)
    whole = build_model()
    whole.model.layers[0].self_attn = Forgetful(whole.model.layers[0].self_attn)
    model.model = whole.model
    model.lm_head = whole.lm_head
    with pytest.raises(UnsupportedRequestError, match="differ from those of the tokens alone"):
        model.generate(PROMPT, **GREEDY, safespec=True)


@pytest.mark.parametrize("recast", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("has_draft", [False, True])
def test_a_model_may_be_recast_after_its_head_was_attached(recast, has_draft, tokenizer):
    model = attach(build_model(), tokenizer).to(recast)
    draft = perturb(build_model()).to(torch.float32) if has_draft else None
    assert agrees(model, draft)
    assert len(proof._proven) >= 2


def test_a_model_that_was_used_is_copied(tokenizer):
    model = attach(build_model(), tokenizer)
    assert agrees(model)
    assert agrees(copy.deepcopy(model), perturb(build_model()))


def test_threads_with_and_without_the_guard_do_not_hear_each_other(tokenizer):
    model = build_model()
    plain = model.generate(PROMPT, **GREEDY)
    attach_safety_head(model, build_noisy_head(model, 0.8), tokenizer=tokenizer)
    drafts = (None, perturb(model), build_draft_head(model))

    def answer(number):
        if number % 2:
            return model.generate(PROMPT, **GREEDY)
        return model.generate(PROMPT, **GREEDY, assistant_model=drafts[number // 2 % 3], safespec=POLICY)

    alone = [answer(number) for number in range(6)]
    assert not torch.equal(alone[0], plain)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(answer, range(18))
        assert all(torch.equal(each, alone[number % 6]) for number, each in enumerate(found))


def test_a_data_parallel_wrapper_says_where_the_head_goes(target, never):
    with pytest.raises(TypeError, match=r"model\.module"):
        attach_safety_head(torch.nn.DataParallel(target), never)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_torchao_are_guarded(bits, tokenizer):
    quantization = pytest.importorskip("torchao.quantization")
    configs = {
        8: lambda: quantization.Int8WeightOnlyConfig(),
        4: lambda: quantization.IntxWeightOnlyConfig(torch.int4),
    }
    model = build_model()
    quantization.quantize_(model, configs[bits]())
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    attach(model, tokenizer)
    assert agrees(model)
    assert agrees(model, perturb(build_model()))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes_are_guarded(bits, tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    build_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    attach_safety_head(model, build_head(build_model(hidden_size=64, intermediate_size=128)), tokenizer=tokenizer)
    assert agrees(model)
    assert agrees(model, perturb(build_model()))


def lora(model, seed=0, **names):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"], r=4)
    return peft.get_peft_model(model, config, **names).eval()


def guarded_call(model):
    return model.generate(input_ids=PROMPT, **GREEDY, safespec=True)


def test_an_unchanged_model_says_nothing(guarded, warnings):
    guarded_call(guarded)
    with lora(guarded).disable_adapter():
        guarded_call(guarded)
        guarded.half()
        guarded_call(guarded)
    assert warnings == []


CHANGES = {
    "an adapter": lambda wrapped: wrapped,
    "a merged one": lambda wrapped: wrapped.merge_adapter() or wrapped,
    "an unloaded one": lambda wrapped: wrapped.merge_and_unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_than_the_head_was_calibrated_on_is_told(change, guarded, warnings):
    guarded_call(CHANGES[change](lora(guarded)))
    assert len(warnings) == 1
    assert "another model" in warnings[0]


def test_an_adapter_that_was_there_when_the_head_was_attached_is_missed_when_it_is_off(
    target, never, tokenizer, warnings
):
    wrapped = lora(target)
    attach_safety_head(target, never, tokenizer=tokenizer)
    guarded_call(wrapped)
    assert warnings == []
    with wrapped.disable_adapter():
        guarded_call(wrapped)
    assert "['default'] and are none" in warnings[0]


LAUNCHERS = {
    "sharing_processes.py": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # `--cpu` starts one process only, where there is no MPI; this one asks for no GPU either
    "launched_processes.py": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")
@pytest.mark.parametrize("script", LAUNCHERS)
def test_processes_that_share_a_model_or_have_one_each_are_guarded(script, target, tmp_path):
    target.save_pretrained(tmp_path)
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(Path(sys.modules["safespec_hf"].__file__).parents[1]), *sys.path])
    run = [sys.executable, "-m", *LAUNCHERS[script]]
    run += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"] * ("accelerate" in run[2])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*run, str(tests / script), str(tmp_path)], env=environment, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]


def test_a_guarded_model_is_one_wherever_it_lives(tokenizer):
    assert isinstance(attach(cpu_offload(build_model()), tokenizer), GuardedModel)
