"""Writes schema/*.json and golden/v<N>/*.msgpack from the structs in async_rl.wire.messages.

python proto/generate.py            # after a change of a message; a test fails until it was run
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from async_rl.wire import messages as m
from async_rl.wire.codec import Codec

HERE = Path(__file__).resolve().parent
STREAMS: dict[str, Any] = {
    "generator_to_controller": m.GeneratorMessage,
    "controller_to_generator": m.ToGenerator,
    "learner_to_controller": m.LearnerMessage,
    "controller_to_learner": m.ToLearner,
}

SEQUENCE = m.Sequence(bytes(range(8)), bytes(8), [m.VersionSpan(1, 2, 3, 2)])
RESULT = m.RolloutResult(0, [SEQUENCE], 0.5, {"distance": 0.5}, {"exact": 0.0}, "length")
ACTIVITY = m.Activity(12.5, {"hand_over": 8.0, "hand_over/engine_step": 7.5, "wait_lease": 4.5}, 7.25, 640)
LEASE = m.GroupLease(7, "train", m.Task("train-7", {"digits": "3102"}), [0, 1], m.Sampling(4, 1.0, 1), 2)
EXAMPLES: dict[str, list[Any]] = {
    "generator_to_controller": [
        m.Hello("generator", "generator-0", 4242, weights=m.WeightsId(0, 3)),
        m.Credit(1024),
        m.Segment(7, 1, 0, 4, 305419896, bytes(8), bytes(8), [m.VersionSpan(0, 2, 3, 3)], yielded=True),
        m.Positions(m.WeightsId(0, 3), [(7, 1, 6)]),
        m.Finished(7, "train", [RESULT], m.WeightsId(0, 3)),
        m.Failed(7, "train", 1, "ValueError: no answer", "Traceback ..."),
        m.Heartbeat(ACTIVITY, m.WeightsId(0, 3)),
        m.WeightsLive(m.WeightsId(0, 3), 0.004),
        m.WeightsFailed(m.WeightsId(0, 4), "checksum differs"),
        m.DeviceHeld(3, False, 0.25, 734003200),
    ],
    "controller_to_generator": [
        m.HelloAck("generator-0/4242"),
        m.Lease([LEASE]),
        m.Cancel(7, [1], "run_complete"),
        m.Yield(7, [1]),
        m.Ack(7, [0]),
        m.WeightsAnnounce(m.WeightsId(0, 4), "shared_memory", "weights-0-4", 436224, 305419896),
        m.WeightGroup(2, ["generator-0"], "127.0.0.1:29500"),
        m.Heartbeat(),
        m.Shutdown("the run is complete"),
        m.DeviceTurn(3, False),
    ],
    "learner_to_controller": [
        m.Hello("learner", "learner", 4243, weights=m.WeightsId(0, 3), weights_store="127.0.0.1:29500"),
        m.BatchRequest(3),
        m.StepDone(3, m.WeightsId(0, 4), {"loss": -0.02, "reward": 0.5}, ACTIVITY),
        m.CheckpointSaved(4, "checkpoints/v00000004"),
        m.WeightsAnnounce(m.WeightsId(0, 4), "http", "http://127.0.0.1:80", 436224, 1 << 63, token="t", changed=0.25),
        m.WeightsFailed(m.WeightsId(0, 4), "generator-1 did not come", ["generator-1"]),
        m.Heartbeat(ACTIVITY, m.WeightsId(0, 4)),
        m.DeviceHeld(4, True, 0.5, 2147483648),
    ],
    "controller_to_learner": [
        m.HelloAck("learner", 1),
        m.MicroBatches(3, 3, [m.TrainRollout(7, 0, 0.5, [SEQUENCE], {0: 0.5, 1: 0.0})], [[[0]]]),
        m.WeightGroup(2, ["generator-0"], "127.0.0.1:29500"),
        m.Heartbeat(),
        m.Shutdown("the run ends", True),
        m.DeviceTurn(4, True),
        m.Evaluated(100, 0.75),
    ],
}
"""One of every message a stream carries; in the golden frames each is a frame of run epoch 5."""

EPOCH = 5


def schema(stream: str) -> str:
    """JSON Schema of a frame: [epoch, [message, ...]]. Bytes are msgpack bin on the wire (base64 in JSON terms)."""
    return json.dumps(msgspec.json.schema(m.Frame[STREAMS[stream]]), indent=2, sort_keys=True) + "\n"


def golden(stream: str) -> dict[str, bytes]:
    """file name -> frame"""
    codec: Codec[Any, Any] = Codec(STREAMS[stream], STREAMS[stream])
    return {f"{stream}.{type(one).__name__}.msgpack": codec.encode(EPOCH, [one]) for one in EXAMPLES[stream]}


def main() -> None:
    frames = HERE / "golden" / f"v{m.PROTOCOL_VERSION}"
    frames.mkdir(parents=True, exist_ok=True)
    (HERE / "schema").mkdir(exist_ok=True)
    for stream in STREAMS:
        (HERE / "schema" / f"{stream}.json").write_text(schema(stream))
        for name, data in golden(stream).items():
            (frames / name).write_bytes(data)


if __name__ == "__main__":
    main()
