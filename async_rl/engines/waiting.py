"""Pure: requests that wait for a slot, those with an equal prompt together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from async_rl.engines.protocol import Request

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """Requests with an equal prompt that enter together and share one prefill."""

    prompt: Prompt
    requests: list[Request]
    more: bool
    """Others with this prompt found no slot and come next: keep what was computed for it."""


class Waiting:
    """First come, first served by prompt: a request joins those that already wait with the same prompt."""

    def __init__(self) -> None:
        self._by_prompt: dict[Prompt, dict[int, Request]] = {}
        self._prompts: dict[int, Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._prompts

    def add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._by_prompt.setdefault(request.prompt, {})[request.id] = request
            self._prompts[request.id] = request.prompt

    def remove(self, request_id: int) -> Request | None:
        """Take one out, wherever it stands; None if it does not wait here."""
        prompt = self._prompts.pop(request_id, None)
        if prompt is None:
            return None
        members = self._by_prompt[prompt]
        request = members.pop(request_id)
        if not members:
            del self._by_prompt[prompt]
        return request

    def take(self, slots: int, budget: int, ready: Prompt | None = None) -> list[Admission]:
        """Admit from the front until `slots` requests or `budget` prompt tokens; the first prompt always fits.

        `ready` is a prompt that needs no prefill and is free.
        """
        admissions: list[Admission] = []
        for prompt, members in self._by_prompt.items():
            cost = 0 if prompt == ready else len(prompt)
            if slots == 0 or (admissions and cost > budget):
                break
            requests = list(members.values())[:slots]
            admissions.append(Admission(prompt, requests, more=len(requests) < len(members)))
            slots -= len(requests)
            budget -= cost
        for admission in admissions:
            for request in admission.requests:
                self.remove(request.id)
        return admissions
