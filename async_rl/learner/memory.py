"""What each model of the learner holds: {"policy": {"weights": {"cpu": 436_224}, "gradients": ..., "optimizer": ...}}.

Bytes by device, of this rank, counted tensor by tensor; a role that a recipe does not need is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from async_rl.learner.roles import Roles

Holdings: TypeAlias = dict[str, dict[str, dict[str, int]]]
"""role -> weights | gradients | optimizer -> device -> bytes"""


def holdings(policy: nn.Module, optimizer: torch.optim.Optimizer, roles: Roles) -> Holdings:
    """Optimisers have their state from the first step on."""
    held: Holdings = {"policy": _trained(policy, optimizer)}
    if roles.critic is not None:
        held["critic"] = _trained(roles.critic.module, roles.critic.optimisation.optimizer)
    if roles.reference is not None:
        held["reference"] = _held(roles.reference.model)
    if roles.reward_model is not None:
        held["reward_model"] = _held(roles.reward_model.module)
    return held


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, int]]:
    state = [value for part in optimizer.state.values() for value in part.values() if isinstance(value, Tensor)]
    return _held(module) | {"optimizer": _bytes(state)}


def _held(module: nn.Module) -> dict[str, dict[str, int]]:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return {"weights": _bytes([*module.parameters(), *module.buffers()]), "gradients": _bytes(gradients)}


def _bytes(tensors: Iterable[Tensor]) -> dict[str, int]:
    found: dict[str, int] = {}
    for tensor in tensors:
        local: Tensor = getattr(tensor, "to_local", lambda tensor=tensor: tensor)()  # of a sharded one, our part
        found[local.device.type] = found.get(local.device.type, 0) + local.numel() * local.element_size()
    return found
