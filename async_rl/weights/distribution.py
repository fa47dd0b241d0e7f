"""What becomes of a snapshot on the learner's side, by transport; a publisher.Sender.

shared_memory   a file in memory, announced when it is complete
http            the same file, served by the relay; a delta beside it where few elements changed
process_group   a broadcast, which its members join; then the file at the relay, for those who are in no group
auto            the file, mapped by the generators of this machine; a broadcast to the others, with the relay behind it

Where nobody else can reach us, because we listen on loopback, `auto` is `shared_memory`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from async_rl.config import Run
from async_rl.models.parameters import Layout
from async_rl.weights.errors import GroupSuperseded
from async_rl.weights.files import Draft, WeightFiles
from async_rl.weights.process_group import ProcessGroupSender
from async_rl.weights.relay import Relay
from async_rl.wire.messages import WeightGroup, WeightsAnnounce, WeightsId

Announce = Callable[[WeightsAnnounce], None]


class Distribution:
    """`mapped`: files are announced to generators of this machine. Owns all that it is given."""

    def __init__(
        self,
        files: WeightFiles,
        *,
        mapped: bool = False,
        group: ProcessGroupSender | None = None,
        relay: bool = False,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self._files, self._mapped, self._group = files, mapped, group
        self._relay = Relay(lambda: files.shelf, host, port) if relay else None
        self._interrupted = False
        """The last broadcast was given up for a new group."""

    @property
    def store(self) -> str:
        return "" if self._group is None else self._group.store

    def form(self, group: WeightGroup) -> bool:
        """Whoever is new has its first weights from a file, and so has whoever lost its group: only a broadcast that
        was interrupted for this group is made again."""
        return self._group is not None and self._group.form(group) and self._interrupted

    def draft(self) -> Draft:
        """Where the next snapshot goes. Raises WeightsError: there is no room for the file."""
        return self._files.draft()

    def send(self, weights: WeightsId, draft: Draft, announce: Announce) -> None:
        """Raises WeightsError: the broadcast did not arrive, or the file could not be finished."""
        checksums = self._send_file(weights, draft, announce) if self._mapped else None
        try:
            if self._group is not None and self._group.ready:
                self._interrupted = False
                checksums = self._group.send(weights, draft.payload, announce, checksums)
        except GroupSuperseded:
            self._interrupted = True
            raise
        finally:
            if not self._mapped:
                self._send_file(weights, draft, announce, checksums)

    def interrupt(self, epoch: int) -> None:
        if self._group is not None:
            self._group.interrupt(epoch)

    def close(self) -> None:
        if self._relay is not None:
            self._relay.close()
        if self._group is not None:
            self._group.close()
        self._files.close()

    def _send_file(
        self, weights: WeightsId, draft: Draft, announce: Announce, checksums: Sequence[int] | None = None
    ) -> Sequence[int]:
        """Returns the checksums of the buckets."""
        file = self._files.write(weights, draft, checksums)
        size, checksum = file.header.nbytes, file.header.checksum
        if self._mapped:
            announce(WeightsAnnounce(weights, "shared_memory", str(file.path), size, checksum))
        if self._relay is None:
            return file.checksums
        comparison = self._files.write_delta()
        self._files.put_on_shelf()
        changed = None if comparison is None else comparison.fraction
        announce(
            WeightsAnnounce(weights, "http", self._relay.url, size, checksum, token=self._relay.token, changed=changed)
        )
        return file.checksums


def make_distribution(run: Run, run_directory: Path, layout: Layout, *, pinned: bool) -> Distribution:
    """The transport of the recipe."""
    weights = run.weights
    host, transport = run.weights_host, run.weights_transport
    full_every = weights.full_every if transport == "http" else 1
    files = WeightFiles(run_directory, layout, full_every=full_every, pinned=pinned)
    group = None
    if transport in ("process_group", "auto"):
        group = ProcessGroupSender(layout, host=host, timeout_s=weights.timeout_s)
    return Distribution(
        files,
        mapped=transport in ("shared_memory", "auto"),
        group=group,
        relay=transport != "shared_memory",
        host=host,
        port=weights.relay_port,
    )
