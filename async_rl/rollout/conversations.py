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
from dataclasses import dataclass, field
from itertools import chain
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


@dataclass(slots=True, eq=False)
class _Turn:
    """A prompt that was answered, without what it has in common with the turn it goes on from."""

    text: str
    """Of the prompt, after the prompt before it: the template's version of that one's reply is in it."""
    tokens: tuple[int, ...]
    """Of the prompt, after the reply before it."""
    said: tuple[int, ...]
    before: _Turn | None
    after: list[_Turn] = field(default_factory=list["_Turn"])

    def all_tokens(self) -> tuple[int, ...]:
        """From the first prompt to this reply."""
        pieces: list[tuple[int, ...]] = []
        turn: _Turn | None = self
        while turn is not None:
            pieces += (turn.said, turn.tokens)
            turn = turn.before
        return tuple(chain.from_iterable(reversed(pieces)))


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: tuple[int, ...]
    text: str = ""
    """The rendered conversation."""
    goes_on_from: _Turn | None = None
    own_text: str = ""
    own_tokens: tuple[int, ...] = ()
    """What it does not have in common with that turn."""

    @property
    def opens_thoughts(self) -> bool:
        """The reply begins among thoughts."""
        return self.text.rstrip().endswith(THINK)


class Conversations:
    """Of one episode. `prompt`, then `said` once the policy answered it.

    The turns are a tree, so that a conversation of many turns is held once and not once per turn.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._first: list[_Turn] = []

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        rendered = self._text.render(messages, tools)
        for turn, end in self._begun(rendered):
            rest = self._after(turn, rendered[end:])
            if rest is not None:
                return Prompt(turn.all_tokens() + rest, rendered, turn, rendered[end:], rest)
        tokens = self._text.encode(rendered)
        return Prompt(tokens, rendered, None, rendered, tokens)

    def said(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        """`tokens`: sampled, the one that ends the turn included."""
        if not tokens:
            return
        before = prompt.goes_on_from
        siblings = self._first if before is None else before.after
        siblings.append(_Turn(prompt.own_text, prompt.own_tokens, tuple(tokens), before))

    def _begun(self, rendered: str) -> list[tuple[_Turn, int]]:
        """The turns with whose prompts a conversation begins, and where those end in it: the longest first, of equal
        ones the deepest and the latest."""
        found: list[tuple[int, int, int, _Turn]] = []
        waiting = [(turn, 0, 0) for turn in self._first]
        while waiting:
            turn, start, depth = waiting.pop()
            if rendered.startswith(turn.text, start):
                end = start + len(turn.text)
                found.append((end, depth, -len(found), turn))
                waiting += [(later, end, depth + 1) for later in turn.after]
        found.sort(key=lambda one: one[:3], reverse=True)
        return [(turn, end) for end, _, _, turn in found]

    def _after(self, turn: _Turn, rest: str) -> tuple[int, ...] | None:
        """The tokens after the reply of `turn`, whose prompt `rest` follows; None if it does not go on from there."""
        text, stops = self._text, {token: self._text.spell([token]) for token in self._text.stop_tokens}
        said, last = text.decode(turn.said), turn.said[-1]
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

    def _meaning(self, turn: _Turn, said: str) -> tuple[str, str | None, list[Called]]:
        """Templates write thoughts and calls of tools in their own way."""
        opened = turn.text.rstrip().endswith(THINK)
        read = read_reply(said, thinks=self._text.thinks, opened=opened, tools=True)
        return read.content.strip(), read.reasoning, read.calls
