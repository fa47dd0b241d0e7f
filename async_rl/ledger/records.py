"""Pure: what the ledger writes, and under which key. Every value starts with the CRC-32 of its key and the rest."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import TypeAlias, TypeVar

import msgspec

from async_rl.errors import LedgerCorrupt
from async_rl.wire.messages import RolloutResult, Segment, Task, TerminalEvent

T = TypeVar("T")


class RunRecord(msgspec.Struct, frozen=True):
    """One per ledger: counters that survive the records they count."""

    epoch: int = 0
    """Controller starts so far; the run epoch of the frames."""
    lineage: int = 0
    """Learner starts so far, minus one."""
    next_group: int = 0
    """Groups admitted so far; also the task cursor."""
    next_event: int = 0
    admitted: int = 0
    """Rollouts, as are the terminal counts below."""
    trained: int = 0
    filtered: int = 0
    failed: int = 0
    cancelled: int = 0
    checkpoint: int = 0
    """Version of the newest durable checkpoint: every step below it is in there."""
    best_known_version: int = 0
    """Steps trained so far, over all lineages."""
    regenerated: int = 0
    """Tokens that were reported as sampled and had to be sampled again, because they died with their generator or the
    controller before they were durable. What was sampled since the last report is not known and not in here."""
    regenerated_most: int = 0
    """The most that one rollout lost at one death: at most rollout.segment_tokens, if that is not 0."""
    weighted_tokens: int = 0
    """Of the steps trained so far, each counted once: tokens within the staleness bound."""
    stale_tokens: int = 0
    """The same for tokens over it, which had no weight."""
    reasons: dict[str, dict[str, int]] = {}
    """terminal event -> kind of reason (`reason_kind`) -> rollouts"""


class GroupRecord(msgspec.Struct, frozen=True):
    """A group of which something may still be needed."""

    group_id: int
    version: int
    """Learner version at admission."""
    states: list[int]
    """[G] State of each member"""
    steps: list[int]
    """[G] the step whose batch used the member's slot; -1: none yet, -2: its credit was returned."""
    baseline: dict[int, float] = {}
    """member -> reward of those that had ended when the group was opened to training; empty: it is not open."""
    sampled: dict[int, int] = {}
    """running member -> tokens it had at the last report"""
    outcomes: dict[int, float] = {}
    """scored member -> what it says of its problem (ledger.Group.outcomes)"""


class StepRecord(msgspec.Struct, frozen=True):
    """The composition of one step, committed before the learner gets it."""

    step: int
    parts: list[tuple[int, list[int]]]
    """(group, members of it that are trained on); the other members are in other steps, or ended otherwise."""
    weighted_tokens: int
    """Sampled tokens within the staleness bound."""
    stale_tokens: int
    """Sampled tokens over it: weight 0."""
    max_weighted_lag: int
    """Largest lag among the tokens with weight: never above eta."""


class EventRecord(msgspec.Struct, frozen=True):
    """The terminal event of some members of a group."""

    group_id: int
    members: list[int]
    event: TerminalEvent
    reason: str
    step: int = -1


class ProblemRecord(msgspec.Struct, frozen=True):
    """A problem of a curriculum that was tried."""

    rate: float
    """Moving success rate, 0 to 1."""
    rollouts: int
    """Scored ones that it is made of."""


RUN = b"run"
MAX_KINDS = 20
"""Kinds of reasons that are told apart by event; what comes after them is "other"."""


def reason_kind(reason: str) -> str:
    """A reason without its particulars, so that there are few: user code words its errors as it likes.

    >>> reason_kind("ValueError: no number in 'x = y'"), reason_kind("stale"), reason_kind("no progress for 600 s")
    ('ValueError', 'stale', 'no progress')
    """
    if reason.startswith("no progress for "):
        return "no progress"
    if " generators died with it" in reason:
        return "generators died"
    kind = reason.partition(":")[0]
    return kind if kind.replace("_", "").isalnum() and len(kind) <= 40 else "other" if kind else ""


Reasons: TypeAlias = dict[str, dict[str, int]]


def count_reason(reasons: Reasons, event: str, reason: str, rollouts: int) -> Reasons:
    """`reasons` with so many rollouts more. A RunRecord is frozen, and may be on its way to the disk: a copy."""
    kinds, kind = reasons.get(event, {}), reason_kind(reason)
    if kind not in kinds and len(kinds) >= MAX_KINDS:
        kind = "other"
    return {**reasons, event: {**kinds, kind: kinds.get(kind, 0) + rollouts}}


def group_key(group_id: int) -> bytes:
    return b"group/%016x" % group_id


def task_key(group_id: int) -> bytes:
    return b"task/%016x" % group_id


def payload_key(group_id: int, member: int) -> bytes:
    return b"payload/%016x/%04x" % (group_id, member)


def payload_prefix(group_id: int) -> bytes:
    return b"payload/%016x/" % group_id


def segment_key(group_id: int, member: int, call: int, start: int) -> bytes:
    return b"segment/%016x/%04x/%04x/%08x" % (group_id, member, call, start)


def segment_prefix(group_id: int) -> bytes:
    return b"segment/%016x/" % group_id


def step_key(step: int) -> bytes:
    return b"step/%016x" % step


def event_key(number: int) -> bytes:
    return b"event/%016x" % number


def problem_key(number: int) -> bytes:
    return b"problem/%016x" % number


KINDS: dict[bytes, object] = {
    b"run": RunRecord,
    b"group": GroupRecord,
    b"task": Task,
    b"segment": Segment,
    b"payload": list[RolloutResult],
    b"step": StepRecord,
    b"event": EventRecord,
    b"problem": ProblemRecord,
}
"""First part of the key -> what stands under it."""
_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in KINDS.values()
}


def encode(key: bytes, record: object) -> bytes:
    body = _encoder.encode(record)
    return zlib.crc32(body, zlib.crc32(key)).to_bytes(4, "little") + body


class Encoded(Mapping[bytes, bytes | None]):
    """Records that are encoded when they are read: by the thread that writes them, and only what is still wanted then.
    Nobody may change them any more."""

    def __init__(self, records: Mapping[bytes, object | None]) -> None:
        self._records = records

    def __getitem__(self, key: bytes) -> bytes | None:
        record = self._records[key]
        return None if record is None else encode(key, record)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def decode(key: bytes, value: bytes, kind: type[T]) -> T:
    """Raises LedgerCorrupt, naming the record, if a byte of it or of its key changed."""
    body, name = value[4:], key.decode(errors="backslashreplace")
    if zlib.crc32(body, zlib.crc32(key)) != int.from_bytes(value[:4], "little"):
        raise LedgerCorrupt(f"record {name}: checksum does not match its {len(body)} bytes")
    try:
        return _decoders[kind].decode(body)  # type: ignore[return-value]
    except msgspec.MsgspecError as error:
        raise LedgerCorrupt(f"record {name}: {error}") from None


def decode_any(key: bytes, value: bytes) -> object:
    """Raises LedgerCorrupt also where the key is none of ours."""
    kind = KINDS.get(key.partition(b"/")[0])
    if kind is None:
        raise LedgerCorrupt(f"record {key.decode(errors='backslashreplace')}: there is no such kind")
    return decode(key, value, kind)  # type: ignore[arg-type]
