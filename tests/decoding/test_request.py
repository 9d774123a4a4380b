"""What can't be guarded is refused before the first forward, and the error says why."""

import pytest
import torch
from tiny import build_head, build_model, is_before, perturb
from transformers import (
    CompileConfig,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
)

from safespec_hf import Provenance, SafeSpecConfig, UnsupportedRequestError, attach_safety_head
from safespec_hf.decoding.request import make_rows, row_processors
from safespec_hf.engine.cache import CACHE_NAME

PROMPT = torch.tensor([[11, 17, 23]])
SHORT = {"max_new_tokens": 8, "do_sample": False}


REFUSED = {
    "num_beams": ({"num_beams": 2}, "beam"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
    "offloaded static cache": (
        {"cache_implementation": "offloaded_static"},
        "cache_implementation='offloaded_static'",
    ),
    "paged cache": ({"cache_implementation": "paged"}, "paged"),
    "4-d mask": ({"attention_mask": torch.ones(1, 1, 3, 3)}, "must be 2D"),
    "longer mask": ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "must have the shape of `input_ids`"),
    "longer mask of ones": ({"attention_mask": torch.ones(1, 4)}, "attention_mask|position_ids"),
    "empty prompt": ({"attention_mask": torch.tensor([[0, 0, 0]])}, "padding"),
    "custom_generate": ({"custom_generate": lambda *_, **__: None}, "custom_generate"),
    "custom_generate repository": ({"custom_generate": "org/name"}, "custom_generate"),
    "assistant_tokenizer": ({"assistant_tokenizer": object()}, "assistant_tokenizer"),
    "synced_gpus": ({"synced_gpus": True}, "synced_gpus"),
    "prefill_chunk_size": ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
    "assistant_early_exit": ({"assistant_early_exit": 2}, "assistant_early_exit"),
    "guidance_scale": ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidance"),
    "stateful watermark": (
        {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3])},
        "SynthIDTextWatermark",
    ),
    "unknown model argument": ({"token_type_ids": torch.zeros(1, 3)}, "token_type_ids"),
    "offloaded user cache": ({CACHE_NAME: "offloaded"}, "must be a `DynamicCache`"),
    "cache that is too long": ({CACHE_NAME: "long"}, "each longer than the cache"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("always_on", [False, True])
def test_what_cannot_be_guarded_is_refused_before_the_first_forward(target, never, tokenizer, name, always_on):
    arguments, message = dict(REFUSED[name][0]), REFUSED[name][1]
    if arguments.get(CACHE_NAME) == "offloaded":
        arguments[CACHE_NAME] = StaticCache(config=target.config, max_cache_len=16, offloading=True)
    elif arguments.get(CACHE_NAME) == "long":
        arguments[CACHE_NAME] = target(PROMPT, use_cache=True)[CACHE_NAME]
    model = attach_safety_head(target, never, tokenizer=tokenizer, always=always_on)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, **SHORT, **arguments, **({} if always_on else {"safespec": True}))


@pytest.mark.parametrize("more", [{}, {"inputs_embeds": torch.zeros(0, 3, 32)}])
def test_a_batch_without_rows_is_refused(guarded, more):
    guarded.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    prompts = {"inputs": torch.zeros(0, 3, dtype=torch.long)} if not more else {}
    with pytest.raises(UnsupportedRequestError, match="no rows"):
        guarded.generate(**prompts, **more, **SHORT, safespec=True)


def test_a_draft_of_another_vocabulary_is_refused(guarded):
    draft = build_model(vocab_size=30)
    with pytest.raises(UnsupportedRequestError, match="30 entries and the target's 40, with 40"):
        guarded.generate(PROMPT, **SHORT, assistant_model=draft, safespec=True)


@pytest.mark.parametrize("draft_size", [41, 64])
def test_a_draft_whose_vocabulary_is_padded_drafts_and_recovers(flagging, draft_size):
    draft = build_model(vocab_size=draft_size)
    policy = SafeSpecConfig(num_candidates=16, reflection="pause think", refusal="no thanks")
    arguments = {"max_new_tokens": 40, "do_sample": False, "assistant_model": draft, "return_dict_in_generate": True}
    output = flagging.generate(PROMPT, **arguments, safespec=policy)
    assert any(event.candidate_risks for event in output.events[0])
    assert int(output.sequences.max()) < 40


