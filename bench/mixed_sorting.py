"""Sorting of two, three and four digits, most of two, as data sets are: for curriculum.py. Most held-out are long."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from async_rl import Rows, environment
from async_rl.environments.sorting import sorting

SHARES = {2: 0.8, 3: 0.15, 4: 0.05}
"""digits -> share of the problems"""


class MixedSortingTasks:
    """problems: to train on. heldout: of each length."""

    def __init__(self, seed: int, problems: int = 3000, heldout: int = 100) -> None:
        draw = random.Random(f"mixed/{seed}")
        texts = {n: ["".join(draw.choices("0123456789", k=n)) for _ in range(problems + heldout)] for n in SHARES}
        kept = {n: list(dict.fromkeys(texts[n])) for n in SHARES}
        self._heldout = [
            {"digits": text, "reward": "distance"} for n in SHARES for text in kept[n][: heldout if n > 2 else 20]
        ]
        shown = {row["digits"] for row in self._heldout}
        rows = [
            {"digits": text, "reward": "distance", "difficulty": (n - 2) / 2}
            for n, share in SHARES.items()
            for text in [text for text in texts[n] if text not in shown][: round(share * problems)]
        ]
        self._rows = Rows(rows, heldout=0, seed=seed)
        self.num_problems, self.problem, self.train = self._rows.num_problems, self._rows.problem, self._rows.train

    def heldout(self) -> Sequence[Mapping[str, Any]]:
        return self._heldout


environment("mixed_sorting", tasks=MixedSortingTasks)(sorting)
