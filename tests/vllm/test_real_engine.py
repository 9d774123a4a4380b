"""The guard in a real engine, with a tiny target. `make test-vllm` runs this where vLLM is installed."""

import math

import pytest
import tiny
import torch

pytest.importorskip("vllm.v1")  # this folder is named `vllm`, and so can be imported by that name

from vllm import LLM, SamplingParams

from safespec_hf import HeadMismatchError, SafeSpecConfig, SafeSpecError, UnsupportedRequestError
from safespec_hf.answer.pooling import pool_block
from safespec_hf.outputs import Provenance
from safespec_hf.vllm.controller import GuardedLLM
from safespec_hf.vllm.runner import check_version, expand_batch_to_tokens
from safespec_hf.vllm.spec import ARGUMENT, GuardOrder

GREEDY = {"temperature": 0.0, "max_tokens": 24}
POLICY = {"reflection": "pause think", "refusal": "no thanks", "max_segment_tokens": 6, "num_candidates": 3, "seed": 0}
POLICY |= {"screen_prompts": False}
OPTIONS = {"dtype": "float32", "max_num_seqs": 8, "block_size": 32, "enforce_eager": True, "max_model_len": 128}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A target that vLLM's kernels can read, with a head that flags now and then."""
    folder = tmp_path_factory.mktemp("engine")
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "eos_token_id": 2}
    model, tokenizer = tiny.build_model(**sizes), tiny.build_tokenizer()
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    config = {"pooling": "mean+ewma", "span": "answer", "hidden_layers": [1, 2]}
    noisy = tiny.build_noisy_head(model, 0.9, tokenizer=tokenizer, **config)
    limits = {"threshold": noisy.config.risk_threshold, "prompt_threshold": 0.5}
    head = tiny.build_head(model, tokenizer=tokenizer, **limits, **config)
    head.mlp.load_state_dict(noisy.mlp.state_dict())
    torch.nn.init.normal_(head.prompt_probe.weight, std=0.1)
    head.save_pretrained(folder / "head")
    return model, head, folder


@pytest.fixture(scope="module")
def llm(parts):
    folder = parts[2]
    return GuardedLLM(folder / "target", folder / "head", policy=SafeSpecConfig(**POLICY), **OPTIONS)


@pytest.fixture(scope="module")
def in_pieces(parts, llm):
    """One that reads prompts in pieces. It lives as long as the other: where an engine ends, all of a process end."""
    folder, options = parts[2], OPTIONS | {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
    return GuardedLLM(folder / "target", folder / "head", policy=SafeSpecConfig(**POLICY), **options)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(10, 39, (12, 7), generator=torch.Generator().manual_seed(9)).tolist()


def answer(llm, prompts, params=GREEDY, **policy):
    chosen = SafeSpecConfig(**POLICY | policy) if policy else None
    return llm.generate(prompts, params, safespec=chosen, use_tqdm=False)


def test_a_silent_head_changes_no_token_and_risks_are_our_own(parts, llm, prompts):
    model, head, _ = parts
    for prompt, output in zip(prompts, answer(llm, prompts, risk_threshold=1.0), strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, suppress_tokens=[3], pad_token_id=0
        )[0, 7:]
        assert output.token_ids == expected.tolist()
        with torch.no_grad():
            states = model(torch.tensor([prompt + output.token_ids]), output_hidden_states=True).hidden_states
            # of the last layer, the head reads the normed state
            hidden = torch.cat([states[layer][0, 7:] for layer in (1, 2)], dim=-1)
            own = head.risk(pool_block(None, hidden, range(len(output.token_ids)), "mean+ewma", 0.9)).tolist()
        differences = [abs(a - b) for a, b in zip(output.risks, own, strict=True) if not math.isnan(a)]
        assert len(differences) >= len(own) - 1
        assert max(differences, default=0) < 1e-4


@pytest.mark.parametrize("engine", ["llm", "in_pieces"])
def test_unsafe_prompts_are_flagged_and_a_dismissed_flag_changes_nothing(parts, prompts, engine, request):
    model, head, _ = parts
    llm = request.getfixturevalue(engine)
    policy = {"risk_threshold": 1.0, "false_alarm_margin": 0.0}
    outputs = answer(llm, prompts, screen_prompts=True, **policy)
    with torch.no_grad():
        hidden = model(torch.tensor(prompts), output_hidden_states=True).hidden_states
        risks = head.prompt_risk(torch.cat([hidden[layer][:, -1] for layer in (1, 2)], dim=-1)).tolist()
    flagged = [risk >= 0.5 for risk in risks]
    assert 2 <= sum(flagged) <= 10
    assert [bool(output.events) for output in outputs] == flagged
    for output, risk in zip(outputs, risks, strict=True):
        assert all((event.outcome, event.is_prompt) == ("dismissed", True) for event in output.events)
        assert all(event.risk == pytest.approx(risk, abs=1e-4) for event in output.events)
    silent = answer(llm, prompts, **policy)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in silent]
    refused = answer(llm, prompts, screen_prompts=True, policy="refuse", risk_threshold=1.0)
    assert [output.finish_reason == "safety_refusal" for output in refused] == flagged
    assert [output.token_ids for output, is_flagged in zip(refused, flagged, strict=True) if not is_flagged] == [
        output.token_ids for output, is_flagged in zip(silent, flagged, strict=True) if not is_flagged
    ]


