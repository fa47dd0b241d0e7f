"""Every message that crosses a process boundary, grouped by who receives it (proto/README.md draws the streams).

Fields are append-only and new ones have a default. Arrays travel as little-endian bytes, so that a message is
decoded without touching one token in Python. L = tokens of one sequence, prompt included.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec

PROTOCOL_VERSION = 0
"""Version of the wire contract; 0 is unreleased and may change without notice."""

Purpose: TypeAlias = Literal["train", "eval"]
FinishReason: TypeAlias = Literal["eos", "stop", "length", "repeat", "budget", "aborted"]
Transport: TypeAlias = Literal["shared_memory", "process_group", "http"]
"""How weights reach a generator."""
TerminalEvent: TypeAlias = Literal["trained", "filtered", "failed", "cancelled"]


class WeightsId(msgspec.Struct, frozen=True, gc=False, array_like=True, order=True):
    """Names one set of weights. A learner that restarts from a checkpoint opens a new lineage."""

    lineage: int
    version: int
    """Number of composed batches the learner has completed, skipped steps included."""


class VersionSpan(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Tokens [start, end) of a sequence, sampled by the policy under `version`.

    Tokens in no span were not sampled by the policy (prompt, tool output): version -1, weight 0.
    """

    start: int
    end: int
    version: int
    """Weights of the forward pass that sampled these tokens."""
    kv_version: int
    """Oldest weights that wrote the KV cache these tokens attended to; below `version` after a swap under `keep`."""


class Sequence(msgspec.Struct, frozen=True, gc=False):
    """One token sequence of a rollout; a turn that extends the previous tokens stays in the same sequence."""

    tokens: bytes
    """[L] int32"""
    logprobs: bytes
    """[L] float32, natural log, of the distribution really sampled; 0.0 outside `spans`"""
    spans: list[VersionSpan]
    """Ordered, disjoint, non-empty: what the policy sampled."""


class RolloutResult(msgspec.Struct, frozen=True, gc=False):
    """A finished, scored member of a group."""

    member: int
    sequences: list[Sequence]
    reward: float
    """What is trained on; the sum of `parts` unless the environment says otherwise."""
    parts: dict[str, float] = {}
    """Named parts of the reward."""
    metrics: dict[str, float] = {}
    """Named numbers that are logged and never trained on, `exact` (0 or 1) among them where it exists."""
    finish_reason: FinishReason = "eos"


class Task(msgspec.Struct, frozen=True, omit_defaults=True):
    """One problem. `data` is what the environment's task source returned; `task["key"]` reads it."""

    id: str
    data: dict[str, Any]
    problem: int = -1
    """Its number in the source, where a curriculum chose it."""

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


class Sampling(msgspec.Struct, frozen=True):
    """How completions are drawn. RL at temperature 1 over the full vocabulary; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    """Run seed: token t of call c of rollout r is drawn with the uniform hash(seed, r, c, t)."""


class Activity(msgspec.Struct, frozen=True):
    """Where a process spent its time since it started: exclusive wall seconds by cause, which sum to its age."""

    at: float
    """time.monotonic() of the sender; comparable between processes of one machine."""
    seconds: dict[str, float]
    """`outer/inner` is a part of `outer`, measured by another thread."""
    cpu_s: float
    tokens: int = 0
    """Tokens sampled (generator) or trained on (learner)."""
    gauges: dict[str, float] = {}
    """Numbers of its state now, by name; a generator's are those of its engine."""


# --- shared by both streams ----------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First message of a peer on every connection. A second Hello of the same name voids the first peer's leases."""

    role: Literal["generator", "learner"]
    name: str
    """Stable across restarts: `generator-0`."""
    pid: int
    protocol: int = PROTOCOL_VERSION
    weights: WeightsId | None = None
    """Weights the peer holds; for the learner, the checkpoint it loaded (version) and its lineage."""
    weights_store: str = ""
    """Learner only: host:port of the rendezvous store of the weight group, empty if the transport needs none."""
    attention_share: float = 0.0
    """Learner only: L tokens of one sequence cost L + attention_share * L^2; micro-batches are balanced by it."""
    machine: str = ""
    """Peers of equal names share memory."""
    dtype: str = ""
    """It computes log-probs in: what `auto` is on its machine."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """I am alive; from a peer with its activity, from the controller as a question to be answered at once."""

    activity: Activity | None = None
    weights: WeightsId | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish: the run is over or stops. The learner writes a last checkpoint when asked to."""

    reason: str
    checkpoint: bool = False
    restart: bool = False
    """The run goes on: come back as a new process."""


