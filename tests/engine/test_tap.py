"""What a head reads of layers whose states are several streams."""

import pytest
import torch
from architectures import build_architecture
from tiny import build_noisy_head, perturb
from transformers import CONFIG_MAPPING

from safespec_hf import SafeSpecConfig, attach_safety_head
from safespec_hf.engine.tap import main_stream, read_tap, tap_arguments

PROMPTS = torch.tensor([[11, 17, 23, 31], [0, 21, 22, 24], [0, 0, 15, 16], [12, 13, 14, 15]])


@pytest.fixture(scope="module")
def streaming():
    if "hy_v4" not in CONFIG_MAPPING:
        pytest.skip("this release of transformers has no model with hyper-connections")
    return build_architecture("hy_v4")


def test_streams_of_hyper_connections_are_averaged(streaming):
    # as many rows and positions as there are streams: sizes alone do not tell which is which
    outputs = streaming(PROMPTS, **tap_arguments([1]))
    whole = outputs.hidden_states[1]
    assert whole.shape == (4, 4, 4, 32)
    torch.testing.assert_close(read_tap(streaming, outputs, [1], 4), sum(whole.unbind(2)) / 4)


def test_of_gemma_3n_the_first_stream_is_read():
    states = torch.randn(4, 4, 4, 32)
    assert torch.equal(main_stream(build_architecture("gemma3n_text"), states), states[0])


def test_a_model_with_streams_is_guarded(streaming, tokenizer):
    attach_safety_head(streaming, build_noisy_head(streaming, 0.5), tokenizer=tokenizer)
    policy = SafeSpecConfig(max_segment_tokens=4, num_candidates=2, adaptive_drafts=False)
    arguments = {"attention_mask": (PROMPTS != 0).long(), "max_new_tokens": 12, "eos_token_id": None}
    output = streaming.generate(
        PROMPTS, assistant_model=perturb(streaming), safespec=policy, return_dict_in_generate=True, **arguments
    )
    assert any(output.events)
    assert not bool((output.risks >= streaming.safety.risk_threshold).any())
