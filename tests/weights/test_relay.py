"""Weights over HTTP: whole and verified whatever the network does, only what changed where that is less."""

from __future__ import annotations

import asyncio
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from proxy import Proxy
from safetensors.torch import load
from weights_cases import LARGE, drafted, holds, packed, values

from async_rl.errors import UserError
from async_rl.models.parameters import Layout
from async_rl.weights.checksum import BUCKET_BYTES
from async_rl.weights.distribution import Distribution
from async_rl.weights.errors import WeightsCorrupt, WeightsError, WeightsGone, WeightsMismatch
from async_rl.weights.files import WeightFiles
from async_rl.weights.places import memory_directory
from async_rl.weights.receiver import Receiver
from async_rl.weights.relay import Relay
from async_rl.weights.relay_client import RelayClient
from async_rl.wire.messages import WeightsAnnounce, WeightsId


class Learner:
    """A distribution over HTTP, and what it announces."""

    def __init__(self, path: Path, layout: Layout = LARGE, full_every: int = 1) -> None:
        self.layout, self.box = layout, []
        self._sender = Distribution(WeightFiles(path, layout, full_every=full_every), relay=True)

    def send(self, version: int, payload: torch.Tensor | None = None) -> WeightsAnnounce:
        box: list[WeightsAnnounce] = []
        data = packed(self.layout, version) if payload is None else payload
        self._sender.send(WeightsId(1, version), drafted(self._sender, data), box.append)
        assert [one.transport for one in box] == ["http"]
        return box[0]

    def close(self) -> None:
        self._sender.close()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    made = Learner(tmp_path)
    yield made
    made.close()


@pytest.fixture
def proxy() -> Iterator[Any]:
    made: list[Proxy] = []

    def before(announce: WeightsAnnounce) -> tuple[Proxy, WeightsAnnounce]:
        made.append(Proxy(("127.0.0.1", int(announce.location.rpartition(":")[2]))))
        return made[-1], replace(announce, location=made[-1].url)

    yield before
    for one in made:
        one.close()


def get(announce: WeightsAnnounce, path: str, **headers: str) -> Any:
    request = urllib.request.Request(announce.location + path)
    request.add_header("Authorization", f"Bearer {announce.token}")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    return urllib.request.urlopen(request, timeout=20)


