"""Continuous batching, step by step and without threads: the core of the embedded engine.

A sequence occupies one slot of the KV cache. Before a decode step the occupied slots are the first ones, without
gaps, so that the step works on slices and copies nothing. Per token the host does nothing: tokens and log-probs stay
in tensors until a sequence ends, and which weights sampled which token follows from the ticks of the swaps
(engines.versions).

Before the first swap nothing is on the device, and after `release` nothing is again: what was sampled then lies in host
memory, and the next swap puts it back and computes the KV cache anew under its weights.

N sequences or tokens, P prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from async_rl.engines import validation
from async_rl.engines.decoder import Decoder, DecoderWeights
from async_rl.engines.decoding import sample
from async_rl.engines.draw import signed
from async_rl.engines.kv_cache import KVCache
from async_rl.engines.make_steps import Kind, make_steps
from async_rl.engines.protocol import Chunk, Request
from async_rl.engines.readback import Flags, HostFlags, make_readback
from async_rl.engines.runs import cut
from async_rl.engines.slots import DUE, NO_TOKEN, Slots
from async_rl.engines.steps import Batch
from async_rl.engines.versions import Entry, VersionLog
from async_rl.engines.waiting import Admission, Prompt, Waiting
from async_rl.wire.messages import FinishReason, VersionSpan, WeightsId

PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}
"""Prompt tokens computed in one step, so that sequences in flight are not held up for long."""


@dataclass(slots=True)
class Row:
    """A sequence in a slot, as the host sees it."""

    request: Request
    entry: Entry
    delivered: int = 0
    """Tokens that went out in earlier chunks."""

    def sampled(self, tick: int) -> int:
        return tick - self.entry.tick + 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays the same from step to step while the same sequences are in the slots."""

    rows: list[Row]
    """Of slots 0, 1, ..., none missing."""
    batch: Batch


@dataclass(frozen=True, slots=True)
class Unread:
    """A step at whose flags the host has not looked."""

    tick: int
    rows: list[Row]
    flags: Flags


@dataclass(frozen=True, slots=True)
class ComputedPrompt:
    """A prompt some of whose requests found no slot yet."""

    prompt: Prompt
    kv: torch.Tensor
    logits: torch.Tensor
    """[V] after its last token."""