def test_a_streamer_takes_one_row_only(guarded, tokenizer):
    with pytest.raises(ValueError, match=r"(?i)streamer"):
        guarded.generate(PROMPT.expand(2, -1), **SHORT, streamer=TextStreamer(tokenizer), safespec=True)


def test_a_batch_needs_a_pad_token(guarded):
    guarded.generation_config.pad_token_id = None
    with pytest.raises(UnsupportedRequestError, match="set `pad_token_id`"):
        guarded.generate(PROMPT.expand(2, -1), **SHORT, safespec=True)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_prefix_functions_are_told_the_number_of_their_row(guarded, num_rows):
    rows = []
    guarded.generate(
        PROMPT.expand(num_rows, -1),
        **SHORT,
        prefix_allowed_tokens_fn=lambda row, ids: rows.append(row) or [20 + row],
        safespec=True,
    )
    assert set(rows) == set(range(num_rows))


PADDED = torch.tensor([[0, 0, 11, 17], [0, 12, 13, 14], [21, 22, 23, 24]])
OF_THE_BATCH = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words": {"bad_words_ids": [[27], [21, 23], [13, 14], [24]]},
    "sequence_bias": {"sequence_bias": [[[11], 4.0], [[12, 13], -3.0]]},
    "min_new_tokens": {"min_new_tokens": 9, "eos_token_id": [27, 36, 24]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [6, 27, 33]},
    "forced_eos": {"forced_eos_token_id": 39},
    "length_penalty": {"exponential_decay_length_penalty": (4, 1.5), "eos_token_id": 27},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=6.0)},
    "prefix_function": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(10 + row + len(ids) % 3, 40, 2))},
    "own": {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=4)])},
}


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_processors_work_in_a_padded_batch_as_in_plain_generate(guarded, name, with_draft):
    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 14, "do_sample": False}
    free = guarded.generate(PADDED, **arguments)
    expected = guarded.generate(PADDED, **arguments, **OF_THE_BATCH[name])
    assert expected.tolist() != free.tolist()  # or else the processor does nothing here
    draft = {"assistant_model": perturb(build_model())} if with_draft else {}
    answers = guarded.generate(PADDED, **arguments, **OF_THE_BATCH[name], **draft, safespec=True)
    assert answers.tolist() == expected.tolist()


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_processors_hold_for_any_number_of_candidates_of_a_row(flagging, name):
    policy = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no thanks")
    arguments = {"attention_mask": (PADDED != 0).long(), "max_new_tokens": 14, "do_sample": False}
    arguments |= {**OF_THE_BATCH[name], "safespec": policy, "return_dict_in_generate": True}
    events = flagging.generate(PADDED, **arguments).events
    assert any(len(event.candidate_risks) == 3 for row in events for event in row)


@pytest.mark.parametrize("num_candidates", [1, 3])
@pytest.mark.parametrize("row", range(3))
def test_each_row_gets_its_own_part_of_a_processor(row, num_candidates):
    scores = torch.randn(3, 40)
    # older releases know one length for all rows only
    ignored = 2 if is_before("5.23") else torch.tensor([2, 1, 0])
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=ignored),
            EncoderRepetitionPenaltyLogitsProcessor(2.0, PADDED),
            EncoderNoRepeatNGramLogitsProcessor(2, PADDED),
        ]
    )
    expected = processors(PADDED, scores)[row].expand(num_candidates, -1)
    ids, own = PADDED[row].expand(num_candidates, -1), row_processors(processors, row, 3)
    assert torch.equal(own(ids, scores[row].expand(num_candidates, -1)), expected)


@pytest.mark.parametrize("most", [3e9, float("inf"), int(1e30), torch.tensor(700), 700.0, 699.5])
def test_rows_grow_with_their_answers_up_to_any_length_that_plain_generate_takes(most):
    fields = {"policy": SafeSpecConfig(), "newline_ids": frozenset(), "processors": LogitsProcessorList()}
    (row,) = make_rows(PROMPT, torch.ones_like(PROMPT).bool(), max_length=most + 3, **fields)
    for token in range(600):
        row.append(token, Provenance.TARGET)
    assert row.visible_ids().tolist() == [[*PROMPT[0].tolist(), *range(600)]]
    assert row.room == 100 or (row.room > 10**9 and float(most) > 10**9)


@pytest.mark.parametrize("most", [int(3e9), int(1e30)])
def test_an_answer_with_no_limit_worth_the_name_ends_at_its_end_token(guarded, most):
    arguments = {"do_sample": False, "eos_token_id": int(guarded.generate(PROMPT, **SHORT)[0, 7])}
    expected = guarded.generate(PROMPT, max_new_tokens=64, **arguments)
    assert guarded.generate(PROMPT, max_new_tokens=most, **arguments, safespec=True).tolist() == expected.tolist()


