"""How a target is asked: its tokenizer's chat template or, for a base model that has none, a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from ..errors import SafeSpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question:\n{% elif message['role'] == 'assistant' %}Answer:\n{% endif %}"
    "{{ message['content'] | trim }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Answer:\n{% endif %}"
)
"""Plain text for models that were never tuned for chat: questions and answers, each under its name.

An answer begins on a line of its own, so that its first token is the same with and without the prompt before it. What
is said in other roles, such as `system`, has no name over it.
"""

_TURNS = ("FIRST QUESTION", "FIRST ANSWER", "SECOND QUESTION")


def read_template(name: str) -> str:
    """The template of that name: `"plain"` is [`PLAIN_TEMPLATE`], anything else a file with a Jinja template.

    Raises:
        SafeSpecError: If there is no such file, or if it is not text.

    Example:

        >>> read_template("plain") == PLAIN_TEMPLATE
        True
    """
    if name == "plain":
        return PLAIN_TEMPLATE
    try:
        template = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SafeSpecError(
            f"A chat template is `plain` or a file with Jinja in it, but got {name!r}: {error}"
        ) from error
    if not template.strip():
        raise SafeSpecError(f"The chat template in {name!r} is empty.")
    return template


def set_chat_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Gives a chat template to a tokenizer that has none.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Changed in place, but not on disk.
        template (`str`): Jinja, such as [`PLAIN_TEMPLATE`].

    Raises:
        SafeSpecError: If it has another one, by which the users of a head would ask; or if this one can't render a
            question.
    """
    if tokenizer.chat_template and tokenizer.chat_template != template:
        raise SafeSpecError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has a chat template of its own, and whoever "
            "uses a head asks by that one. Leave the other one out, or save the tokenizer with it."
        )
    tokenizer.chat_template = template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": _TURNS[0]}], tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        raise SafeSpecError(f"The chat template can't render a question: {error}") from error


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises unless a tokenizer says how to ask.

    Raises:
        SafeSpecError: If it has no chat template.
    """
    if not tokenizer.chat_template:
        raise SafeSpecError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, so it does not say how "
            "to ask. Take a model that was tuned for chat; for a base model give `--chat-template plain`, or save its "
            "tokenizer with `chat_template` set."
        )


def next_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a model writes when it goes on with the next question instead of ending its answer, in plain text.

    A model that was tuned for chat ends an answer with a token of its template. Where the template has none, a model
    writes on, in the same format: what the template puts between an answer and the next question ends the answer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): With a chat template.

    Returns:
        `str`: Such as `"\\n\\nQuestion:"`; empty if special tokens mark the turns, or if the template takes no three.
    """
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), _TURNS, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError, ValueError):
        return ""
    between = text.partition(_TURNS[1])[2].partition(_TURNS[2])[0].rstrip()
    return "" if any(token in between for token in tokenizer.all_special_tokens) else between