def test_nothing_flagged_is_in_an_answer_and_nothing_is_left(parts, llm, prompts):
    threshold = parts[1].config.risk_threshold
    outputs = answer(llm, prompts)
    assert any(event.outcome == "recovered" for output in outputs for event in output.events)
    assert all(not risk >= threshold for output in outputs for risk in output.risks)
    assert all(output.failure is None for output in outputs)
    (report,) = llm.report()
    assert report["num_entries"] == report["num_running"] == 0


def test_candidates_are_as_likely_as_our_own_forward_says(parts, llm):
    """Without the reflection, and wherever the prefix cache ends: before a candidate, right there, or in it."""
    generator = torch.Generator().manual_seed(5)
    long = [torch.randint(10, 39, (length,), generator=generator).tolist() for length in [*range(22, 46)] * 3]
    num_checked, num_cached = 0, 0
    for output in answer(llm, long, max_recoveries=10, num_candidates=6, reflection_scope="recovery"):
        events = output.events
        assert not any(math.isnan(log_prob) for event in events for log_prob in event.candidate_log_probs)
        if not events or events[-1].outcome != "recovered":
            continue
        event, start = events[-1], len(output.prompt_token_ids) + events[-1].rolled_back_to
        origins = [*output.provenance[event.rolled_back_to :], Provenance.TARGET]
        num = next(index for index, origin in enumerate(origins) if origin is not Provenance.RECOVERED)
        tokens = torch.tensor([*output.prompt_token_ids, *output.token_ids])
        with torch.no_grad():
            log_probs = parts[0](tokens[None, : start + num]).logits[0].log_softmax(-1)
        own = log_probs[start - 1 : -1].gather(1, tokens[start : start + num, None]).mean()
        assert event.candidate_log_probs[event.chosen] == pytest.approx(float(own), abs=1e-4)
        num_checked, num_cached = num_checked + 1, num_cached + (start >= 32)
    assert num_checked >= 5
    assert num_cached >= 3


def test_prompts_read_in_pieces_draw_what_they_draw_when_read_at_once(llm, in_pieces):
    generator = torch.Generator().manual_seed(6)
    long = torch.randint(10, 39, (6, 60), generator=generator).tolist()
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in range(6)]
    whole = answer(llm, long, params, risk_threshold=1.0)
    found = answer(in_pieces, long, params, risk_threshold=1.0)
    assert [output.token_ids for output in found] == [output.token_ids for output in whole]
    # candidates have seeds, too, and read what comes before them
    known = torch.tensor([risk for output in found for risk in output.risks])
    recovered = answer(in_pieces, long, params, risk_threshold=float(known.nanquantile(0.9)))
    assert any(output.statistics.num_candidates for output in recovered)
    assert all(output.failure is None for output in recovered)


def test_each_prompt_may_have_its_own_policy(llm, prompts):
    policies = [SafeSpecConfig(**POLICY, risk_threshold=1.0), SafeSpecConfig(policy="stop", risk_threshold=1e-6)]
    free, stopped = llm.generate(prompts[:2], GREEDY, safespec=policies, use_tqdm=False)
    assert (free.events, stopped.finish_reason, stopped.text) == ([], "safety_stop", "")