@pytest.mark.parametrize("source", ["draft", "target"])
def test_candidates_from_a_draft_need_a_draft(guarded, source):
    policy = SafeSpecConfig(candidate_source=source)
    if source == "target":
        assert guarded.generate(PROMPT, **SHORT, safespec=policy).shape == (1, 11)
        return
    with pytest.raises(UnsupportedRequestError, match="candidate_source"):
        guarded.generate(PROMPT, **SHORT, safespec=policy)


def test_a_setting_that_would_change_what_is_accepted_is_refused(guarded):
    draft = build_model(seed=1)
    with pytest.raises(UnsupportedRequestError, match="assistant_ensemble_weight"):
        guarded.generate(PROMPT, **SHORT, assistant_model=draft, assistant_ensemble_weight=0.5, safespec=True)


def test_gpt2_never_reads_beyond_its_positions(tokenizer):
    model = build_model("gpt2", n_positions=32)
    attach_safety_head(model, build_head(model, 1e-9), tokenizer=tokenizer)  # flags everything
    policy = SafeSpecConfig(risk_threshold=1e-9, max_recoveries=2, reflection="pause think " * 20, refusal="no thanks")
    output = model.generate(PROMPT, max_new_tokens=29, do_sample=False, safespec=policy, return_dict_in_generate=True)
    assert output.finish_reasons == ["safety_refusal"]


# Every field of a generation config. "same": the answer is plain `generate`'s, since it is honoured or since it means
# nothing without beams, a static cache, an encoder or another tokenizer. "refused": by name.
FIELDS = {
    "max_length": ("same", 9),
    "max_new_tokens": ("same", 5),
    "min_length": ("same", 9),
    "min_new_tokens": ("same", 5),
    "early_stopping": ("same", True),
    "max_time": ("same", 1000.0),
    "stop_strings": ("same", ["w20"]),
    "do_sample": ("same", False),
    "num_beams": ("refused", 2),
    "use_mtp": ("refused", True),
    "use_cache": ("same", False),
    "cache_implementation": ("same", "static"),
    "cache_config": ("same", {"nbits": 4}),
    "max_cache_len": ("same", 64),
    "temperature": ("same", 0.5),
    "top_k": ("same", 3),
    "top_p": ("same", 0.5),
    "min_p": ("same", 0.1),
    "top_h": ("same", 0.5),
    "typical_p": ("same", 0.5),
    "epsilon_cutoff": ("same", 0.01),
    "eta_cutoff": ("same", 0.01),
    "repetition_penalty": ("same", 3.0),
    "encoder_repetition_penalty": ("same", 3.0),
    "length_penalty": ("same", 2.0),
    "no_repeat_ngram_size": ("same", 2),
    "bad_words_ids": ("same", [[20], [21, 22]]),
    "renormalize_logits": ("same", True),
    "forced_bos_token_id": ("same", 12),
    "forced_eos_token_id": ("same", 2),
    "remove_invalid_values": ("same", True),
    "exponential_decay_length_penalty": ("same", (2, 1.5)),
    "suppress_tokens": ("same", [20, 21]),
    "begin_suppress_tokens": ("same", [20, 21]),
    "sequence_bias": ("same", [[[20], 5.0]]),
    "token_healing": ("refused", True),
    "guidance_scale": ("refused", 2.0),
    "watermarking_config": ("same", {"greenlist_ratio": 0.5, "bias": 4.0}),
    "num_return_sequences": ("same", 1),
    "output_attentions": ("same", True),
    "output_hidden_states": ("same", True),
    "output_scores": ("same", True),
    "output_logits": ("same", True),
    "return_dict_in_generate": ("same", False),
    "pad_token_id": ("same", 0),
    "bos_token_id": ("same", 1),
    "eos_token_id": ("same", 20),
    "encoder_no_repeat_ngram_size": ("same", 2),
    "decoder_start_token_id": ("same", 1),
    "is_assistant": ("refused", True),
    "num_assistant_tokens": ("same", 3),
    "num_assistant_tokens_schedule": ("same", "heuristic"),
    "assistant_confidence_threshold": ("same", 0.9),
    "prompt_lookup_num_tokens": ("same", 3),
    "max_matching_ngram_size": ("same", 3),
    "assistant_early_exit": ("same", 1),
    "assistant_lookbehind": ("same", 3),
    "target_lookbehind": ("same", 3),
    "assistant_ensemble_weight": ("refused", 0.5),
    "speculation_type": ("refused", "dflash"),
    "compile_config": ("same", CompileConfig()),
    "disable_compile": ("same", True),
    "continuous_batching_config": ("same", None),
    "low_memory": ("same", True),
    "penalty_alpha": ("refused", 0.6),
    "dola_layers": ("refused", "low"),
    "diversity_penalty": ("same", 0.5),
    "num_beam_groups": ("same", 2),
    "constraints": ("refused", ["w20"]),
    "force_words_ids": ("refused", [[20]]),
    "prefill_chunk_size": ("refused", 2),
}
MORE = {  # without which a field is invalid or idle
    "penalty_alpha": {"top_k": 4},
    "exponential_decay_length_penalty": {"eos_token_id": 20},
    "min_length": {"eos_token_id": 20},
    "min_new_tokens": {"eos_token_id": 20},
}
METADATA = {"_commit_hash", "_from_model_config", "transformers_version"}
SAID = {
    "num_beams": "beam",
    "guidance_scale": "ClassifierFreeGuidance",
    "penalty_alpha": "contrastive",
    "dola_layers": "dola",
    "constraints": "constrained",
    "force_words_ids": "constrained",
}


