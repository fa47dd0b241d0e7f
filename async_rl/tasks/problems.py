"""Problems from a file of JSON lines, as an environment's tasks.

[environment.options]
data = "problems.jsonl"                 # {"prompt": "...", "answer": "..."} a line
heldout = 100                           # or heldout_data = "heldout.jsonl"
template = "{prompt}\\nPut the answer in \\\\boxed{}."
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from async_rl.json_lines import Prompt, Row, Wrong, check_prompt, convert, read, short
from async_rl.tasks.source import Rows

PROMPT = "{prompt}"


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
    ) -> None:
        if PROMPT not in template:
            raise ValueError(f"template = {template!r}: write {PROMPT} where the prompt goes")
        if heldout and heldout_data:
            raise ValueError(f"heldout = {heldout}: write 0, or leave heldout_data out")
        self._solution, self._template, self._system, self._field = solution, template, system, prompt_field
        rows = [row.value for row in self._read(data)]
        others = self._read(heldout_data) if heldout_data else []
        for row in others:
            if row.value in rows:
                raise ValueError(f"{row} is a problem of data = {data!r} too; leave it out of one of them")
        self._rows = Rows(rows, heldout=heldout, seed=seed)
        self._heldout = [row.value for row in others]

    def train(self, index: int) -> Mapping[str, Any]:
        return self._rows.train(index)

    def heldout(self) -> Sequence[Mapping[str, Any]]:
        return self._heldout or self._rows.heldout()

    def _read(self, path: str) -> list[Row[dict[str, Any]]]:
        return read(Path(path), self._task)

    def _task(self, row: dict[str, Any]) -> dict[str, Any]:
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
        return {"messages": [*system, *messages], **self._solution(row)}
