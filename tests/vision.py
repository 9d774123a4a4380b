"""Tiny random vision-language models, and prompts with images for them."""

from collections.abc import Sequence
from typing import Any

import torch
from architectures import spread
from tiny import VOCAB_SIZE
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

START, END, IMAGE, VIDEO = 35, 36, 38, 39  # what is around an image, and what stands in its places
TEXT = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
TEXT |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SIGHT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "num_heads": 2, "depth": 1}
SQUARE = {"image_size": 8, "patch_size": 4}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8},
        "vision_config": SIGHT | SQUARE,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
    },
    "qwen2_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": {**QWEN, "embed_dim": 16, "hidden_size": 32},
        **IDS,
    },
    "qwen2_5_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": {**SIGHT, **QWEN, "out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 8},
        **IDS,
    },
    "qwen3_vl": {
        "text_config": TEXT | MROPE,
        "vision_config": {
            **SIGHT,
            **QWEN,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **IDS,
    },
    "qwen3_5": {
        "text_config": TEXT
        | MROPE
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
        }
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "vision_config": {**SIGHT, **QWEN, "out_hidden_size": 32, "num_position_embeddings": 16},
        **IDS,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", **SIGHT, **SQUARE, "num_hidden_layers": 2},
        "image_token_index": IMAGE,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {**SIGHT, **SQUARE},
        "scale_factor": 1,
        "image_token_id": IMAGE,
        "pad_token_id": 0,
    },
}
NUM_PLACES = 4  # of an image in a prompt


def build_vision(name: str, std: float = 0.25) -> PreTrainedModel:
    """A random model whose greedy text is not one token for ever, and depends on the image."""
    config = CONFIG_MAPPING[name](**VISION[name], tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    spread(model, std)
    return model


def look(name: str, lengths: Sequence[int] = (9,), seed: int = 1) -> dict[str, Tensor]:
    """Prompts of these lengths, left-padded, each with an image in it."""
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        words = torch.randint(10, 34, (length,), generator=generator)
        words[1 : 1 + NUM_PLACES + 2] = torch.tensor([START, *[IMAGE] * NUM_PLACES, END])
        ids[row, width - length :], mask[row, width - length :] = words, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    kinds = (ids == IMAGE).long()
    if name.startswith("qwen"):
        pixels = torch.randn(len(lengths) * 16, 3 * 4 * 4, generator=generator)
        grid = torch.tensor([[1, 4, 4]] * len(lengths))
        return inputs | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    pixels = torch.randn(len(lengths), 3, 8, 8, generator=generator)
    if name == "smolvlm":
        return inputs | {"pixel_values": pixels[:, None]}
    return inputs | {"pixel_values": pixels} | ({"token_type_ids": kinds} if name == "gemma3" else {})


def reread(model: Any, inputs: dict[str, Tensor], sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Logits before each token of answers, and last hidden states of all but their last: of plain `generate`."""
    num_given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    output = model.generate(
        **inputs,
        max_new_tokens=sequences.shape[1] - num_given,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, ids: [int(sequences[row, len(ids)])],
        output_logits=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences, sequences)
    states = [step[-1] for step in output.hidden_states[1:]]
    return torch.stack(output.logits, dim=1), torch.cat(states, dim=1)