def test_every_field_of_a_generation_config_is_known():
    unknown = set(vars(GenerationConfig())) - set(FIELDS) - METADATA
    assert unknown == set(), "honour it, refuse it by name, or show that it means nothing here; then add it to FIELDS"


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("is_argument", [False, True])
def test_no_field_of_a_generation_config_is_ignored_without_a_word(guarded, tokenizer, name, is_argument):
    kind, value = FIELDS[name]
    if name not in vars(GenerationConfig()):
        return  # of a later release of transformers
    extra = {"tokenizer": tokenizer} if name == "stop_strings" else {}
    arguments = {"max_new_tokens": 8, "do_sample": False, **MORE.get(name, {}), name: value}
    if name == "max_length":
        del arguments["max_new_tokens"]
    if not is_argument:
        arguments = {"generation_config": GenerationConfig(**arguments)}
    arguments |= extra
    if kind == "refused":
        guarded.register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
        with pytest.raises(UnsupportedRequestError, match=SAID.get(name, name)):
            guarded.generate(PROMPT, **arguments, safespec=True)
    else:
        expected = guarded.generate(PROMPT, **arguments)
        assert torch.equal(guarded.generate(PROMPT, **arguments, safespec=True), expected)


@pytest.mark.parametrize("name", ["prompt_lookup_num_tokens", "max_matching_ngram_size"])
def test_a_lookup_of_nothing_is_refused(guarded, name):
    with pytest.raises(ValueError, match=name):
        guarded.generate(PROMPT, **SHORT, **{"prompt_lookup_num_tokens": 3, name: 0}, safespec=True)


def test_compiling_cannot_be_asked_for_and_disabled(guarded):
    with pytest.raises(UnsupportedRequestError, match="disable_compile"):
        guarded.generate(PROMPT, **SHORT, disable_compile=True, safespec=SafeSpecConfig(compile=True))


def test_an_operating_point_decides_what_is_flagged_and_an_unknown_one_is_refused_at_once(target, noisy, tokenizer):
    noisy.config.operating_points = {"strict": {"risk_threshold": 1e-6}, "permissive": {"risk_threshold": 1.0}}
    policies = {
        name: SafeSpecConfig(operating_point=name, max_recoveries=0) for name in ("strict", "permissive", "odd")
    }
    attach_safety_head(target, noisy, tokenizer=tokenizer, policy=policies["strict"])
    assert target.safety.risk_threshold == 1e-6
    outputs = [
        target.generate(PROMPT, **SHORT, safespec=policy, return_dict_in_generate=True)
        for policy in (True, policies["permissive"])
    ]
    assert [output.finish_reasons for output in outputs] == [["safety_refusal"], ["length"]]
    with pytest.raises(UnsupportedRequestError, match="no operating point 'odd'"):
        target.generate(PROMPT, **SHORT, safespec=policies["odd"])
    with pytest.raises(UnsupportedRequestError, match="no operating point 'odd'"):
        attach_safety_head(target, noisy, tokenizer=tokenizer, policy=policies["odd"])
