"""Small data for the recipes beside it, from the sorting task: python recipes/stages/make_data.py [DIRECTORY]

sort_sft.jsonl          {"prompt": "3102=", "response": "0123"}
sort_pairs.jsonl        {"prompt", "chosen", "rejected"}: the sorted digits, and the same with another digit for one
sort_rankings.jsonl     {"prompt", "responses", "ranking"}: four answers, by how many digits stand where they should
sort_prompts.jsonl      {"prompt"}
sort_100.jsonl          100 different rows of sort_sft.jsonl
*_heldout.jsonl         the same of prompts that training never sees

The same numbers every time. Training and held-out prompts are those of the sorting environment, so that a model trained
here can go on with recipes/sort.toml.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from async_rl.environments.sorting import SortingTasks, distance

TRAIN, HELDOUT, FEW, SEED = 2000, 200, 100, 1


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    tasks = SortingTasks(SEED, heldout=HELDOUT)
    parts = {"": [tasks.train(index)["digits"] for index in range(TRAIN)]}
    parts["_heldout"] = [task["digits"] for task in tasks.heldout()]
    for suffix, prompts in parts.items():
        for name, make in (("sft", sft), ("pairs", pair), ("rankings", ranking), ("prompts", prompt)):
            lines = [json.dumps(make(digits)) + "\n" for digits in prompts]
            (directory / f"sort_{name}{suffix}.jsonl").write_text("".join(lines))
    few = [json.dumps(sft(digits)) + "\n" for digits in dict.fromkeys(parts[""][: 2 * FEW])][:FEW]
    (directory / "sort_100.jsonl").write_text("".join(few))


def prompt(digits: str) -> dict[str, Any]:
    return {"prompt": f"{digits}="}


def sft(digits: str) -> dict[str, Any]:
    return {"prompt": f"{digits}=", "response": "".join(sorted(digits))}


def pair(digits: str) -> dict[str, Any]:
    return {
        "prompt": f"{digits}=",
        "chosen": "".join(sorted(digits)),
        "rejected": _worse(digits, random.Random(digits)),
    }


def ranking(digits: str) -> dict[str, Any]:
    """No two answers have equally many digits in their place."""
    rng, best = random.Random(digits), "".join(sorted(digits))
    by_score = {len(digits): best}
    while len(by_score) < 4:
        answer = list(best)
        for place in rng.sample(range(len(best)), rng.randint(1, len(best))):
            answer[place] = rng.choice("0123456789")
        by_score.setdefault(distance([int(d) for d in digits], [int(d) for d in answer]), "".join(answer))
    answers = list(by_score.items())
    rng.shuffle(answers)
    order = sorted(range(len(answers)), key=lambda number: -answers[number][0])
    return {"prompt": f"{digits}=", "responses": [answer for _, answer in answers], "ranking": order}


def _worse(digits: str, rng: random.Random) -> str:
    """In order too, but one digit is another one: only the prompt says that it is worse."""
    answer = list(digits)
    place = rng.randrange(len(answer))
    answer[place] = rng.choice([digit for digit in "0123456789" if digit != answer[place]])
    return "".join(sorted(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
