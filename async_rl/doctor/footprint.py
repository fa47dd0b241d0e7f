"""How much memory and disk a recipe takes, about. Sizes follow from the config alone; no weights are made.

Measured for activations: SmolLM2-135M with 2048 packed tokens takes 1.6 MB a token in fp32, 1.15 MB under bfloat16
autocast; the formula gives 1.6 and 1.2.
"""

from __future__ import annotations

from math import prod
from typing import Any

import msgspec
import torch

from async_rl.config import Lora, Model, Run
from async_rl.learner.logprobs import CHUNK_ELEMENTS
from async_rl.learner.trainer import build_objective
from async_rl.models.loading import load_config
from async_rl.models.parameters import Layout
from async_rl.weights.files import KEEP

PROMPT_TOKENS = 256
"""Assumed for a prompt, where the model's limit allows it."""
PROCESS = 350 << 20
"""A Python process with torch and transformers."""
CONTROLLER = 150 << 20
SNAPSHOTS = KEEP + 2
"""In shared memory at one time: the newest ones, one that travels, and the learner's next."""
ENGINE_SETS = 2
"""Of weights in the engine while it swaps."""
MASTER_BYTES = 16
"""A parameter in the learner: fp32 weight and gradient, two moments of Adam."""
SAVED_BYTES = 12
"""A parameter in a checkpoint, and in a learner off its device: fp32 weight, two moments."""
TRAINED = ("policy", "critic")
TOKEN_BYTES = 8
"""A token in the ledger: id and log-prob."""
WEIGHT_BYTES = 4
"""Of a parameter that nothing trains, in fp32."""
VOCABULARY = {"embed_tokens", "lm_head"}
"""Matrices without adapters."""
AUTOCAST_SHARE = 0.75
"""What activations take under bfloat16 autocast, of what they take in fp32."""
LOGITS_COPIES = 4


class Footprint(msgspec.Struct, frozen=True):
    """Bytes, but for the first two."""

    parameters: int
    sequence_tokens: int
    """Of one rollout, assumed."""
    snapshot: int
    """One set of weights as it travels to the engines."""
    generator: int
    """Of one generator: weights, and a KV cache with every slot taken."""
    learner: int
    """Of one rank: its models, and the activations of one micro-batch."""
    checkpoint: int
    ledger: int
    """At most, of what waits for a checkpoint and of what is kept."""
    models: dict[str, int]
    """Of one learner rank, by role: weights, and gradients and optimiser where it is trained."""
    parked: int
    """Of the learner's models that leave the GPU between uses: host memory then."""
    kept: int
    """Of one rank, in host memory: weights of a former version, for a while (learner.former_weights)."""

    @property
    def resting(self) -> int:
        """Of the learner, in host memory, while a generator has the device they share: no gradients or activations."""
        trained = sum(self.models.get(role, 0) for role in TRAINED)
        return sum(self.models.values()) - trained * (MASTER_BYTES - SAVED_BYTES) // MASTER_BYTES

    @property
    def shared_memory(self) -> int:
        """Files of weights: every transport has them."""
        return SNAPSHOTS * self.snapshot

    def checkpoints(self, run: Run) -> int:
        """Those that are kept, and one being written."""
        return (run.checkpoint.keep + run.checkpoint.keep_best + 1) * self.checkpoint

    def by_device(self, run: Run, generator: torch.device, learner: torch.device) -> dict[str, int]:
        """What all processes of the recipe take: "cpu" and, where it is used, one "cuda" device."""
        processes = run.generator.count + run.learner.ranks
        copies = self.checkpoint + run.learner.ranks * self.kept  # a checkpoint is copied first and then written
        taken = {"cpu": CONTROLLER + processes * PROCESS + self.shared_memory + copies}
        amounts = [
            (generator.type, run.generator.count * self.generator),
            (learner.type, (run.learner.ranks if learner.type == "cpu" else 1) * self.learner),
        ]
        if run.colocated and learner.type == "cpu":
            amounts = [("cpu", max(self.learner, self.resting + self.generator))]
        elif run.colocated:
            amounts = [(learner.type, max(self.learner, self.generator)), ("cpu", self.resting)]
        for device, amount in amounts:
            taken[device] = taken.get(device, 0) + amount
        if learner.type == "cuda":
            taken["cpu"] += run.learner.ranks * self.parked
        return taken


