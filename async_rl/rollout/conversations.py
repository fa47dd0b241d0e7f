"""Pure: prompts of conversations in which every earlier reply keeps the token ids that were sampled.

Text that is decoded and encoded again often comes back as other tokens, and then a conversation of many turns would be
trained on as so many sequences, each with tokens that nobody sampled. So a prompt is put together from pieces:

    rendered template:  <prompt of an earlier call> <its reply, as the template writes it> <stop> <the rest>
    tokens:             as they were asked           as they were sampled                          encoded now

That is done where the text says so, and only there: the rendered conversation begins with an earlier prompt, and what
follows, up to the token that ends a turn, says what was sampled. A history that was edited, or thoughts that the
template leaves out of earlier turns, make another text, which is encoded as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from async_rl.environments.api import Message, Tool
from async_rl.rollout.replies import THINK, Called, read_reply


class Text(Protocol):
    """The tokenizer, as far as rollouts need it (tokenizer_text for real models)."""

    stop_tokens: frozenset[int]
    thinks: bool
    """The chat template knows thoughts."""

    def encode(self, text: str) -> tuple[int, ...]: ...

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """A conversation under the chat template, ready for the reply."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Special tokens leave nothing."""
        ...

    def spell(self, tokens: Sequence[int]) -> str:
        """Special tokens are written out."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: tuple[int, ...]
    text: str

    @property
    def opens_thoughts(self) -> bool:
        """The reply begins among thoughts."""
        return self.text.rstrip().endswith(THINK)


@dataclass(frozen=True, slots=True)
class _Turn:
    prompt: Prompt
    said: tuple[int, ...]


class Conversations:
    """Of one episode. `prompt`, then `said` once the policy answered it."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._turns: list[_Turn] = []
        """From the shortest prompt to the longest; of equal ones the latest last."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        rendered = self._text.render(messages, tools)
        for turn in reversed(self._turns):
            rest = self._after(turn, rendered)
            if rest is not None:
                return Prompt(turn.prompt.tokens + turn.said + rest, rendered)
        return Prompt(self._text.encode(rendered), rendered)

    def said(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        """`tokens`: sampled, the one that ends the turn included."""
        if tokens:
            self._turns.append(_Turn(prompt, tuple(tokens)))
            self._turns.sort(key=lambda turn: (len(turn.prompt.text), len(turn.prompt.tokens)))

    def _meaning(self, turn: _Turn, said: str) -> tuple[str, str | None, list[Called]]:
        """Templates write thoughts and calls of tools in their own way."""
        read = read_reply(said, thinks=self._text.thinks, opened=turn.prompt.opens_thoughts, tools=True)
        return read.content.strip(), read.reasoning, read.calls

    def _after(self, turn: _Turn, rendered: str) -> tuple[int, ...] | None:
        """The tokens after the reply of `turn`; None if the conversation does not go on from there."""
        if not rendered.startswith(turn.prompt.text):
            return None
        text, stops = self._text, {token: self._text.spell([token]) for token in self._text.stop_tokens}
        rest, said = rendered[len(turn.prompt.text) :], text.decode(turn.said)
        last = turn.said[-1]
        ends = [stops[last]] if last in stops else list(stops.values())
        cut = min((at for end in ends if (at := rest.find(end)) >= 0), default=None)
        if cut is None:  # a template that writes nothing at the end of a turn
            cut = len(said)
            if any(rest.startswith(stop, cut) for stop in stops.values()):
                return None  # it writes another stop than was sampled
        if rest[:cut].strip() != said.strip() and self._meaning(turn, rest[:cut]) != self._meaning(turn, said):
            return None
        tail = text.encode(rest[cut:])  # with the stop before it, so that no text begins in the middle
        return tail[1:] if last in stops and tail[:1] == (last,) else tail
