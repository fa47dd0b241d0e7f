"""Problems from a file of JSON lines, as an environment's tasks.

[environment.options]
data = "problems.jsonl"                 # {"prompt": "...", "answer": "..."} a line
heldout = 100                           # or heldout_data = "heldout.jsonl"
template = "{prompt}\\nPut the answer in \\\\boxed{}."
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from async_rl.json_lines import Prompt, Row, Wrong, check_prompt, convert, read, short
from async_rl.tasks.near_duplicates import HeldOut
from async_rl.tasks.source import Rows

PROMPT = "{prompt}"

log = logging.getLogger(__name__)


class _Asked(msgspec.Struct, frozen=True):
    prompt: Prompt


class Problems:
    """Tasks {"messages": [...], and whatever `solution` makes of a row}. In a new order every epoch.

    Args:
        data: the file; relative to the recipe.
        heldout: so many rows of it are held out, by the seed.
        heldout_data: a file of problems that are held out instead.
        template: the user's message, with {prompt} where the row's prompt goes; only for prompts that are texts.
        system: a system prompt; none if empty.
        prompt_field: what a row calls its prompt.
        decontaminate: leave out what nearly repeats a held-out problem (tasks.near_duplicates); a fifth of a
            millisecond a row, at every start.
        solution: what the reward needs, from a row. Raises Wrong.
    """

    def __init__(
        self,
        seed: int,
        solution: Callable[[Mapping[str, Any]], dict[str, Any]],
        *,
        data: str,
        heldout: int = 0,
        heldout_data: str = "",
        template: str = PROMPT,
        system: str = "",
        prompt_field: str = "prompt",
        decontaminate: bool = False,
    ) -> None:
        if PROMPT not in template:
            raise ValueError(f"template = {template!r}: write {PROMPT} where the prompt goes")
        if heldout and heldout_data:
            raise ValueError(f"heldout = {heldout}: write 0, or leave heldout_data out")
        self._solution, self._template, self._system, self._field = solution, template, system, prompt_field
        rows = [row.value for row in self._read("data", data)]
        others = self._read("heldout_data", heldout_data) if heldout_data else []
        for row in others:
            if row.value in rows:
                raise ValueError(f"{row} is a problem of data = {data!r} too; leave it out of one of them")
        self._rows = Rows(rows, heldout=heldout, seed=seed)
        self._heldout = [row.value for row in others] or self._rows.heldout()
        if decontaminate:
            self._rows = Rows(self._other_than_heldout(data), heldout=0, seed=seed)

    def train(self, index: int) -> Mapping[str, Any]:
        return self._rows.train(index)["task"]

    @property
    def num_problems(self) -> int:
        return self._rows.num_problems

    def problem(self, number: int, index: int) -> Mapping[str, Any]:
        return self._rows.problem(number, index)["task"]

    def heldout(self) -> Sequence[Mapping[str, Any]]:
        return [row["task"] for row in self._heldout]

    def _other_than_heldout(self, data: str) -> list[Mapping[str, Any]]:
        rows = [self._rows.problem(number, 0) for number in range(self._rows.num_problems)]
        against = HeldOut(row["asked"] for row in self._heldout)
        kept = [row for row in rows if not against.near(row["asked"])]
        if not kept:
            raise ValueError(f"decontaminate = true: every problem of data = {data!r} nearly repeats a held-out one")
        if len(kept) < len(rows):
            left_out = len(rows) - len(kept)
            log.warning("%d of %d problems nearly repeat a held-out one and are left out", left_out, len(rows))
        return kept

    def _read(self, option: str, path: str) -> list[Row[dict[str, Any]]]:
        if not Path(path).is_file():
            raise ValueError(f"{option} = {path!r}: there is no such file; write its path, relative to the recipe")
        return read(Path(path), self._task)

    def _task(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"asked": the problem without what all of them have in common, "task": what an episode gets}"""
        if self._field not in row:
            raise Wrong(f"{self._field} is missing (fields: {', '.join(row)}); write it, or set prompt_field")
        asked = convert({"prompt": row[self._field]}, _Asked).prompt
        check_prompt(asked)
        if isinstance(asked, str):
            messages = [{"role": "user", "content": self._template.replace(PROMPT, asked)}]
        elif self._template != PROMPT:
            raise Wrong(
                f"{self._field} = {short(row[self._field])}: a template is for texts; leave it out, or write one"
            )
        else:
            messages = cast("list[dict[str, str]]", msgspec.to_builtins(asked))
        system = [{"role": "system", "content": self._system}] if self._system else []
        difficulty = {"difficulty": row["difficulty"]} if "difficulty" in row else {}
        task = {"messages": [*system, *messages], **difficulty, **self._solution(row)}
        return {"asked": asked if isinstance(asked, str) else "\n".join(one.content for one in asked), "task": task}