class Batcher:
    """Requests in, chunks out. Not thread-safe: one caller at a time, except `check` and `prepare`."""

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        prefill_tokens: int | None = None,
        steps: Kind = "auto",
    ) -> None:
        """steps: how a decode step is computed (engines.make_steps)."""
        limit: int = getattr(config, "max_position_embeddings")  # noqa: B009, the base class does not declare it
        self.slots = slots
        self.max_length = min(max_length, limit) if max_length else limit
        self.weights: WeightsId | None = None
        self._decoder = Decoder(config, dtype=dtype, device=device)
        self._device = device
        self._prefill_tokens = prefill_tokens or PREFILL_TOKENS.get(device.type, PREFILL_TOKENS["cuda"])
        self._live: DecoderWeights | None = None
        """None: nothing is on the device."""
        self._versions = VersionLog()
        self._tick = 0
        self._waiting = Waiting()
        self._rows: list[Row | None] = []
        self._slot_of: dict[int, int] = {}
        self._computed: ComputedPrompt | None = None
        self._plan: Plan | None = None
        self._cache = KVCache(
            layers=self._decoder.num_layers,
            slots=slots,
            kv_heads=self._decoder.kv_heads,
            head_size=self._decoder.head_size,
            max_length=self.max_length,
            dtype=dtype,
            device=device,
        )
        self._state = Slots(slots, self.max_length, self._decoder.rotations(self.max_length))
        self._steps = make_steps(steps, self._decoder, self._cache, self._state)
        self._readback = make_readback(device, slots)
        self._unread: Unread | None = None
        """The step before the next one, where the host looks late."""

    # --- what a caller does ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """A step would sample something."""
        return self._live is not None and bool(self._slot_of or len(self._waiting))

    @property
    def num_running(self) -> int:
        """Sequences in slots. From any thread."""
        return len(self._slot_of)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot. From any thread."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that can never be served."""
        validation.check(request, vocabulary=self._decoder.vocabulary, max_length=self.max_length)

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests that passed `check` wait for a slot. Their ids are unique among those alive."""
        for request in requests:
            if request.id in self._slot_of or request.id in self._waiting:
                raise ValueError(f"request {request.id} is alive already")
        self._waiting.add(requests)

    @torch.inference_mode()
    def cancel(self, request_ids: Iterable[int]) -> list[Chunk]:
        chunks = self.settle()
        slots: list[int] = []
        for request_id in dict.fromkeys(request_ids):
            if self._waiting.remove(request_id) is not None:
                chunks.append(Chunk(request_id, np.empty(0, np.int32), np.empty(0, np.float32), [], "aborted"))
            elif request_id in self._slot_of:
                slots.append(self._slot_of[request_id])
        return chunks + self._collect(slots, self._tick, aborted=True)

    def prepare(self, tensors: Mapping[str, Any]) -> DecoderWeights:
        """A set of weights ready for `swap`. Slow, and safe to call from another thread while steps run."""
        with self._readback.apart():
            return self._decoder.prepare(tensors)

    @torch.inference_mode()
    def swap(self, weights: WeightsId, prepared: DecoderWeights) -> None:
        """Every token from the next step on is sampled with these weights. Sequences in flight keep their KV; after a
        `release` it is computed anew."""
        was_released = self._live is None
        self._live = self._steps.swap(self._live, prepared)
        self.weights = weights
        self._versions.swap(self._tick, weights.version, recomputed=was_released)
        self._computed = None  # a new sequence never attends to KV of older weights
        if was_released:
            self._state.move(self._device)
            self._recompute(self._live)

    @torch.inference_mode()
    def release(self) -> None:
        """Hold nothing on the device until the next `swap`; sequences in flight keep what they sampled."""
        if self._unread is not None:
            self._unread.flags.read()
        self._live = self._computed = None
        self._steps.release()
        self._cache.release()
        self._state.move(torch.device("cpu"))

    def sampled(self) -> dict[int, int]:
        """request id -> tokens sampled of it so far; of those in a slot."""
        return {row.request.id: row.sampled(self._tick) for row in self._rows if row is not None}

    @torch.inference_mode()
    def settle(self) -> list[Chunk]:
        """Chunks of steps that ran already: on a GPU, `step` returns those of the step before."""
        unread, self._unread = self._unread, None
        if unread is None:
            return []
        self._readback.mark()
        return self._look_at(unread)

    @torch.inference_mode()
    def step(self) -> list[Chunk]:
        """Admit what waits as far as slots and budget allow, then sample one token for every sequence."""
        assert self._live is not None, "step without weights"
        chunks = self._admit(self._live)
        if self._slot_of:
            if self._plan is None:
                self._plan = self._make_plan(self._close_gaps())
            chunks += self._decode(self._live, self._plan)
        return chunks

    # --- admission ------------------------------------------------------------------------------------------

    def _admit(self, live: DecoderWeights) -> list[Chunk]:
        free = self.slots - len(self._slot_of)
        if free == 0 or not len(self._waiting):
            return []
        computed = self._computed
        admissions = self._waiting.take(free, self._prefill_tokens, computed.prompt if computed else None)
        # Prompts of one length next to each other: they attend in one call.
        admissions.sort(key=lambda admission: len(admission.prompt))
        gaps = [slot for slot, row in enumerate(self._rows) if row is None]
        places = iter([*gaps, *range(len(self._rows), self.slots)])
        slots = [[next(places) for _ in admission.requests] for admission in admissions]
        self._cache.reserve(len(admissions[-1].prompt))

        ready = [computed is not None and admission.prompt == computed.prompt for admission in admissions]
        fresh = [i for i, is_ready in enumerate(ready) if not is_ready]
        prefilled: Iterable[torch.Tensor] = ()
        if fresh:
            hidden = self._prefill(live, [admissions[i].prompt for i in fresh], [slots[i] for i in fresh])
            prefilled = self._decoder.logits(live, hidden)
        logits = dict(zip(fresh, prefilled, strict=True))
        if computed is not None and True in ready:
            i = ready.index(True)
            self._cache.scatter(self._tensor(slots[i]), computed.kv)
            logits[i] = computed.logits
        self._computed = None
        for i, admission in enumerate(admissions):
            if admission.more:
                kv = self._cache.gather(slots[i][0], len(admission.prompt))
                self._computed = ComputedPrompt(admission.prompt, kv, logits[i])
        return self._enter(admissions, slots, torch.stack([logits[i] for i in range(len(admissions))]))

    def _prefill(self, live: DecoderWeights, prompts: Sequence[Prompt], slots: Sequence[list[int]]) -> torch.Tensor:
        """KV of every prompt, computed once and written to each of its slots; hidden states [P, C] of its last token.
        Prompts of one length next to each other attend in one call."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = lengths.cumsum()
        positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        # One entry for every token of every slot: which computed token it is, and where in the cache it goes.
        members = np.repeat(np.arange(len(prompts)), [len(s) for s in slots])
        member_lengths = lengths[members]
        member_ends = member_lengths.cumsum()
        local = np.arange(member_ends[-1]) - np.repeat(member_ends - member_lengths, member_lengths)
        sources = self._tensor(np.repeat((ends - lengths)[members], member_lengths) + local)
        flat_slots = np.array([slot for group in slots for slot in group])
        places = self._tensor(np.repeat(flat_slots * self._cache.length, member_lengths) + local)
        runs = cut(lengths.tolist(), 0)
        grouped = self._decoder.heads != self._decoder.kv_heads

        def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            self._cache.write(layer, places, kv.index_select(0, sources))
            k, v = kv.chunk(2, dim=1)
            outputs: list[torch.Tensor] = []
            for run in runs:
                first, last = int(ends[run.first]) - run.length, int(ends[run.last - 1])
                q_run, k_run, v_run = (x[first:last].unflatten(0, (-1, run.length)).transpose(1, 2) for x in (q, k, v))
                output = F.scaled_dot_product_attention(q_run, k_run, v_run, is_causal=True, enable_gqa=grouped)
                outputs.append(output.transpose(1, 2).flatten(2).flatten(0, 1))
            return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

        tokens = self._tensor([token for prompt in prompts for token in prompt])
        hidden = self._decoder.forward(live, tokens, self._state.rotations[self._tensor(positions)], attend)
        return hidden[self._tensor(ends - 1)]

    def _recompute(self, live: DecoderWeights) -> None:
        """The KV cache of the sequences in flight, up to the token before the newest, whose KV the next step writes."""
        tokens = self._state.tokens.cpu().numpy()
        known: list[tuple[Prompt, int]] = []
        for slot, row in enumerate(self._rows):
            if row is not None:
                first, count = len(row.request.prompt), row.sampled(self._tick)
                known.append((row.request.prompt + tuple(tokens[slot, first : first + count - 1].tolist()), slot))
        if not known:
            return
        known.sort(key=lambda sequence: len(sequence[0]))
        self._cache.reserve(len(known[-1][0]))
        while known:
            ends = np.cumsum([len(sequence) for sequence, _ in known])
            count = max(1, int(np.searchsorted(ends, self._prefill_tokens, side="right")))
            self._prefill(live, [sequence for sequence, _ in known[:count]], [[slot] for _, slot in known[:count]])
            known = known[count:]

    def _enter(self, admissions: list[Admission], slots: list[list[int]], logits_PV: torch.Tensor) -> list[Chunk]:
        """Put the requests into their slots and sample the first token of each."""
        entry = self._versions.enter(self._tick)
        requests = [request for admission in admissions for request in admission.requests]
        flat = [slot for group in slots for slot in group]
        self._rows += [None] * (max(flat) + 1 - len(self._rows))
        self._state.widen(max(len(request.stop) for request in requests))
        columns: list[list[int]] = []
        for slot, request in zip(flat, requests, strict=True):
            length = len(request.prompt)
            due = length + min(request.max_new_tokens, request.segment_tokens or request.max_new_tokens) - 1
            padding = [NO_TOKEN] * (self._state.stops - len(request.stop))
            columns.append([0, length, signed(request.key), request.position - length, due, *request.stop, *padding])
            self._rows[slot] = Row(request, entry)
            self._slot_of[request.id] = slot
        where = self._tensor(flat)
        self._state.state[:, where] = self._tensor(columns).T
        temperatures = [request.temperature for request in requests]
        self._state.temperature[where] = torch.tensor([t or 1.0 for t in temperatures], device=self._device)
        self._state.greedy[where] = torch.tensor([t == 0 for t in temperatures], device=self._device)
        self._plan = None
        members = np.repeat(np.arange(len(admissions)), [len(s) for s in slots])
        logits_NV = logits_PV[self._tensor(members)]
        mixed = {"tempered": any(t not in (0, 1) for t in temperatures), "greedy": 0 in temperatures}
        due = HostFlags(sample(self._state, where, logits_NV, **mixed)).read()
        self._readback.mark()
        return self._collect([flat[i] for i in due], self._tick)

    # --- decoding -------------------------------------------------------------------------------------------

    def _decode(self, live: DecoderWeights, plan: Plan) -> list[Chunk]:
        self._tick += 1
        self._readback.mark()
        due_N = self._steps(live, plan.batch, self._tick)
        earlier = self._unread
        self._unread = Unread(self._tick, plan.rows, self._readback.flags(due_N))
        if not self._steps.late:
            return self.settle()
        return [] if earlier is None else self._look_at(earlier)

    def _look_at(self, unread: Unread) -> list[Chunk]:
        due = [unread.rows[i] for i in unread.flags.read()]
        slots = [self._slot_of.get(row.request.id) for row in due]
        alive = [slot for slot, row in zip(slots, due, strict=True) if slot is not None and self._rows[slot] is row]
        return self._collect(alive, unread.tick)

    def _make_plan(self, rows: list[Row]) -> Plan:
        lengths = [len(row.request.prompt) - row.entry.tick for row in rows]
        temperatures = {row.request.temperature for row in rows}
        mixed = {"tempered": not temperatures <= {0, 1}, "greedy": 0 in temperatures}
        return Plan(rows, self._steps.batch(lengths, **mixed))

    # --- delivery -------------------------------------------------------------------------------------------

    def _collect(self, slots: Sequence[int], tick: int, *, aborted: bool = False) -> list[Chunk]:
        """The new tokens of these slots up to a tick that was marked; sequences that are over leave."""
        if not slots:
            return []
        rows = [self._row(slot) for slot in slots]
        counts = [row.sampled(tick) for row in rows]
        starts = [len(row.request.prompt) for row in rows]
        low = min(start + row.delivered for start, row in zip(starts, rows, strict=True))
        high = max(start + count for start, count in zip(starts, counts, strict=True))
        with self._readback.aside():
            where = self._tensor(slots)
            tokens = self._state.tokens[where, low:high].cpu().numpy()
            logprobs = self._state.logprobs[where, low:high].cpu().numpy()
        chunks: list[Chunk] = []
        known: dict[tuple[Entry, int, int], list[VersionSpan]] = {}  # what entered together has the same spans
        for i, (slot, row, count, start) in enumerate(zip(slots, rows, counts, starts, strict=True)):
            request = row.request
            new = slice(start + row.delivered - low, start + count - low)
            reason: FinishReason | None = None
            if aborted:
                reason = "aborted"
            elif tokens[i, new.stop - 1] in request.stop:
                reason = "eos"
            elif count >= request.max_new_tokens:
                reason = "length"
            elif request.segment_tokens is not None and count < row.delivered + request.segment_tokens:
                continue  # the step did not know yet that its last chunk had gone out
            lived = (row.entry, row.delivered, count)
            spans = known.get(lived)
            if spans is None:
                spans = known[lived] = self._versions.spans(*lived)
            chunks.append(Chunk(request.id, tokens[i, new], logprobs[i, new], list(spans), reason))
            if reason is None:
                assert request.segment_tokens is not None
                row.delivered = count
                self._state.state[DUE, slot] = start + min(request.max_new_tokens, count + request.segment_tokens) - 1
            else:
                del self._slot_of[request.id]
                self._rows[slot] = None
                self._plan = None
        return chunks

    def _close_gaps(self) -> list[Row]:
        """Move the last sequences into the slots of those that left; returns all rows, none missing."""
        rows, sources, targets = self._rows, list[int](), list[int]()
        for gap in [slot for slot, row in enumerate(rows) if row is None]:
            while rows and rows[-1] is None:
                rows.pop()
            if gap >= len(rows):
                break
            sources.append(len(rows) - 1)
            targets.append(gap)
            rows[gap] = rows.pop()
            self._slot_of[self._row(gap).request.id] = gap
        if sources:
            source, target = self._tensor(sources), self._tensor(targets)
            self._cache.move(source, target, self._cache.length)
            self._state.copy(source, target)
        return [row for row in rows if row is not None]

    def _row(self, slot: int) -> Row:
        row = self._rows[slot]
        assert row is not None
        return row

    def _tensor(self, values: Any) -> torch.Tensor:
        """int64, where the slots' state is now."""
        return torch.as_tensor(values, dtype=torch.int64, device=self._state.state.device)
