"""Run by `accelerate launch`, in two processes: each has a whole guarded model, and answers a part of the prompts."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tiny import build_coin_head, build_head, build_model, build_tokenizer, perturb

from safespec_hf import SafeSpecConfig, attach_safety_head

PROMPTS = [[12, 18, 24, 13], [30, 17, 21], [15, 33, 14, 16, 28]]
POLICY = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no thanks")
GREEDY = {"do_sample": False}


def answers(model, prompts, **arguments):
    """One for each prompt, of a length that tells it from the others: no two processes make the same call."""
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=4 * len(prompt), **GREEDY, **arguments).tolist()
        for prompt in prompts
    ]


def main():
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    plain, draft = build_model(), perturb(build_model())
    wrapped = accelerator.prepare_model(
        attach_safety_head(build_model(), build_head(plain), tokenizer=build_tokenizer())
    )
    model = accelerator.unwrap_model(wrapped)  # what it wraps models in has no `generate`
    with accelerator.split_between_processes(PROMPTS) as mine:
        for arguments in ({}, {"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
            assert answers(model, mine, safespec=True, **arguments) == answers(plain, mine)
        found = gather_object(answers(model, mine, safespec=True))
    assert found == answers(plain, PROMPTS)
    # where one process recovers, the others go on
    attach_safety_head(
        model, build_coin_head(plain, 0.3 * accelerator.process_index, seed=0), tokenizer=build_tokenizer()
    )
    output = model.generate(
        torch.tensor(PROMPTS[:1]), max_new_tokens=24, **GREEDY, safespec=POLICY, return_dict_in_generate=True
    )
    assert any(output.events) == bool(accelerator.process_index)
    assert not (output.risks >= model.safety.risk_threshold).any()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
