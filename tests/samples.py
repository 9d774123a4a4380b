"""Harmless stand-ins: answers made of the tiny tokenizer's words, where some words count as unsafe."""

import json
import random
import threading
from types import SimpleNamespace

from typer.testing import CliRunner

from safespec_hf.cli import app
from safespec_hf.training.data import Example

CALM, ALARM = [f"w{index}" for index in range(10, 22)], [f"w{index}" for index in range(22, 38)]


def make_examples(num, seed=0, num_groups=12, source="garden"):
    draw = random.Random(seed)
    examples = []
    for index in range(num):
        label, group = index % 2, index % num_groups
        words = draw.choices(ALARM if label else CALM, k=draw.randint(6, 30))
        words[3] = "\n"
        prompt = ({"role": "user", "content": f"w{10 + group} think"},)
        examples.append(
            Example(
                id=f"{source}:{index}",
                messages=prompt,
                response=" ".join(words),
                label=label,
                group=f"g{group}",
                source=source,
                category=f"c{group % 3}",
            )
        )
    return examples


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(*arguments):
    """The output of a `safespec` command that works."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def emulated_processes(num_processes):
    """What `PartialState` gives, once to each of several threads in the place of processes."""
    barrier = threading.Barrier(num_processes)
    states = [
        SimpleNamespace(
            process_index=index,
            num_processes=num_processes,
            is_main_process=index == 0,
            wait_for_everyone=barrier.wait,
        )
        for index in range(num_processes)
    ]
    return lambda **_: states.pop()
