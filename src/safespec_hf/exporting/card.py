"""The model card of an exported repository."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from ..heads.card import UNPUBLISHED, describe_reading, format_threshold, mark_card, to_table
from ..modeling import GuardedModel
from .manifest import Manifest, Part

THING = "the guarded model"
_TAGS = ["custom_generate", "safety", "guardrail", "speculative-decoding", "safespec"]

_ABOUT = """\
{target}, guarded by [safespec-hf](https://pypi.org/project/safespec-hf): a small safety head reads its hidden
states while it verifies drafted tokens, and gives every token a risk. As long as the head is silent, answers are those
of the model alone. What it flags is rolled back before it is returned or streamed, and a safe continuation goes on, or
a refusal."""

_USE = """\
```bash
pip install safespec-hf transformers
```

```python
from transformers import pipeline

chat = pipeline("text-generation", "{name}", trust_remote_code=True)
chat([{{"role": "user", "content": "Tell me about tides."}}], max_new_tokens=64)
```

`AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)` and
`transformers serve "{name}" --trust-remote-code` are guarded in the same way: every `generate` is, or raises.
A copy of the target that you have loaded already is guarded call by call with
`model.generate(..., custom_generate="{name}", trust_remote_code=True)`."""

_LIMITS = """\
- Without `trust_remote_code=True`, or without safespec-hf, the repository does not load: it never answers unguarded.
  {plain}
- Only answers that `generate` writes are guarded. The model's `forward`, and what computes the likelihood of given
  texts with it, are the target's own; continuous batching and beam search raise.
- A safety head misses some of what is harmful and flags some of what is not: see its own card{card}. It is one layer
  of defence.
- The method is that of *SafeSpec: Fast and Safe LLM via Dynamic Reflective Sampling* (Xu et al., ICML 2026,
  [arXiv:2606.19755](https://arxiv.org/abs/2606.19755)). This is an independent implementation."""


def export_card(model: GuardedModel, manifest: Manifest, license: str | None = None) -> ModelCard:
    """The card: what it is, how it is used, what is in it, and what it does not do.

    Args:
        model ([`GuardedModel`]): The target with its head.
        manifest (`Manifest`): Where everything is.
        license (`str`, *optional*): As the Hub abbreviates it.
    """
    target = manifest.target.repo_id or manifest.target.model_id
    plain = 'The plain target is in the folder `target`, for `from_pretrained(..., subfolder="target")`.'
    limits = _LIMITS.format(
        plain=f"The plain target is {target}." if manifest.is_light else plain,
        card="" if manifest.head.repo_id else ", in the folder `head`",
    )
    sections = {
        "Use": _USE.format(name=UNPUBLISHED),
        "What is in it": _list_parts(model, manifest),
        "Limits": limits,
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        base_model=target,
        tags=_TAGS,
    )
    about = _ABOUT.format(target=f"[{target}](https://huggingface.co/{target})" if target else "A language model")
    return mark_card(f"---\n{data.to_yaml()}\n---\n\n# Guarded model\n\n{about}\n\n{body}\n\n", THING)


def _list_parts(model: GuardedModel, manifest: Manifest) -> str:
    head = model.safety.head.config
    threshold = format_threshold(model.safety.risk_threshold)
    rows = [
        {"part": "target", "what": type(model).__name__, **_place(manifest.target)},
        {"part": "safety head", "what": f"{describe_reading(head)} Flags at {threshold}.", **_place(manifest.head)},
    ]
    if manifest.draft is not None:
        rows.append({"part": "draft", "what": "proposes tokens", **_place(manifest.draft)})
    rows.append({"part": "policy", "what": f"`{manifest.policy.policy}`", "where": "`config.json`"})
    return to_table(rows)


def _place(part: Part) -> dict[str, str]:
    return {"where": f"`{part.folder}/`" if part.folder else f"{part.repo_id} at {part.revision or 'its main branch'}"}
