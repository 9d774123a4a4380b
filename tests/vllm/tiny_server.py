"""A tiny random target in a folder, a head that flags words wherever they stand, and a guarded server of both."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from safespec_hf import SafetyHead, SafetyHeadConfig, target_binding
from safespec_hf.heads.hub import save_head

NUM_WORDS = 63
"""The last place of the vocabulary has no word: the guard takes it for its own."""
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
POLICY = {"reflection": tiny.REFLECTION, "refusal": tiny.REFUSAL, "max_segment_tokens": 5, "num_candidates": 3}
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
START_SECONDS = 600
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def save_target(folder):
    """A random model that says all its words, and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUM_WORDS + 1,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **SIZES,
    )
    tokenizer = tiny.build_tokenizer(NUM_WORDS)
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_word_head(folder, target, share=0.15):
    """A head that reads a token's embedding and nothing else; so which words are flagged is known beforehand.

    Returns:
        `frozenset[int]`: They.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    states = model.get_input_embeddings().weight.detach().float()
    torch.manual_seed(3)
    fields = {"hidden_size": states.shape[1], "hidden_layers": [0], "num_mlp_layers": 1, "pooling": "last"}
    head = SafetyHead(SafetyHeadConfig(**fields, target=target_binding(model, tokenizer))).eval()
    with torch.no_grad():
        risks = head.risk(states)
    # between two words, so that no rounding decides
    last, first = risks.sort().values[[-int(share * len(risks)) - 1, -int(share * len(risks))]].tolist()
    head.config.risk_threshold = (last + first) / 2
    save_head(head, folder)
    return frozenset((risks >= head.config.risk_threshold).nonzero().flatten().tolist())


class Server:
    """`safespec serve` in a process of its own.

    Args:
        target (`Path`): Folder.
        head (`Path`): Folder.
        log (`Path`): Takes what it prints.
        arguments: More of them.
    """

    def __init__(self, target, head, log, *arguments, policy=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", Path(log)
        places = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "target"]
        policy = ["--policy", json.dumps(POLICY if policy is None else policy)]
        command = ["-m", "safespec_hf.cli", "serve", str(target), "--head", str(head), *policy, *places, *arguments]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command], env=os.environ | ENVIRONMENT, stdout=output, stderr=output
            )

    def wait(self):
        """Until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-3000:]}")

    def count(self, name):
        """A metric."""
        lines = httpx.get(f"{self.url}/metrics", timeout=10).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def workers(self):
        """The processes that run the model; none where the server has ended."""
        if self.process.poll() is not None:
            return []
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "Worker" in " ".join(child.cmdline())]

    def stop(self):
        """Ends it, and all that it started."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for child in children:
            if child.is_running():
                child.kill()