class WeightsAnnounce(msgspec.Struct, frozen=True, tag=True):
    """New weights can be fetched. From the learner to the controller, and on to every generator."""

    weights: WeightsId
    transport: Transport
    location: str = ""
    """shared_memory: the file. process_group: the epoch of the group that is about to broadcast. http: the relay."""
    nbytes: int = 0
    checksum: int = 0
    """Of the payload (weights/checksum.py); 0 where it travels behind it."""
    token: str = ""
    """http: bearer token of the relay."""
    changed: float | None = None
    """http: share of the elements that differ from the version published before; null where there was none."""


class WeightGroup(msgspec.Struct, frozen=True, tag=True):
    """Members of the weight group from now on: rank 0 is the learner, `members[i]` has rank i + 1."""

    epoch: int
    members: list[str]
    store: str
    """host:port of the rendezvous store."""


class DeviceTurn(msgspec.Struct, frozen=True, tag=True):
    """Colocated placement: take the device, or leave it. A process starts off the device."""

    number: int
    """Of the order; the answer repeats it."""
    hold: bool
    """A generator takes the device with the newest weights it was told of; failing these with those it had before."""


class DeviceHeld(msgspec.Struct, frozen=True, tag=True):
    """The answer to a DeviceTurn, when it is carried out."""

    number: int
    held: bool
    seconds: float
    """That it took."""
    nbytes: int = 0
    """Of the device, held by this process now: memory reserved on a GPU, the resident set on a CPU."""


# --- rollout stream: generator -> controller -----------------------------------------------------------------


class Credit(msgspec.Struct, frozen=True, tag=True):
    """How many rollouts this generator accepts in all since its Hello. Cumulative, so repeating it is harmless."""

    limit: int


class Segment(msgspec.Struct, frozen=True, gc=False, tag=True):
    """The next sampled tokens of an unfinished rollout, persisted so that they are not sampled again."""

    group_id: int
    member: int
    call: int
    """Which call of the policy within the episode, from 0."""
    start: int
    """Sampled tokens of this call before this segment: segments of a call join without a gap."""
    prompt: int
    """CRC-32 of the call's prompt as [n] int32: whoever resumes checks that the episode asks the same again."""
    tokens: bytes
    """[n] int32, sampled only"""
    logprobs: bytes
    """[n] float32"""
    spans: list[VersionSpan]
    """Cover [0, n); positions count from the first token of this segment."""
    finish_reason: FinishReason | None = None
    """Set on the last segment of a call."""
    yielded: bool = False
    """The lease of this member ends here, its token budget is used up or a Yield asked for it: whoever takes it next
    goes on after this segment, which may be empty."""


class Positions(msgspec.Struct, frozen=True, tag=True):
    """How many tokens every unfinished training rollout had when these weights went live, or left the device. Sent
    after WeightsLive, and before the DeviceHeld that says so."""

    weights: WeightsId
    sampled: list[tuple[int, int, int]]
    """(group id, member, tokens sampled in this episode so far, over all calls and leases)"""


class Finished(msgspec.Struct, frozen=True, tag=True):
    """Members of a group that ended and were scored. Sent again until acknowledged; the ledger removes repeats."""

    group_id: int
    purpose: Purpose
    members: list[RolloutResult]
    weights: WeightsId


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Environment code raised or ran out of time: a failed rollout, never a silent reward of zero."""

    group_id: int
    purpose: Purpose
    member: int
    reason: str
    traceback: str = ""


class WeightsLive(msgspec.Struct, frozen=True, tag=True):
    """The engine samples with these weights from now on."""

    weights: WeightsId
    stall_s: float
    """How long no decode step could run because of the swap."""


class WeightsFailed(msgspec.Struct, frozen=True, tag=True):
    """These weights did not arrive; the old ones stay live."""

    weights: WeightsId
    reason: str
    missing: list[str] = []
    """Learner only: generators that did not come to the weight group."""


# --- rollout stream: controller -> generator -----------------------------------------------------------------


class HelloAck(msgspec.Struct, frozen=True, tag=True):
    """Welcome: the epoch of the frame is the run epoch from now on."""

    worker_id: str
    lineage: int = 0
    """Learner only: the lineage it trains under."""
    heartbeat_s: float = 1.0
    """Send a Heartbeat at least this often."""


class GroupLease(msgspec.Struct, frozen=True):
    """The G rollouts of one task for one generator, so that the prompt is prefilled once."""

    group_id: int
    purpose: Purpose
    task: Task
    members: list[int]
    """Unfinished members only; all of range(G) on the first lease."""
    sampling: Sampling
    min_version: int = 0
    """Sampling starts when the engine holds at least this version: older tokens could not be trained on in time."""
    segments: list[Segment] = []
    """What earlier leases of these members already sampled, in order."""
    segment_tokens: int = 0
    """Send a Segment every so many tokens of a call; 0 = never."""
    lease_tokens: int = 0
    """A member that sampled so many tokens under this lease yields; 0 = no such budget."""


class Lease(msgspec.Struct, frozen=True, tag=True):
    """Groups that start together."""

    groups: list[GroupLease]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop these members; whatever they send afterwards is ignored."""

    group_id: int
    members: list[int]
    reason: str


