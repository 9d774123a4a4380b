"""Puts prompts together from forms and things to fill them with, to cover what users ask for besides mathematics.

Without `--answers`: questions that stand by themselves. With it: questions about a text, for which the target's own
answers serve, such as a summary or a lookup. All words are those of `forms.json` or the target's, so no licence but
this project's applies, and nothing comes from a test set.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

FORMS: dict[str, Any] = json.loads((Path(__file__).parent / "forms.json").read_text(encoding="utf-8"))
MIN_TEXT_LENGTH = 200  # characters of a text that is worth asking about


def fill(form: str, random_: random.Random) -> str:
    """A form with everything that it asks for."""
    pick = random_.choice
    german = [" ".join(pick(parts) for parts in FORMS["german"]) + "." for _ in range(2)]
    return form.format(
        topic=pick(FORMS["topics"]),
        other=pick(FORMS["topics"]),
        role=pick(FORMS["roles"]),
        other_role=pick(FORMS["roles"]),
        task=pick(FORMS["tasks"]),
        n=random_.randint(11, 60),
        m=random_.randint(61, 99),
        k=random_.randint(2, 10),
        german=german[0],
        german2=german[1],
        english=" ".join(pick(parts) for parts in FORMS["english"]) + ".",
    )


def ask_about(texts: list[str], random_: random.Random) -> str:
    """A question about one or two of the texts."""
    text, text2 = random_.sample(texts, 2)
    words = [word.strip(".,;:*()") for word in text.split() if len(word) > 6] or ["this"]
    form = random_.choice(FORMS["about_text"])
    return form.format(few=random_.randint(1, 4), text=text, text2=text2, word=random_.choice(words))


def read_texts(path: Path) -> list[str]:
    """Answers that are long enough."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["response"].strip() for line in file]
    return [text for text in texts if len(text) > MIN_TEXT_LENGTH]


def main() -> None:
    """Writes prompts, each one once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="JSON lines with a field `prompt`")
    parser.add_argument("--num", required=True, type=int, help="of prompts, at most: none is written twice")
    parser.add_argument("--answers", type=Path, help="the target's answers to other prompts, to ask about")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random_ = random.Random(arguments.seed)
    if arguments.answers is None:
        kinds = list(FORMS["forms"].values())
        prompts = [fill(random_.choice(kinds[number % len(kinds)]), random_) for number in range(arguments.num)]
    else:
        texts = read_texts(arguments.answers)
        prompts = [ask_about(texts, random_) for _ in range(arguments.num)]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in dict.fromkeys(prompts)]
    arguments.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} prompts in {arguments.out}")


if __name__ == "__main__":
    main()
