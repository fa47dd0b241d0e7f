"""What a recipe says, section by section: frozen structs. A derived bound is a property with its formula.

recipes.py reads them from TOML, recipe_checks.py knows the bounds that types do not express.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from async_rl.listening import is_loopback

LEAST_FAILURES = 64
Tracker: TypeAlias = Literal["tensorboard", "wandb", "trackio"]


class TinyModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Llama of a few layers with one token per character, from random weights."""

    characters: str
    """The vocabulary: each character is a token; bos, eos and pad are added."""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    intermediate_size: int = 256
    max_length: int = 64


class Model(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained: a local Hugging Face directory, or a tiny model from scratch. Exactly one of the two."""

    path: str = ""
    """Relative to the recipe; with --set, relative to where the command is given."""
    tiny: TinyModel | None = None


class Environment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    """A registered name: bundled, or defined in `module`."""
    module: str = ""
    """Your code: a path ending in .py (relative to the recipe) or an importable module."""
    options: dict[str, Any] = {}
    """Keyword arguments of the environment's task source."""
    timeout_s: float = 600.0
    """An episode without progress for so long (no token, no call of the policy) is a failed rollout. One that
    progresses is never ended for its age."""
    endpoint_host: str = "127.0.0.1"
    """Where the OpenAI-compatible endpoint for agents listens in each generator, at any free port, once an episode
    opens it (docs/environments.md). Elsewhere than on loopback it is plain HTTP, for a network that is trusted."""
    failures_in_a_row: int | None = None
    """So many training episodes that failed, and none in between that did not, stop the run; default: as many as four
    steps hold, at least 64."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    groups_per_step: int = 32
    """Q: groups (prompts) in one optimiser step."""
    group_size: int = 16
    """G: rollouts of one prompt."""
    max_new_tokens: int = 512
    """Per call of the policy."""
    temperature: float = 1.0
    segment_tokens: int = 1024
    """An unfinished rollout is made durable every so many tokens: a killed generator costs at most these; 0 = never."""
    lease_tokens: int = 0
    """Partial rollouts: after so many tokens a rollout is handed back and continued, before anything new begins, by
    whichever generator has room; 0 = it stays where it is."""
    attempts: int = 3
    """A rollout that so many generators died with is failed: something in it kills them."""
    filter: Literal["none", "uniform"] = "none"
    """uniform: groups whose rewards are all equal teach nothing and are replaced by new ones (DAPO's dynamic sampling,
    arXiv 2503.14476)."""


class Staleness(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hard bound, and what happens at it (docs/staleness.md)."""

    max_staleness: int = 4
    """eta: no token sampled more than eta versions before its training step has any weight. 0 = synchronous."""
    depth: int | None = None
    """How many steps ahead generation may run, so that typical lag need not sit at the maximum; default eta."""
    on_stale: Literal["mask", "drop", "wait", "off"] = "mask"
    """mask: tokens over eta lose their weight, their reward stays in the group baseline. drop: whole rollouts leave.
    wait: the step waits for the rollouts that would otherwise exceed eta. off: no bound at all, for comparison."""
    mask_budget: float = 0.03
    """mask only: the share of sampled tokens that may be masked. Concurrency is steered towards it, and a step waits
    rather than exceed it; 0 = wait always."""
    fast_lane: bool = True
    """Where steps wait (`wait`, or a budget of 0) and there are four generators or more: one of them runs few rollouts,
    the long ones that are waited for, which move there. Each move computes the rollout's cache again."""

    @property
    def steps_ahead(self) -> int:
        """min(eta, depth): admission allows (steps_ahead + v + 1) * Q groups in all (DESIGN.md 4)."""
        return self.max_staleness if self.depth is None else min(self.depth, self.max_staleness)


class Curriculum(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which problems are trained on more often, where the environment has a fixed list of them."""

    sampling: Literal["uniform", "prioritized"] = "uniform"
    """uniform: every problem once an epoch. prioritized: in proportion to 1 - its success rate (Kimi k1.5, arXiv
    2501.12599), which is a moving average of `exact`, or of the reward from 0 to 1."""
    floor: float = 0.05
    """At least so much instead of 1 - success rate: what is solved is still seen now and then. 1 = all alike."""
    smoothing: float = 0.1
    """Weight of one more rollout in a problem's success rate."""
    difficulty: str = ""
    """Field of the tasks that says how hard they are, 0 to 1: easy problems come first."""
    start: float = 0.3
    """Difficulty up to which problems are drawn at first."""
    steps: int = 0
    """From `start` it rises to 1 over so many steps."""


class Algorithm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    preset: str = "async_default"
    options: dict[str, Any] = {}
    """Overrides of the preset's parts, by name."""


class Optimizer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW on fp32 master weights."""

    learning_rate: float = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up. constant: then down over `decay_steps`. linear, cosine: down to `final_rate` of the full rate
    over all the rest of the run."""
    warmup_steps: int = 0
    """Linear from 0."""
    decay_steps: int = 0
    """constant only: the last so many steps, linear down to `final_rate` of the full rate; 0 = constant to the end."""
    final_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Global gradient norm is scaled down to this; 0 switches it off."""


class SGLang(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a generator gets at its SGLang server (docs/sglang.md). It starts one, or attaches to those that run."""

    python: str = ""
    """The Python that SGLang is installed in, absolute or relative to the recipe; default: this one."""
    arguments: list[str] = []
    """More arguments of sglang.launch_server, such as ["--tp-size", "2"]. Its host, port and model are set already."""
    environment: dict[str, str] = {}
    """More environment variables of the server."""
    attach: list[str] = []
    """URLs of servers that run already, dealt out to the generators in turn; empty: each generator starts one."""
    router: str = ""
    """URL of a sglang-router in front of the servers in `attach`: requests go there, control goes to each of them."""
    host: str = "127.0.0.1"
    """Address of the generator's machine that its servers reach; weights come from there."""
    load_by: Literal["group", "disk"] = "group"
    """group: weights go through a process group with each server. disk: through files that it reads."""
    backend: Literal["gloo", "nccl"] = "gloo"
    """Of that group. nccl needs a GPU for the generator that no server uses."""
    stream_tokens: int = 16
    """The server reports progress every so many tokens: what staleness steers by is that exact."""
    pause_s: float = 30.0
    """A pause of a server ends after so long, whatever was to happen in it."""
    start_s: float = 600.0
    """A server is up after so long, or it is an error."""
    api_key_env: str = ""
    """Name of the environment variable that holds what servers and router were told by --api-key; a recipe holds no
    secrets."""
    admin_api_key_env: str = ""
    """The same for --admin-api-key, which guards pauses and weights; default: the same key."""
    stuck_s: float = 30.0
    """A server that somebody else has paused is resumed after so long."""


class Generator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    engine: Literal["embedded", "sglang"] = "embedded"
    """embedded: in the generator's process. sglang: a SGLang server."""
    count: int = 1
    """Generator processes."""
    slots: int = 64
    """Sequences one engine decodes at the same time."""
    max_length: int = 0
    """Tokens of prompt and completion a slot can hold; 0 = the model's own limit."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """auto = bfloat16 where the device multiplies in it, else float32; name one where machines differ."""
    device: str = "auto"
    """auto = cuda where there is one, else cpu."""
    queued_rollouts: int | None = None
    """Rollouts accepted beyond the slots, so that a free slot never waits for the wire; default = slots."""
    sglang: SGLang = SGLang()


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters instead of all weights (extra `lora`)."""

    rank: int = 16
    alpha: float = 32.0
    """What they add is scaled by alpha / rank."""
    targets: list[str] = []
    """Names of linear layers, such as q_proj; none = all but the head."""
    save_merged: bool = True
    """Checkpoints hold the merged model too, for `from_pretrained` and `async-rl eval`; false: the adapters alone."""


class Learner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    microbatch_tokens: int = 16384
    """Strict cap of tokens in one packed micro-batch of one rank."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """bfloat16 = autocast over fp32 master weights; auto as for the generator."""
    device: str = "auto"
    ranks: int = 1
    """Data-parallel processes."""
    activation_checkpointing: bool = False
    """Keep only what goes into each layer and compute the layer again in the backward pass: a third more work, a
    fraction of the activations' memory."""
    compile: bool = False
    """Fuse what is between matrix products (torch.compile), for a GPU; the first two steps take a while longer."""
    lora: Lora | None = None
    """Train adapters and freeze the rest; default: train everything."""
    mismatch_steps: int = 10
    """Every so many steps, engine and learner are compared under the same weights, also where all tokens of a batch are
    of older ones: a copy of the weights is kept for it meanwhile, in host memory; 0 = never."""
    sharding: Literal["none", "full"] = "none"
    """none: every rank holds all weights and optimiser states. full: each holds 1 / ranks of them (FSDP2)."""


class Weights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    transport: Literal["auto", "shared_memory", "process_group", "http"] = "auto"
    """shared_memory: one host. process_group: a torch.distributed group of its own (gloo, NCCL on CUDA). http: from the
    learner, for slow links. auto: shared memory within the learner's machine, a group with others (docs/weights.md)."""
    timeout_s: float = 30.0
    """A transfer in which nothing moves for so long has failed."""
    host: str = ""
    """Address of the learner's machine that others fetch weights from; default controller.host. That network must be
    trusted."""
    relay_port: int = 0
    """Of the learner's HTTP relay; 0 = any free port."""
    relay_url: str = ""
    """Where this machine reaches the relay, if not at the address it listens on: a tunnel, a forwarded port."""
    full_every: int = 20
    """http: of so many sets at least one comes whole, the others only in what changed; 1 = all come whole."""
    in_flight: Literal["auto", "keep", "recompute", "drain"] = "auto"
    """What happens to unfinished sequences when weights change. keep: they go on over their old KV cache (default and
    only choice of the embedded engine). recompute: their cache is computed again under the new weights (default of
    sglang). drain: nothing new begins until they have reached the end of their segment."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    every_steps: int = 100
    keep: int = 2
    """The newest so many stay."""
    keep_best: int = 0
    """So many with the highest reward on the held-out tasks stay too; the newest may be among them."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tasks: int = 64
    """Held-out tasks, decoded greedily, before and after training; 0 = no evaluation."""
    every_steps: int = 0
    """Also every so many steps, while training goes on; 0 = only before and after."""


class Controller(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    """Address or name of the controller's machine, where the other services reach it. Beyond loopback they need the
    keys of the run (docs/security.md)."""
    port: int = 0
    """Rollout stream; the training stream takes the next one. 0 = any free ports."""
    admin_port: int = 0
    """HTTP: status, pause, resume, evaluate, stop. 0 = any free port, written to admin.json in the run directory."""
    heartbeat_timeout_s: float = 15.0
    """A peer that is silent for longer has lost its leases."""
    watchdog_s: float = 120.0
    """When no rollout ended for so long, say which are pending, in which stage, and at which generator."""
    keep_rollouts: Literal["sample", "all", "none"] = "sample"
    """Whose tokens stay on disk after a checkpoint covers them, for `inspect`: of one group a step, all, none."""


class Security(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys of the streams and a token for HTTP, made in the run directory (docs/security.md)."""

    loopback: bool = False
    """Also where controller.host is loopback: on a machine that others have accounts on."""
    insecure: bool = False
    """No keys and no token beyond loopback: whoever reaches the ports can steer the run and put anything into it."""


class Reference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The frozen policy that KL is measured against, where the algorithm has a KL."""

    path: str = ""
    """A local Hugging Face directory; empty = the model before training. Paths are as in [model]."""
    refresh_steps: int = 0
    """Every so many steps it becomes the policy of that moment (DeepSeek-R1-Zero: 400); 0 = never."""
    offload: bool = False
    """On a GPU: its weights stay in host memory but for the moments it is asked."""


class Critic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The value network, where the algorithm has one (`ppo`, `async_ppo`). It shares no parameter with the policy."""

    init: Literal["policy", "reward_model"] = "policy"
    """policy: the model before training, with a head that says 0. reward_model: that of [reward_model] and its head."""
    path: str = ""
    """Start from this directory instead: a causal language model, or one with a scalar head."""
    optimizer: Optimizer = Optimizer(learning_rate=1e-5)
    gamma: float = 1.0
    """Discount of GAE and V-trace."""
    lam: float = 0.95
    """Of both: 1 = whole returns, 0 = one step."""
    clip: float = 0.2
    """The value loss is clipped where a value moves further than this in one step, which takes several epochs."""
    epochs: int = 1
    """How often the critic is trained on the returns of a step; the policy is once."""
    coef: float = 0.1
    """Of the value loss. Critic and policy have an optimiser each: it scales the gradient that `clip_norm` sees."""
    whiten: bool = True
    """Advantages to mean 0 and variance 1 over the step."""


class RewardModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model that scores whole rollouts. Default: none, which is what reasoning wants: neural rewards get hacked."""

    path: str = ""
    """A directory with a scalar head, trained with the policy's tokenizer."""
    weight: float = 1.0
    """weight * (score - bias) is added to the environment's reward."""
    replaces: bool = False
    """Take the place of the environment's reward, which is then only logged."""
    offload: bool = False
    """On a GPU: its weights stay in host memory but for the moments it is asked."""


class Simulate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cluster that `async-rl simulate` makes up: one engine per generating device, on which a decode step of n
    sequences takes step_s + sequence_s * n. Training itself reads none of this."""

    generators: int = 4
    """Devices that generate, one engine each. In the synchronous arm the learner's devices generate too."""
    learners: int = 4
    """Devices that train."""
    learner_tokens_s: float | None = None
    """Tokens that one learner device trains a second; default: all of them together as many as all generators sample
    when their slots are full."""
    step_s: float = 0.012
    """Seconds of a decode step of one engine, apart from its sequences."""
    sequence_s: float = 0.00008
    """Seconds that each sequence on the engine adds to its decode step."""
    concurrent: int = 1024
    """Engine slots over all generators: rollouts that decode at the same time."""
    pause_s: float = 2.0
    """Seconds that every engine stands still at every weight update."""
    prefill_tokens_s: float | None = None
    """Tokens a second of one engine that computes the cache of a rollout which comes from another one, and stands still
    meanwhile; default: three times what a learner device trains, because training is a forward pass and a backward
    pass of twice the work."""
    mean_tokens: float = 4000.0
    """Mean length of a rollout in tokens, before the cap; lengths are lognormal."""
    sigma: float = 0.5
    """Standard deviation of the logarithm of the length; 0 = all rollouts are equally long."""
    cap: float = 8.0
    """The longest rollout, in means."""
    between: float = 0.0
    """Share of the variance of the log-length that lies between groups, 0 to 1: hard tasks are long for all members."""
    block_tokens: int = 16
    """Tokens that one token on the wire stands for, so that messages stay small."""
    warmup_steps: int = 20
    """Steps before the measured ones. The recipe's `steps` is replaced by their sum."""
    measured_steps: int = 60
    """Steps that the figures are of."""
    seeds: int = 1
    """Repetitions with other lengths and rewards, from `seed` on; figures are over all of them."""

    @property
    def sample_tokens_per_s(self) -> float:
        """Of all generators when every slot is taken: concurrent / seconds of a decode step."""
        return self.concurrent / (self.step_s + self.sequence_s * self.concurrent / self.generators)

    @property
    def train_tokens_per_s(self) -> float:
        """Of one learner device."""
        return self.learner_tokens_s or self.sample_tokens_per_s / self.learners

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of one engine."""
        return self.prefill_tokens_s or 3 * self.train_tokens_per_s


class Rewards(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The graders of async_rl.rewards, where an environment uses them (docs/rewards.md)."""

    workers: int = 2
    """Processes of each kind (math, code) that a generator starts at most."""
    deadline_s: float = 10.0
    """A math grader that takes longer for one answer is killed: there is no verdict."""
    memory_mb: int = 2048
    """Of a math grader's process, as address space."""
    program_memory_mb: int = 512
    """Of all processes of a program together, where the machine lets us make control groups; else of each."""
    program_processes: int = 32
    """Processes and threads that a program may have at a time."""
    python: str = ""
    """What runs programs: the path of a Python, 3.9 or newer, that every user may read. Default: this one without its
    packages, or /usr/bin/python3 where others cannot read this one."""
    unsafe_code: bool = False
    """Run programs of the model without isolation, as ordinary processes of this user: they can read, write and send
    whatever this user can. For a machine that has nothing to lose."""
    service: str = ""
    """URL of a reward service, which `async-rl serve reward` starts on another machine; empty: a generator has graders
    of its own."""
    service_token_env: str = ""
    """The environment variable that holds the token of that service, there and here. Never the token itself."""
    host: str = "127.0.0.1"
    """Where `async-rl serve reward` listens. Beyond loopback it wants a token."""
    port: int = 0
    """0 = any free one."""


class Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole recipe."""

    steps: int
    """Optimiser steps to train for."""
    model: Model
    environment: Environment
    seed: int = 1
    rollout: Rollout = Rollout()
    staleness: Staleness = Staleness()
    curriculum: Curriculum = Curriculum()
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizer = Optimizer()
    generator: Generator = Generator()
    learner: Learner = Learner()
    weights: Weights = Weights()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    controller: Controller = Controller()
    security: Security = Security()
    simulate: Simulate = Simulate()
    reference: Reference = Reference()
    critic: Critic = Critic()
    reward_model: RewardModel = RewardModel()
    rewards: Rewards = Rewards()
    placement: Literal["separate", "colocated"] = "separate"
    """separate: generators and learner each have a device and never wait for one. colocated: one generator and the
    learner share one device in turns, each freeing it for the other (docs/colocated.md)."""
    report_to: list[Tracker] = []
    """Where metrics go besides metrics.jsonl; each needs its package."""

    @property
    def colocated(self) -> bool:
        return self.placement == "colocated"

    @property
    def secured(self) -> bool:
        """Whether services need the keys of the run."""
        return self.security.loopback or not (self.security.insecure or is_loopback(self.controller.host))

    @property
    def weights_host(self) -> str:
        """Where the learner can be reached."""
        return self.weights.host or self.controller.host

    @property
    def weights_transport(self) -> Literal["auto", "shared_memory", "process_group", "http"]:
        """`auto` is `shared_memory` where nobody else can reach the learner."""
        alone = self.weights.transport == "auto" and is_loopback(self.weights_host)
        return "shared_memory" if alone else self.weights.transport

    @property
    def synchronous(self) -> bool:
        """eta = 0: nothing is sampled before the weights of its step are live; with one generator a run repeats bit
        for bit."""
        return self.staleness.max_staleness == 0

    @property
    def step_rollouts(self) -> int:
        """Q * G."""
        return self.rollout.groups_per_step * self.rollout.group_size

    @property
    def failures_in_a_row(self) -> int:
        """Failed episodes after which the run stops, unless one succeeds in between."""
        default = max(LEAST_FAILURES, 4 * self.step_rollouts)
        return default if self.environment.failures_in_a_row is None else self.environment.failures_in_a_row

    @property
    def credit_rollouts(self) -> int:
        """Rollouts one generator holds at most, running or queued; a whole step when synchronous."""
        queued = self.generator.slots if self.generator.queued_rollouts is None else self.generator.queued_rollouts
        return max(self.generator.slots + queued, self.step_rollouts if self.synchronous else self.rollout.group_size)