class Yield(msgspec.Struct, frozen=True, tag=True):
    """Hand these members back: a Segment with `yielded` and all that is not durable yet, then they go on elsewhere.
    Those that end first, or wait for weights, are left as they are."""

    group_id: int
    members: list[int]


class Ack(msgspec.Struct, frozen=True, tag=True):
    """These members are committed to the ledger; the generator forgets them."""

    group_id: int
    members: list[int]


# --- training stream: learner -> controller ------------------------------------------------------------------


class BatchRequest(msgspec.Struct, frozen=True, tag=True):
    """The learner wants the batch of `step`; asked for one step ahead, so that it is there in time."""

    step: int


class StepDone(msgspec.Struct, frozen=True, tag=True):
    """The optimiser step on batch `step` is over (or was skipped: see metrics), the version is now step + 1."""

    step: int
    weights: WeightsId
    metrics: dict[str, float]
    activity: Activity


class CheckpointSaved(msgspec.Struct, frozen=True, tag=True):
    """A checkpoint that includes every step below `version` is durable."""

    version: int
    path: str
    seconds: float = 0.0
    """From the copy in memory to the rename on disk; 0 where none was written."""


# --- training stream: controller -> learner ------------------------------------------------------------------


class TrainRollout(msgspec.Struct, frozen=True, gc=False):
    """One rollout of a batch. Members of a group are consecutive."""

    group_id: int
    member: int
    reward: float
    sequences: list[Sequence]
    baseline: dict[int, float] = {}
    """member -> reward of those members of the group its advantage is relative to, fixed when the first of the group
    was released to training; without `member` itself if it ended later. Empty: the members in this batch."""


class MicroBatches(msgspec.Struct, frozen=True, tag=True):
    """The composed batch of one step, committed to the ledger before it was sent."""

    step: int
    version: int
    """v_train: the version the step starts from; lag of a token = version - its version."""
    rollouts: list[TrainRollout]
    plan: list[list[list[int]]]
    """[ranks][micro-batches] -> indices into `rollouts`; every rank has equally many micro-batches."""
    replay: bool = False
    """Composed before the checkpoint was lost: trained again under a new lineage, without new terminal events."""


class Evaluated(msgspec.Struct, frozen=True, tag=True):
    """What the weights of `version` reach on the held-out tasks: for checkpoint.keep_best. Said again to a learner that
    starts."""

    version: int
    reward: float
    """Mean over the tasks."""


GeneratorMessage: TypeAlias = (
    Hello | Credit | Segment | Positions | Finished | Failed | Heartbeat | WeightsLive | WeightsFailed | DeviceHeld
)
"""What a generator may send."""

ToGenerator: TypeAlias = (
    HelloAck | Lease | Cancel | Yield | Ack | WeightsAnnounce | WeightGroup | Heartbeat | Shutdown | DeviceTurn
)
"""What a generator may receive."""

LearnerMessage: TypeAlias = (
    Hello | BatchRequest | StepDone | CheckpointSaved | WeightsAnnounce | WeightsFailed | Heartbeat | DeviceHeld
)
"""What the learner may send."""

ToLearner: TypeAlias = HelloAck | MicroBatches | WeightGroup | Heartbeat | Shutdown | DeviceTurn | Evaluated
"""What the learner may receive."""

M = TypeVar("M")


class Frame(msgspec.Struct, Generic[M], frozen=True, array_like=True):
    """What one ZeroMQ message holds: a few messages of one sender under one run epoch."""

    epoch: int
    """Run epoch; 0 before the sender knows it. Frames of an older epoch are refused."""
    messages: list[M]