def footprint(run: Run) -> Footprint:
    """Raises UserError where the config of a model cannot be read, or the algorithm is wrong."""
    config: Any = load_config(run.model)
    layout = Layout.of(config, dtype=getattr(torch, run.generator.dtype))
    parameters = sum(prod(entry.shape) for entry in layout.entries)
    limit = config.max_position_embeddings
    limit = min(run.generator.max_length, limit) if run.generator.max_length else limit
    tokens = min(limit, PROMPT_TOKENS + run.rollout.max_new_tokens)
    models, saved, parked = _models(run, parameters)
    stored, trained = SAVED_BYTES * parameters, parameters
    if run.learner.lora is not None:
        trained = adapters = _adapters(run.learner.lora, layout)
        models["policy"] = (WEIGHT_BYTES * parameters + MASTER_BYTES * adapters) // _shards(run)
        stored = WEIGHT_BYTES * parameters * run.learner.lora.save_merged + SAVED_BYTES * adapters
    return Footprint(
        parameters=parameters,
        sequence_tokens=tokens,
        snapshot=layout.nbytes,
        generator=ENGINE_SETS * layout.nbytes + _kv_cache(run, config, min(limit, _power_of_two(tokens))),
        learner=sum(models.values()) + _activations(run, config, tokens),
        checkpoint=stored + saved,
        ledger=_ledger(run, tokens),
        models=models,
        parked=parked,
        kept=WEIGHT_BYTES * trained // _shards(run) if run.learner.mismatch_steps and not run.synchronous else 0,
    )


def _models(run: Run, policy: int) -> tuple[dict[str, int], int, int]:
    """Bytes of the learner's models by role; of those beside the policy in a checkpoint; and of those that are parked.

    policy: its parameters. A frozen model keeps its matrices in the dtype of the products: nearly all of it.
    """
    objective = build_objective(run)
    frozen_bytes = getattr(torch, run.learner.dtype).itemsize

    def parameters(path: str, field: str) -> int:
        if not path:
            return policy
        entries = Layout.of(load_config(Model(path=path), field=field)).entries
        return sum(prod(entry.shape) for entry in entries)

    models, saved, parked = {"policy": MASTER_BYTES * policy // _shards(run)}, 0, 0
    if objective.needs_critic:
        scored = run.reward_model.path if run.critic.init == "reward_model" else ""
        critic = parameters(run.critic.path or scored, "critic.path")
        models["critic"] = MASTER_BYTES * critic // _shards(run)
        saved += SAVED_BYTES * critic
    if objective.needs_reference:
        reference = parameters(run.reference.path, "reference.path")
        models["reference"] = frozen_bytes * reference
        parked += models["reference"] if run.reference.offload else 0
        saved += frozen_bytes * reference if run.reference.refresh_steps else 0
    if run.reward_model.path:
        models["reward_model"] = frozen_bytes * parameters(run.reward_model.path, "reward_model.path")
        parked += models["reward_model"] if run.reward_model.offload else 0
    return models, saved, parked


def _shards(run: Run) -> int:
    """Ranks that share what is trained."""
    return run.learner.ranks if run.learner.sharding == "full" else 1


def _adapters(lora: Lora, layout: Layout) -> int:
    """Their parameters: [rank, in] and [out, rank] beside each matrix but those of the vocabulary."""
    adapted = 0
    for entry in layout.entries:
        layer = entry.name.removesuffix(".weight").rpartition(".")[2]
        if len(entry.shape) == 2 and layer not in VOCABULARY and (not lora.targets or layer in lora.targets):
            adapted += lora.rank * sum(entry.shape)
    return adapted


def _kv_cache(run: Run, config: Any, tokens: int) -> int:
    """It grows by doubling: while it does, half of it is there twice."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = getattr(torch, run.generator.dtype).itemsize
    values = config.num_hidden_layers * run.generator.slots * tokens * 2 * config.num_key_value_heads * head
    return values * element * 3 // 2


def _activations(run: Run, config: Any, tokens: int) -> int:
    """What autograd keeps of a layer: 13 tensors of the hidden size, 4 of the intermediate one; a chunk of logits."""
    batch = min(run.learner.microbatch_tokens, run.step_rollouts * tokens)
    layer = (13 * config.hidden_size + 4 * config.intermediate_size) * 4
    token = config.num_hidden_layers * layer
    if run.learner.activation_checkpointing:  # what goes into each layer, and the one that is computed again
        token = config.num_hidden_layers * config.hidden_size * 4 + layer
    share = AUTOCAST_SHARE if run.learner.dtype == "bfloat16" else 1.0
    return int(batch * token * share) + LOGITS_COPIES * 4 * min(CHUNK_ELEMENTS, batch * config.vocab_size)


def _ledger(run: Run, tokens: int) -> int:
    waiting = (run.checkpoint.every_steps + run.staleness.steps_ahead + 1) * run.step_rollouts
    kept = {"none": 0, "sample": run.rollout.group_size, "all": run.step_rollouts}[run.controller.keep_rollouts]
    return (waiting + kept * run.steps) * tokens * TOKEN_BYTES


def _power_of_two(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