def refused(announce: WeightsAnnounce, path: str, **headers: str) -> int:
    """The status of an answer that is an error."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(announce, path, **headers)
    caught.value.close()
    return caught.value.code


def test_round_trip_and_the_newest_is_what_comes(learner: Learner) -> None:
    client = RelayClient(LARGE)
    first = learner.send(1)
    snapshot = client.fetch(first)
    assert snapshot.weights == WeightsId(1, 1) and holds(snapshot, LARGE, 1)
    learner.send(2), learner.send(3)
    newest = client.fetch(first)
    assert newest.weights == WeightsId(1, 3) and holds(newest, LARGE, 3)
    assert holds(snapshot, LARGE, 1), "valid until the second fetch after it"


def test_what_was_fetched_and_could_not_be_loaded_is_there_at_once(learner: Learner) -> None:
    """The controller announces again what did not become live."""
    receiver = Receiver(LARGE)
    announce = learner.send(1)

    async def twice() -> None:
        first, again = await receiver.fetch(announce), await receiver.fetch(announce)
        assert first.weights == again.weights == WeightsId(1, 1) and holds(again, LARGE, 1)
        assert receiver.statistics()["received"] < 1.1 * LARGE.nbytes

    asyncio.run(twice())
    receiver.close()


def test_it_is_a_safetensors_file_with_ranges_and_an_etag(learner: Learner) -> None:
    announce = learner.send(4)
    path = "/weights/weights-1-4.safetensors"
    with get(announce, path) as answer:
        body, tag = answer.read(), answer.headers["ETag"]
    loaded = load(body)
    assert all(torch.equal(loaded[name], value) for name, value in values(LARGE, 4).items()) and len(loaded) == 2
    with get(announce, path, Range="bytes=100-199") as answer:
        assert answer.status == 206 and answer.read() == body[100:200] and answer.headers["ETag"] == tag
    with get(announce, path, Range=f"bytes={len(body) - 7}-") as answer:
        assert answer.read() == body[-7:]
    assert refused(announce, path, If_None_Match=tag) == 304
    assert refused(announce, path, Range=f"bytes={len(body) + 5}-") == 416


def test_only_who_has_the_token_gets_anything(learner: Learner) -> None:
    announce = replace(learner.send(1), token="wrong")
    for path in ("/weights", "/weights/weights-1-1.safetensors"):
        assert refused(announce, path) == 401
    with pytest.raises(WeightsError, match="answers 401"):
        RelayClient(LARGE).fetch(announce)


def test_what_is_not_there(learner: Learner) -> None:
    announce = learner.send(1)
    for path in ("/weights/weights-1-2.safetensors", "/weights/..%2f..%2fetc%2fpasswd"):
        assert refused(announce, path) == 404
    with pytest.raises(WeightsGone, match=r"weights 1\.9 are not at the relay"):
        RelayClient(LARGE).fetch(replace(announce, weights=WeightsId(1, 9)))


def test_a_file_that_somebody_removed_is_named(learner: Learner, tmp_path: Path) -> None:
    """It is listed, and not there: asking again and again would not help before there are newer weights."""
    announce, directory = learner.send(1), memory_directory(tmp_path)
    assert directory is not None
    (directory / "weights-1-1.safetensors").unlink()
    client = RelayClient(LARGE)
    with pytest.raises(WeightsError, match=r"the relay at .* lists weights-1-1\.safetensors and does not have it"):
        client.fetch(announce)
    assert client.fetch(learner.send(2)).weights == WeightsId(1, 2)


def test_another_model_is_refused(learner: Learner) -> None:
    other = Layout.pack_up([("a.weight", (5 << 20,), torch.float32), ("c.weight", (3,), torch.float32)])
    with pytest.raises(WeightsMismatch, match="must be the same"):
        RelayClient(other).fetch(learner.send(1))


def test_a_broken_connection_is_resumed_where_it_broke(learner: Learner, proxy: Any) -> None:
    network, announce = proxy(learner.send(1))
    network.break_after = [3 << 20, 9 << 20, 15 << 20]
    client = RelayClient(LARGE)
    assert holds(client.fetch(announce), LARGE, 1)
    assert network.break_after == [] and network.carried < LARGE.nbytes + (3 << 20), "started from the beginning again"


def test_a_damaged_bucket_is_fetched_again_and_no_other(learner: Learner, proxy: Any) -> None:
    network, announce = proxy(learner.send(1))
    network.damage_at = [BUCKET_BYTES + (2 << 20)]
    assert holds(RelayClient(LARGE).fetch(announce), LARGE, 1)
    assert network.damage_at == [] and network.carried < LARGE.nbytes + BUCKET_BYTES


def test_what_is_always_damaged_is_never_returned(learner: Learner, proxy: Any) -> None:
    network, announce = proxy(learner.send(1))
    network.damage_at = [at << 20 for at in range(1, 100)]
    with pytest.raises(WeightsCorrupt, match=r"bucket \d came damaged 3 times"):
        RelayClient(LARGE).fetch(announce)


def test_a_cut_is_survived_or_named(learner: Learner, proxy: Any) -> None:
    network, announce = proxy(learner.send(1))
    network.cut()
    with pytest.raises(WeightsError, match=r"weights 1\.1: nothing came from the relay at http://\S+ for 1 s"):
        RelayClient(LARGE, timeout_s=1).fetch(announce)
    timer = threading.Timer(1.0, network.heal)
    timer.start()
    assert holds(RelayClient(LARGE, timeout_s=60).fetch(announce), LARGE, 1)
    timer.join()


def test_closing_ends_a_fetch_that_waits(learner: Learner, proxy: Any) -> None:
    network, announce = proxy(learner.send(1))
    network.cut()
    client = RelayClient(LARGE, timeout_s=300)
    failed: list[str] = []

    def fetch() -> None:
        try:
            client.fetch(announce)
        except WeightsError as error:
            failed.append(str(error))

    thread = threading.Thread(target=fetch)
    thread.start()
    client.interrupt()
    thread.join(30)
    assert failed == ["weights 1.1: the receiver was closed"]


def changed(payload: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """A copy in which about this share of the elements differ."""
    generator = torch.Generator().manual_seed(seed)
    elements = payload.clone().view(torch.int32)
    elements[torch.rand(elements.shape, generator=generator) < share] ^= 0x01000001
    return elements.view(torch.uint8)


def test_only_what_changed_travels(tmp_path: Path) -> None:
    learner = Learner(tmp_path, full_every=5)
    client, behind = RelayClient(LARGE), RelayClient(LARGE)
    payload = packed(LARGE, 0)
    sizes: list[int] = []
    shares: list[float | None] = []
    for version in range(7):
        announce = learner.send(version, payload)
        shares.append(announce.changed)
        before = client.received
        snapshot = client.fetch(announce)
        sizes.append(client.received - before)
        assert torch.equal(snapshot.tensors["a.weight"].view(torch.uint8), payload[: 20 << 20]), version
        if version in (1, 4):
            assert torch.equal(behind.fetch(announce).tensors["a.weight"].view(torch.uint8), payload[: 20 << 20])
        payload = changed(payload, version, 0.01)
    whole = [size > LARGE.nbytes for size in sizes]
    assert whole == [True, False, False, False, False, True, False], "one in five is whole"
    assert all(size < 0.02 * LARGE.nbytes for size in sizes[1:5])
    assert shares[0] is None and all(0.009 < (share or 0) < 0.011 for share in shares[1:])
    assert (client.deltas, behind.deltas) == (5, 1), "three deltas in a row lead from version 1 to version 4"
    learner.close()


def test_without_the_base_or_with_many_changes_all_of_it_travels(tmp_path: Path) -> None:
    learner = Learner(tmp_path, full_every=20)
    payload = packed(LARGE, 0)
    learner.send(0, payload)
    announce = learner.send(1, changed(payload, 1, 0.01))
    newcomer = RelayClient(LARGE)
    assert newcomer.fetch(announce).weights == WeightsId(1, 1) and newcomer.deltas == 0
    announce = learner.send(2, changed(payload, 2, 0.9))
    assert announce.changed is not None and announce.changed > 0.85
    assert newcomer.fetch(announce).weights == WeightsId(1, 2) and newcomer.deltas == 0
    learner.close()


def test_a_wrong_base_is_noticed_and_the_whole_is_fetched_next(tmp_path: Path) -> None:
    learner = Learner(tmp_path, full_every=20)
    payload = packed(LARGE, 0)
    client = RelayClient(LARGE)
    held = client.fetch(learner.send(0, payload))
    held.tensors["a.weight"][17] += 1  # nobody should, but the checksum is of the result
    announce = learner.send(1, changed(payload, 1, 0.01))
    with pytest.raises(WeightsCorrupt, match=r"weights 1\.1: checksum"):
        client.fetch(announce)
    assert torch.equal(
        client.fetch(announce).tensors["a.weight"].view(torch.uint8), changed(payload, 1, 0.01)[: 20 << 20]
    )
    learner.close()


def test_a_port_that_is_taken_is_named(learner: Learner) -> None:
    taken = int(learner.send(1).location.rpartition(":")[2])
    with pytest.raises(UserError, match=f"weights.relay_port = {taken}: cannot listen"):
        Relay(tuple, "127.0.0.1", taken)
    with pytest.raises(UserError, match=r"weights.host = '203\.0\.113\.5': cannot listen there \(Cannot assign"):
        Relay(tuple, "203.0.113.5", taken)
