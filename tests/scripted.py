"""A target whose every logit and hidden state is written down, to drive recovery token by token.

It keeps the token ids themselves in the KV cache and reads its context back from there, so that a wrong cache, mask or
position is a wrong answer.
"""

import math
from collections.abc import Callable, Sequence

import torch
from tiny import REFLECTION, REFUSAL, THINK, VOCAB_SIZE
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from safespec_hf import SafeSpecConfig, SafetyHead, SafetyHeadConfig, attach_safety_head, target_binding
from safespec_hf.engine.cache import CACHE_NAME

Script = Callable[[list[int]], "int | dict[int, float]"]
Risk = Callable[[list[int]], float]
IMPOSSIBLE = -30.0  # logit of what a script does not name


class ScriptedConfig(PreTrainedConfig):
    model_type = "scripted"

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 1
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    max_position_embeddings: int = 512
    pad_token_id: int = 0


class ScriptedModel(PreTrainedModel, GenerationMixin):
    """Says what `script(context)` says: a token, or tokens with their chances.

    `risks` gives the risk of tokens, or a function of the context that gives it.
    """

    config_class = ScriptedConfig

    def __init__(self, script: Script, risks: dict[int, float | Risk] | None = None, **config: object):
        super().__init__(ScriptedConfig(**config))
        self.script = script
        self.risks = risks or {}
        self.num_forwards = 0
        self.contexts: list[list[int]] = []  # every context that was read up to its end
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,  # its name before transformers 5.24
        use_cache: bool | None = None,
        output_hidden_states: object = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        self.num_forwards += 1
        states = input_ids[:, None, :, None].float()
        cache = next((given for given in (cache, past_key_values) if given is not None), DynamicCache())
        ids_BL = cache.update(states, states, 0)[0][:, 0, :, 0].long()
        mask_BL = torch.ones_like(ids_BL) if attention_mask is None else attention_mask
        num_rows, num_tokens = input_ids.shape
        logits = torch.full((num_rows, num_tokens, self.config.vocab_size), IMPOSSIBLE)
        hidden = torch.zeros(num_rows, num_tokens, 1)
        for row in range(num_rows):
            for column in range(num_tokens):
                end = ids_BL.shape[1] - num_tokens + column + 1
                if mask_BL[row, end - 1]:
                    context = ids_BL[row, :end][mask_BL[row, :end].bool()].tolist()
                    assert position_ids is None or position_ids[row, column] == len(context) - 1
                    self._speak(context, logits[row, column])
                    risk = self.risks.get(context[-1], 0.1)
                    risk = risk(context) if callable(risk) else risk
                    hidden[row, column] = risk if math.isnan(risk) else math.log(risk / (1 - risk))
            self.contexts.append(context)
        return CausalLMOutputWithPast(
            logits=logits[:, -logits_to_keep:], hidden_states=(hidden, hidden), **{CACHE_NAME: cache}
        )

    def _speak(self, context: list[int], logits_V: Tensor) -> None:
        said = self.script(context)
        for token, chance in said.items() if isinstance(said, dict) else [(said, 1.0)]:
            logits_V[token] = math.log(chance)


def count_up(context: list[int]) -> int:
    """... 11, 12, 13 ..."""
    return (context[-1] + 1) % VOCAB_SIZE


def count_after(turns: dict[int, "int | dict[int, float]"]) -> Script:
    """Counts up, except after the tokens in `turns`."""
    return lambda context: turns.get(context[-1], count_up(context))


def probe(model: ScriptedModel, threshold: float = 0.5, layers: Sequence[int] = (1,), **config: object) -> SafetyHead:
    """A head whose risk of a token is the one in the script."""
    fields = {"pooling": "last", "num_mlp_layers": 1, **config}
    head = SafetyHead(
        SafetyHeadConfig(
            hidden_size=1, hidden_layers=list(layers), risk_threshold=threshold, target=target_binding(model), **fields
        )
    )
    torch.nn.init.ones_(head.mlp[0].weight)
    torch.nn.init.zeros_(head.mlp[0].bias)
    if head.prompt_probe is not None:
        torch.nn.init.ones_(head.prompt_probe.weight)
        torch.nn.init.zeros_(head.prompt_probe.bias)
    return head.eval()


# The answer to [10] counts 11, 12, 13, ... in segments of three. 15, in the second segment, is unsafe. After the
# reflection, the target goes on with 20 or with 30.
TURNS = {THINK: {20: 0.5, 30: 0.5}}


def answer(tokenizer, risks=None, *, script=None, draft=None, head=None, prompt=(10,), **arguments):
    """A guarded answer, or those to several prompts; policy fields and arguments of `generate` are told apart."""
    fields = {"max_segment_tokens": 3, "rollback_segments": 0, "reflection": REFLECTION, "refusal": REFUSAL}
    fields |= {"num_draft_tokens": 5, "adaptive_drafts": False, "lookup_drafts": False, "false_alarm_margin": None}
    fields |= {name: arguments.pop(name) for name in SafeSpecConfig.__slots__ if name in arguments}
    model = ScriptedModel(script or count_after(TURNS), risks)
    attach_safety_head(model, probe(model, **(head or {})), tokenizer=tokenizer)
    draft = None if draft is None else ScriptedModel(draft)
    arguments = {"max_new_tokens": 9, "do_sample": False, "assistant_model": draft, **arguments}
    if "stop_strings" in arguments:
        arguments["tokenizer"] = tokenizer
    ids = torch.tensor(list(prompt))
    ids = ids if ids.dim() == 2 else ids[None]
    output = model.generate(ids, safespec=SafeSpecConfig(**fields), return_dict_in_generate=True, **arguments)
    output.model = model
    return output


def tokens_of(output, row=0, prompt=1):
    return output.sequences[row, prompt:].tolist()


def risks_of(output):
    # float32 risks of scripted float32 logits: six digits are right
    return [round(risk, 6) for risk in output.risks[0].tolist()]


def outcomes_of(output, row=0):
    """What became of each flag of an answer."""
    return [event.outcome for event in output.events[row]]


def has_reflected(output):
    """Whether the target has read a reflection."""
    return any(THINK in context for context in output.model.contexts)
