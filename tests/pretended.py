"""A pretended accelerator: its tensors lie on the host, but torch takes them for those of another device.

What it computes is right, tensors of both devices do not mix, and it counts how often the host waits for it: for
every copy to the host, and every operation whose result or shape the host reads. Nothing of it can be undone, so it is
for a process of its own: as a script it prints what calls of `CALLS` cost, as JSON.
"""

import collections
import json
import traceback

import torch
from tiny import ADAPTIVE, POLICY, attach, build_draft_head, build_model, build_tokenizer, cheap_drafts, perturb
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from safespec_hf.decoding.support import check_model

READS = ("aten._local_scalar_dense.", "aten.nonzero.", "aten.masked_select.", "aten._unique2.", "aten.equal.")
waits = collections.Counter()
sent = collections.Counter()


def note(counts):
    """Counts it by the place in the package that asked for it."""
    frames = [frame.filename for frame in traceback.extract_stack() if "safespec_hf" in frame.filename]
    counts[frames[-1].split("safespec_hf/")[1] if frames else "elsewhere"] += 1


class There(torch.Tensor):
    """A tensor of the pretended device; `raw` is what it holds."""

    @staticmethod
    def __new__(cls, raw):
        place = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "device": "pretended:0"}
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), dtype=raw.dtype, **place)

    def __init__(self, raw):
        self.raw = raw

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, *args, **(kwargs or {}))

    def tolist(self):
        note(waits)
        return self.raw.tolist()

    def __getitem__(self, index):
        return super().__getitem__(as_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(as_tensors(index), value)


def as_tensors(index):
    parts = index if isinstance(index, tuple) else (index,)
    return tuple(on_host(part) if isinstance(part, list) else part for part in parts)


def dispatch(func, *args, **kwargs):
    """Runs an operation on what its tensors hold."""
    name, device = str(func), kwargs.get("device")
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = {id(leaf.raw): leaf for leaf in tensors if isinstance(leaf, There)}
    goes_there = bool(there) if device is None else torch.device(device).type == "pretended"
    if name.startswith(READS) and there:
        note(waits)
    if name in ("aten._to_copy.default", "aten.copy_.default"):
        goes_there = goes_there if name == "aten._to_copy.default" else isinstance(args[0], There)
        if there and not goes_there:
            note(waits)
        if goes_there and len(there) < len(tensors):
            note(sent)
    elif there and "index" not in name and any(not isinstance(one, There) and one.dim() > 0 for one in tensors):
        raise RuntimeError(f"{name}: tensors of two devices")
    if goes_there and device is not None:
        kwargs["device"] = "cpu"
    raw_args, raw_kwargs = pytree.tree_map(lambda one: one.raw if isinstance(one, There) else one, (args, kwargs))
    result = func(*raw_args, **raw_kwargs)

    def wrap(one):
        if not isinstance(one, torch.Tensor) or not goes_there:
            return one
        return there[id(one)] if id(one) in there else There(one)  # in place it is the same tensor

    return pytree.tree_map(wrap, result)


def on_device(data, *, dtype=None, device=None, **kwargs):
    """Stands for `torch.tensor`, whose own way to a device knows nothing of devices that are written in Python."""
    made = on_host(data, dtype=dtype, **kwargs)
    return made if device is None else made.to(device)


def put(module):
    """Moves a module's tensors to the pretended device."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                each._parameters[name] = torch.nn.Parameter(There(weight.detach()), requires_grad=False)
        each._buffers.update({name: There(buffer) for name, buffer in each._buffers.items() if buffer is not None})
    return module


_setup_privateuseone_for_python_backend("pretended")
everything = torch.library.Library("_", "IMPL")
everything.fallback(dispatch, "PrivateUse1")
some = torch.library.Library("aten", "IMPL")
some.impl("empty.memory_format", lambda size, dtype=None, **_: There(torch.empty(size, dtype=dtype)), "PrivateUse1")
some.impl(
    "empty_strided",
    lambda size, stride, *, dtype=None, **_: There(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)
on_host, torch.tensor = torch.tensor, on_device
torch.Tensor.new_tensor = lambda self, data: on_device(data, dtype=self.dtype, device=self.device)

ONE, TWO = [[12, 18, 24, 13]], [[12, 18, 24, 13], [0, 0, 12, 14]]
PENALTY = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}


def in_turns(input_ids, scores):
    """Leaves even tokens a chance, then odd ones, so that of drafts from the prompt few stand."""
    places = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(places % 2 == input_ids.shape[1] % 2, -torch.inf)


CALLS = {
    "no drafts": (ONE, POLICY, {}),
    "lookup": (ONE, POLICY, {"prompt_lookup_num_tokens": 3, **PENALTY}),
    "lookup, a processor of one's own": (ONE, POLICY, {"prompt_lookup_num_tokens": 3, "logits_processor": [in_turns]}),
    "sampled drafts, top-k": (ONE, POLICY, {"do_sample": True, "top_k": 50}),
    "sampled drafts, penalty": (ONE, POLICY, {"do_sample": True, **PENALTY}),
    "adaptive drafts": (ONE, ADAPTIVE, {}),
    "draft head": (ONE, ADAPTIVE, {"do_sample": True}),
    "batch, penalty": (TWO, POLICY, PENALTY),
}


@torch.no_grad()
def main():
    models = {"target": build_model(), "draft": perturb(build_model(), 0.05)}
    models["draft head"] = build_draft_head(models["target"])
    attach(models["target"], build_tokenizer())
    check_model(models["draft"], has_states=False)  # here, while it can be read
    model = put(models["target"])
    put(model.safety.head), put(models["draft"]), put(models["draft head"])
    found = {}
    for name, (prompts, policy, arguments) in CALLS.items():
        assistant = {} if name.startswith(("no drafts", "lookup")) else {"assistant_model": models["draft"]}
        if name == "draft head":
            assistant = {"assistant_model": models["draft head"]}
        ids = torch.tensor(prompts, device="pretended")
        arguments = {"do_sample": False, **arguments, **assistant, "attention_mask": (ids != 0).long()}
        counts = []
        for num_tokens in (1, 7):  # what the first round costs, the prompt's, is not a round's
            waits.clear(), sent.clear()
            with cheap_drafts():
                output = model.generate(
                    ids, max_new_tokens=num_tokens, safespec=policy, return_dict_in_generate=True, **arguments
                )
            counts.append((output.statistics.num_rounds, sum(waits.values()), sum(sent.values())))
        found[name] = {
            "counts": counts,
            "waits": dict(waits),
            "sent": dict(sent),
            "drafts": output.statistics.num_draft_tokens,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
