"""Writes word_problems.jsonl: small sums in words, for recipes/word_problems.toml.

python recipes/data/make_word_problems.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fatma", "Goran", "Hana")
THINGS = ("apples", "books", "coins", "eggs", "pens", "stamps")
STORIES = (
    ("{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?", lambda a, b: a + b),
    ("{name} had {sum} {things} and gave away {b}. How many {things} are left?", lambda a, b: a),
    ("{name} has {a} bags with {b} {things} in each. How many {things} is that?", lambda a, b: a * b),
)


def main() -> None:
    draw, rows = random.Random(1), dict[str, int]()
    while len(rows) < 200:
        story, solve = draw.choice(STORIES)
        a, b = draw.randint(2, 9), draw.randint(2, 9)
        prompt = story.format(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b, sum=a + b)
        rows[prompt] = solve(a, b)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows.items()]
    (Path(__file__).parent / "word_problems.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
