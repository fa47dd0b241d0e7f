"""What the engine keeps of every slot beside its KV: all in tensors, so that a decode step needs nothing of the host.

N slots in use.
"""

from __future__ import annotations

import torch

TOKEN, POSITION, KEY, OFFSET, DUE, STOPS = range(6)
"""Rows of `Slots.state`. The newest token, and its position in the sequence: where its KV will be written. Key and
offset of its uniform: counter = position + offset. The position at which the host must look. From STOPS on, stop
tokens."""

NO_TOKEN = -1


class Slots:
    """Starts in host memory."""

    def __init__(self, count: int, max_length: int, rotations: torch.Tensor) -> None:
        """rotations: Decoder.rotations(max_length)."""
        self.count = count
        self.stride = max_length + 1
        """Places of a slot in `tokens`. One more than a sequence has: a step that is launched before the host knows
        that a sequence is over may sample one token too many."""
        self.rotations = rotations
        self.indices = torch.arange(count)
        self.positions = torch.arange(max_length)
        self.state = torch.zeros((STOPS + 1, count), dtype=torch.int64)
        self.state[STOPS:] = NO_TOKEN
        self.temperature = torch.ones(count)
        self.greedy = torch.zeros(count, dtype=torch.bool)
        self.tokens = torch.empty((count, self.stride), dtype=torch.int32)
        """By position in the sequence; what the prompt says is not in it."""
        self.logprobs = torch.empty((count, self.stride), dtype=torch.float32)

    @property
    def stops(self) -> int:
        """Stop tokens that a slot has room for."""
        return self.state.shape[0] - STOPS

    def widen(self, stops: int) -> None:
        """Room for so many stop tokens in every slot."""
        if stops > self.stops:
            more = self.state.new_full((stops - self.stops, self.count), NO_TOKEN)
            self.state = torch.cat((self.state, more))

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Make some slots the same as others."""
        for per_slot in (self.temperature, self.greedy, self.tokens, self.logprobs):
            per_slot[targets] = per_slot[sources]
        self.state[:, targets] = self.state[:, sources]

    def move(self, device: torch.device) -> None:
        self.rotations, self.indices = self.rotations.to(device), self.indices.to(device)
        self.positions, self.state = self.positions.to(device), self.state.to(device)
        self.temperature, self.greedy = self.temperature.to(device), self.greedy.to(device)
        self.tokens, self.logprobs = self.tokens.to(device), self.logprobs.to(device)

    def addresses(self) -> tuple[int, ...]:
        """Change when a tensor is another one."""
        tensors = (self.rotations, self.indices, self.positions, self.state)
        return tuple(t.data_ptr() for t in (*tensors, self.temperature, self.greedy, self.tokens, self.logprobs))
