"""Pure: what goes to a SGLang server and what comes back, as of SGLang 0.5.23. No sockets, no torch.

A request is sent in pieces: each samples at most `segment_tokens` tokens after everything the request has so far, and
only the end of a piece says which weights sampled which token (`weight_versions`). So a delivered chunk is a whole
piece, exact to the token, and what a dying server takes with it is one piece.

What a reader has to know of the server:

- log-probs are log_softmax(logits / temperature) over the whole vocabulary; greedy ones at temperature 1.
- `ignore_eos` also switches off `stop_token_ids`, and without it the model's own end tokens stop too: a piece that ends
  at a token the request does not stop at is continued.
- A request id is aborted by PREFIX: ids of one length are the only safe ones.
- Events are cumulative, or increments under --incremental-streaming-output; the abort of a request that waits is always
  cumulative. The count of tokens says which.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from async_rl.engines.protocol import Float32s, Int32s, Request
from async_rl.errors import AsyncRLError
from async_rl.wire.messages import VersionSpan, WeightsId

TESTED = "0.5.23"
"""The version of SGLang that all of this was written for and tested with."""
RID_DIGITS = 16
CONTEXT_RESERVE = 2
"""The server samples up to so many tokens less than the model's context holds."""
INPUT_RESERVE = 7
"""A piece begins so many tokens before the end of the context at the latest."""


ASLEEP, EMPTY, HALF = "async_rl.asleep", "async_rl.empty", "async_rl.half"
"""What the weights of a server are called that gave its memory back; that has it again, with no sensible content; that
got some of the buckets (of whom: `half_name`). The server keeps the name as long as it lives: whoever comes next learns
from it what is there, and a token that was sampled there all the same is nobody's."""


VERSION_NAME = re.compile(r"(async_rl-[0-9a-f]+)\.(\d+)\.(-?\d+)", re.ASCII)


class ContractBroken(AsyncRLError):
    """The server said something that its contract does not allow."""


def new_owner() -> str:
    """What an engine calls itself in the names of its weights. No two engines are called the same; of two, the one that
    came later sorts behind the other."""
    return f"async_rl-{time.time_ns():016x}{secrets.token_hex(2)}"


def version_name(owner: str, weights: WeightsId) -> str:
    """How weights are called on the server: `owner.lineage.version`.

    >>> version_name("async_rl-1871f0a7", WeightsId(0, 12))
    'async_rl-1871f0a7.0.12'
    """
    return f"{owner}.{weights.lineage}.{weights.version}"


def half_name(owner: str) -> str:
    """What weights are called of which the server got some buckets, as long as nobody else loads any."""
    return f"{HALF}.{owner}"


def parse_version(text: str) -> tuple[str, WeightsId] | None:
    """(owner, weights); None where these are weights of no engine of ours."""
    found = VERSION_NAME.fullmatch(text)
    return None if found is None else (found[1], WeightsId(int(found[2]), int(found[3])))


def generate_body(pieces: Sequence[Piece], *, stream_tokens: int, salt: str) -> dict[str, Any]:
    """One call for pieces that begin with the same tokens (a group): the server prefills them once. A call for one
    piece has no lists, because routers take none.

    stream_tokens: hear of the progress of a piece every so many tokens. Where no piece has more, there is one answer
    when all of them have ended: events cost the server more than a few tokens do.
    salt: pieces of another salt share no cached prefix with these; empty: none.
    """
    fields: dict[str, list[Any]] = {
        "rid": [piece.rid for piece in pieces],
        "input_ids": [piece.input for piece in pieces],
        "sampling_params": [_sampling(piece, stream_tokens) for piece in pieces],
    }
    if salt:
        fields["extra_key"] = [salt] * len(pieces)
    one = len(pieces) == 1
    return {name: values[0] if one else values for name, values in fields.items()} | {
        "return_logprob": True,
        "stream": max(piece.limit for piece in pieces) > stream_tokens,
    }


def _sampling(piece: Piece, stream_tokens: int) -> dict[str, Any]:
    request = piece.request
    return {
        "max_new_tokens": piece.limit,
        "temperature": request.temperature,
        "stop_token_ids": sorted(request.stop),
        "ignore_eos": not request.stop,
        "stream_interval": stream_tokens,
    }


@dataclass(slots=True)
class Piece:
    """The part of a request that is with a server, or goes there next."""

    request: Request
    rid: str
    input: list[int]
    """Prompt, and what earlier pieces sampled."""
    limit: int
    """Tokens it samples at most."""
    tokens: list[int] = field(default_factory=list[int])
    """So far."""
    logprobs: list[float] = field(default_factory=list[float])
    reason: str | None = None
    """`stop`, `length` or `abort` once it has ended."""
    matched: int | None = None
    """The token that stopped it."""
    versions: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    """(version, start, end) over its tokens, once it has ended."""

    def take(self, event: dict[str, Any]) -> int:
        """What one event says about it. Returns how many tokens are new.

        Raises:
            ContractBroken: the counts do not fit together.
        """
        meta = event["meta_info"]
        entries: list[list[Any]] = meta.get("output_token_logprobs") or []
        total, before = int(meta["completion_tokens"]), len(self.tokens)
        if len(entries) == total:
            self.tokens, self.logprobs = [], []
        elif before + len(entries) != total:
            raise ContractBroken(f"request {self.rid}: {len(entries)} tokens after {before} do not make {total}")
        self.tokens += [int(entry[1]) for entry in entries]
        self.logprobs += [float(entry[0]) for entry in entries]
        finish = meta.get("finish_reason")
        if finish is not None:
            self._end(finish, meta)
        return total - before

    def _end(self, finish: dict[str, Any], meta: dict[str, Any]) -> None:
        self.reason = finish["type"]
        matched = finish.get("matched")
        self.matched = matched if isinstance(matched, int) else None
        self.versions = [(s["version"], s["start"], s["end"]) for s in meta.get("weight_versions") or []]
        covered = self.versions[-1][2] if self.versions else 0
        if self.tokens and covered != len(self.tokens):
            raise ContractBroken(f"request {self.rid}: versions of {covered} tokens, there are {len(self.tokens)}")

    def arrays(self) -> tuple[Int32s, Float32s]:
        return np.asarray(self.tokens, np.int32), np.asarray(self.logprobs, np.float32)

    def spans(self, owner: str, kv: WeightsId | None) -> list[VersionSpan] | None:
        """Over its tokens. owner: the engine that asks. kv: the oldest weights that may have written its cache; None:
        those that sampled.

        None where weights sampled that another engine loaded, or that are none of an engine at all: such tokens are
        worth nothing. Lineages of one engine may meet in a piece.
        """
        spans: list[VersionSpan] = []
        for name, start, end in self.versions:
            if end == start:
                continue
            parsed = parse_version(name)
            if parsed is None or parsed[0] != owner:
                return None
            weights = parsed[1]
            oldest = weights.version if kv is None else min(kv.version, weights.version)
            spans.append(VersionSpan(start, end, weights.version, oldest))
        return spans


def piece_limit(position: int, remaining: int, segment_tokens: int | None, max_input: int) -> int:
    """Tokens of the next piece of a request that has `position` tokens, prompt included, and may sample `remaining`.

    Where the piece after this one could not begin, because its input would be too long, this one goes to the end.
    """
    limit = min(remaining, segment_tokens or remaining)
    return remaining if position + limit > max_input else limit