@pytest.mark.parametrize("order", [None, "none", "forged"])
def test_a_request_that_passes_by_the_guard_gets_nothing_but_the_reserved_token(llm, prompts, order):
    forged = GuardOrder(key="x", group="x", secret="guessed", start=7, threshold=None).to_text()
    arguments = {"none": {ARGUMENT: "none"}, "forged": {ARGUMENT: forged}}.get(order)
    params = SamplingParams(temperature=1.0, max_tokens=6, extra_args=arguments)
    (output,) = LLM.generate(llm, [{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
    assert set(output.outputs[0].token_ids) == {llm.guard.reserved_id}


def test_what_cant_be_guarded_is_refused_and_nothing_stays(llm, prompts):
    with pytest.raises(UnsupportedRequestError, match="min_tokens"):
        answer(llm, prompts, SamplingParams(min_tokens=3))
    assert llm.report()[0]["num_entries"] == 0


@pytest.mark.parametrize(
    "params",
    [
        {"temperatur": 0.0},
        {"ignore_eos": True},
        {"max_tokens": 0},
        {"logit_bias": {1000: 1.0}},
        {"stop_token_ids": [-1]},
        {"temperature": 3.0},
        SamplingParams(trace_decode_token_ids=[4]),
        SamplingParams(extra_args={"safespec": "{}"}),
        SamplingParams(repetition_penalty=1e-46),
        SamplingParams(n=2),
    ],
    ids=lambda one: str(one)[:40],
)
def test_so_is_what_is_wrong_with_the_last_of_several_prompts(llm, prompts, params, monkeypatch):
    monkeypatch.setattr(llm.llm_engine, "step", lambda: pytest.fail("a step was made"))
    with pytest.raises(
        ValueError, match=r"temperatur|ignore_eos|max_tokens|logit_bias|stop_token|trace|extra|repet|n=2"
    ):
        answer(llm, prompts[:2], [SamplingParams(max_tokens=4), params])
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(
    "prompt", [[], {"prompt": "w10"}, {"prompt_token_ids": [10], "multi_modal_data": {}}], ids=str
)
def test_prompts_of_another_kind_are_refused(llm, prompt):
    with pytest.raises(UnsupportedRequestError, match="prompt"):
        answer(llm, [prompt])


@pytest.mark.parametrize("name", ["beam_search", "encode", "embed", "enqueue", "update_weights"])
def test_no_other_method_gives_anything(llm, name):
    with pytest.raises(UnsupportedRequestError, match="`generate` and `chat`"):
        getattr(llm, name)(["w10"])


def test_an_interrupted_call_leaves_nothing_in_the_engine(llm, prompts, monkeypatch):
    steps, step = iter(range(3)), llm.llm_engine.step

    def interrupt():
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.llm_engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        answer(llm, prompts)
    monkeypatch.undo()
    assert not llm.llm_engine.has_unfinished_requests()
    assert llm.report()[0]["num_entries"] == llm.report()[0]["num_running"] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pipeline_parallel_size", 2),
        ("async_scheduling", True),
        ("enable_lora", True),
        ("worker_cls", "other.Worker"),
        ("logits_processors", ["other:Processor"]),
    ],
)
def test_engines_that_cant_be_guarded_do_not_start(parts, option, value):
    folder = parts[2]
    with pytest.raises(UnsupportedRequestError, match=option):
        GuardedLLM(folder / "target", folder / "head", **OPTIONS, **{option: value})


def test_a_head_of_another_target_does_not_start(parts, tmp_path):
    other = tiny.build_model()
    tiny.build_head(other, tokenizer=tiny.build_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(HeadMismatchError, match="hidden_size"):
        GuardedLLM(parts[2] / "target", tmp_path, **OPTIONS)


def test_a_version_that_nobody_looked_into_does_not_start():
    check_version()
    with pytest.raises(SafeSpecError, match=r"0\.99\.0"):
        check_version("0.99.0+cpu")


def test_each_draft_gets_the_value_of_its_request():
    x, ends = torch.tensor([0.0, 0.7, 0.2]), torch.tensor([2, 2, 5])
    assert torch.allclose(expand_batch_to_tokens(x, ends, 5, 0, 1), torch.tensor([1.0, 1.0, 0.2, 0.2, 0.2]))
