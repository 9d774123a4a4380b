"""Run by torchrun, in several processes: a model that they share is guarded, and they never part."""

import sys
from pathlib import Path

import torch
from tiny import build_head, build_model, build_noisy_head, build_tokenizer, perturb
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from safespec_hf import SafeSpecConfig, UnsupportedRequestError, attach_safety_head

PROMPT = torch.tensor([[12, 18, 24, 13]])
POLICY = SafeSpecConfig(max_segment_tokens=4, num_candidates=3, reflection="pause think", refusal="no thanks")
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def refusal(model, **arguments):
    try:
        model.generate(PROMPT, **{**GREEDY, **arguments}, safespec=POLICY)
    except UnsupportedRequestError as error:
        return str(error)
    return ""


def main():
    dist.init_process_group("gloo")
    rank, answers = dist.get_rank(), []
    plain = build_model()
    models = [
        AutoModelForCausalLM.from_pretrained(Path(sys.argv[1]), distributed_config=DistributedConfig(tp_size=2)),
        sharded(build_model()),
    ]
    for model in models:
        expected = plain.generate(PROMPT, **GREEDY)
        attach_safety_head(model, build_head(plain), tokenizer=build_tokenizer())
        for draft in (None, perturb(plain)):
            assert torch.equal(model.generate(PROMPT, **GREEDY, assistant_model=draft, safespec=True), expected)
        attach_safety_head(model, build_noisy_head(plain, 0.8), tokenizer=build_tokenizer())
        for do_sample in (False, True):
            torch.manual_seed(rank)  # their random numbers differ
            arguments = {"max_new_tokens": 16, "do_sample": do_sample, "assistant_model": perturb(plain)}
            answers.append(model.generate(PROMPT, **arguments, safespec=POLICY).tolist())
        assert "differ" in refusal(model, max_new_tokens=12 + rank)
        assert "max_time" in refusal(model, max_time=9.0)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, answers)
    assert all(each == answers for each in everyone)
    # processes with a model of their own each go their own way
    attach_safety_head(plain, build_head(plain), tokenizer=build_tokenizer(), always=True)
    assert plain.generate(PROMPT, do_sample=False, max_new_tokens=3 + rank).shape[1] == 7 + rank
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
