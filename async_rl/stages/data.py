"""From the files a recipe names to examples: read, checked, tokenised, split into training and held-out rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.errors import UserError
from async_rl.json_lines import Message, read
from async_rl.models.loading import load_config, load_stop_tokens, load_tokenizer
from async_rl.stages.config import StageRecipe
from async_rl.stages.examples import Examples, tokenise
from async_rl.stages.rows import (
    Conversation,
    OnlyPrompt,
    Pair,
    PromptResponse,
    Ranked,
    RewardRow,
    SFTRow,
    preference_row,
    prompt_response_row,
    prompt_row,
    reward_row,
    sft_row,
)
from async_rl.stages.schedule import set_apart
from async_rl.stages.templates import Templates, Tokens

Parse = Callable[[dict[str, Any]], Any]
Encode = Callable[[Any], list[Tokens]]


@dataclass(frozen=True, slots=True)
class StageData:
    """Training and held-out rows are rows of the same examples."""

    examples: Examples
    values: list[Any]
    """What each row said (stages.rows)."""
    train: list[int]
    heldout: list[int]
    dropped: int
    """Rows of both files that were too long."""
    files: dict[str, dict[str, Any]]
    """Path -> sha256 and rows."""


def load_data(recipe: StageRecipe) -> StageData:
    """Raises UserError where a file, a line, or the split is wrong."""
    stage = recipe.stage
    parse, encode = _format(recipe, _templates(recipe))
    longest = int(load_config(recipe.model).max_position_embeddings)
    cap = recipe.learner.microbatch_tokens
    allowed = min(stage.max_tokens or longest, longest, cap)
    ends = int(stage.kind == "reward-model")
    if stage.kind == "distill" and recipe.distill.responses != "data":
        allowed -= recipe.distill.max_new_tokens
        cap = allowed
        if allowed < 1:
            raise UserError(
                f"distill.max_new_tokens = {recipe.distill.max_new_tokens}: no token is left for the prompt of a "
                f"sequence of at most {allowed + recipe.distill.max_new_tokens}; write less"
            )
    paths = [Path(path) for path in (stage.train, stage.heldout) if path]
    parts = [
        tokenise(read(path, parse), encode, max_tokens=allowed, cap=cap, too_long=stage.too_long, ends=ends)
        for path in paths
    ]
    rows, sequences = parts[0][0], parts[0][1]
    if stage.heldout:
        train, heldout = list(range(len(rows))), list(range(len(rows), len(rows) + len(parts[1][0])))
        rows, sequences = rows + parts[1][0], sequences + parts[1][1]
    else:
        if stage.heldout_rows >= len(rows):
            raise UserError(f"stage.heldout_rows = {stage.heldout_rows}: there are {len(rows)} rows; write less")
        train, heldout = set_apart(len(rows), stage.heldout_rows, recipe.seed)
    return StageData(
        Examples.of(sequences, scored=bool(ends)),
        [row.value for row in rows],
        train,
        heldout,
        sum(dropped for _, _, dropped in parts),
        {str(path): facts(path) for path in paths},
    )


def load_references(recipe: StageRecipe) -> Examples | None:
    """The answers that a reward model scores 0 on average, where the recipe names a file of them."""
    if not recipe.reward_model.references:
        return None
    templates, path = _templates(recipe), Path(recipe.reward_model.references)
    longest, cap = int(load_config(recipe.model).max_position_embeddings), recipe.learner.microbatch_tokens

    def encode(row: PromptResponse) -> list[Tokens]:
        return [templates.pair(row.prompt, row.response)]

    _, sequences, _ = tokenise(
        read(path, prompt_response_row), encode, max_tokens=min(longest, cap), cap=cap, too_long="error", ends=1
    )
    return Examples.of(sequences, scored=True)


def _templates(recipe: StageRecipe) -> Templates:
    stage, tokenizer = recipe.stage, load_tokenizer(recipe.model)
    stop = load_stop_tokens(recipe.model)
    return Templates(tokenizer, stop, template=stage.template, prompt_format=stage.prompt_format)


def facts(path: Path) -> dict[str, Any]:
    """By which a file is known again."""
    content = path.read_bytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def _format(recipe: StageRecipe, templates: Templates) -> tuple[Parse, Encode]:
    """What a row of this stage is, and the sequences it becomes."""

    def sft(row: SFTRow) -> list[Tokens]:
        match row:
            case PromptResponse(prompt, response):
                return [templates.pair(prompt, response)]
            case Conversation(messages) if recipe.stage.train_on == "assistant":
                return [templates.conversation(messages)]
            case Conversation(messages):
                return [templates.pair(_before(messages), messages[-1].content)]
            case _:
                return [templates.text(row.text)]

    def answers(row: RewardRow) -> list[Tokens]:
        """Best first."""
        match row:
            case Pair():
                return [templates.pair(row.prompt, answer) for answer in (row.chosen, row.rejected)]
            case Ranked():
                return [templates.pair(row.prompt, row.responses[number]) for number in row.ranking]

    def prompt(row: OnlyPrompt) -> list[Tokens]:
        tokens = templates.prompt(row.prompt)
        return [Tokens(tokens, [False] * len(tokens))]

    match recipe.stage.kind:
        case "preference":
            return preference_row, answers
        case "reward-model":
            return reward_row, answers
        case "distill" if recipe.distill.responses != "data":
            return prompt_row, prompt
        case "distill":
            return prompt_response_row, sft
        case _:
            return sft_row, sft


def _before(messages: list[Message]) -> list[Message]:
    if len(messages) == 1:
        raise UserError("messages: one message of the assistant has no prompt; write a user message before it, or text")
    return messages[:-1]
