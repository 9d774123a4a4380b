"""A model that ends early is the model that has only the first layers, and the whole one is left as it was."""

import pytest
import torch
from tiny import PROMPT, attach, build_head, build_model

from safespec_hf import SafeSpecConfig, UnsupportedRequestError
from safespec_hf.engine.early_exit import early_exit


@pytest.mark.parametrize("kind", ["llama", "sliding", "alternating", "gpt2"])
@torch.no_grad()
def test_its_logits_are_those_after_the_first_layers(kind):
    model = build_model(kind, **{"llama": {"num_hidden_layers": 4}}.get(kind, {}))
    num_layers = model.config.num_hidden_layers
    before = model(PROMPT).logits
    state = model(PROMPT, output_hidden_states=True).hidden_states[num_layers // 2]
    decoder = model.get_decoder()
    norm = decoder.ln_f if kind == "gpt2" else decoder.norm
    view = early_exit(model, num_layers // 2)
    assert torch.allclose(view(PROMPT).logits, model.lm_head(norm(state)), atol=1e-5)
    # nothing was changed, and hidden states are not recorded twice
    assert torch.equal(model(PROMPT).logits, before)
    assert len(model(PROMPT, output_hidden_states=True).hidden_states) == num_layers + 1


def test_its_weights_are_the_model_s_own():
    model = build_model()
    ids = {id(weight) for weight in model.parameters()}
    assert all(id(weight) in ids for weight in early_exit(model, 1).parameters())


@pytest.mark.parametrize("num_layers", [0, 2, 7, -1, True, 1.5])
def test_a_number_of_layers_that_there_is_not_is_refused(guarded, num_layers):
    with pytest.raises(UnsupportedRequestError, match="from 1 to 1"):
        guarded.generate(PROMPT, max_new_tokens=4, assistant_early_exit=num_layers, safespec=True)


def test_two_drafts_at_a_time_are_refused(guarded, draft):
    for other in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(UnsupportedRequestError, match="Choose one"):
            guarded.generate(PROMPT, max_new_tokens=4, assistant_early_exit=1, safespec=True, **other)


def test_it_can_write_candidates_by_itself(tokenizer):
    model = build_model(num_hidden_layers=3)
    attach(model, tokenizer, build_head(model, 1e-9))  # flags everything
    policy = SafeSpecConfig(candidate_source="draft", reflection="pause think", refusal="no thanks", max_recoveries=2)
    arguments = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(PROMPT, assistant_early_exit=2, safespec=policy, **arguments)
    assert output.finish_reasons == ["safety_refusal"]
