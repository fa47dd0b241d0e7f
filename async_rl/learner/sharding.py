"""Parameters spread over the learner's ranks (FSDP2, arXiv 2304.11277), and whole again where they leave it.

    shard(policy, ranks, low=torch.bfloat16)         # every rank, before the optimiser is made
    for name, tensor in gathered(model.named_parameters(), ranks): ...

Each decoder layer is gathered for its own forward and backward pass; embedding, last norm and head for the whole of
both, as one unit with the module that computes log-probs. Gradients are summed over ranks and not averaged: a loss here
is already divided by the denominators of the whole step. Every forward and backward pass is collective: all ranks make
equally many (`PackedPolicy` makes one on a single token where a rank has nothing to do).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from async_rl.learner.distributed import Ranks

BUCKET_BYTES = 64 << 20
"""Small tensors travel together, in messages of about this size; a larger tensor travels alone."""


def shard(root: nn.Module, layers: Iterable[nn.Module], ranks: Ranks, low: torch.dtype | None = None) -> None:
    """Keep 1/size of every parameter here, on this rank's device; one layer at a time is moved there whole.

    root: the module whose calls are forward passes; a method `with_head` is one too. layers: those of its modules that
    are gathered on their own. low: dtype that parameters are gathered and multiplied in; masters and sums stay as they
    are.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=precision)
        unit = cast(FSDPModule, module)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    if hasattr(root, "with_head"):
        register_fsdp_forward_method(root, "with_head")


def spread(root: nn.Module) -> None:
    """After forward passes that no backward pass follows: what is still whole here is this rank's rows again."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows, sharing memory; a tensor that is not sharded as it is."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """On every rank; all of them ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Rows(NamedTuple):
    """Which rows (of the first dimension) of a tensor a rank holds."""

    start: int
    stop: int


def rows(tensor: Tensor, ranks: Ranks) -> Rows | None:
    """None: not sharded. The last ranks may hold fewer rows, or none (start = stop)."""
    if not isinstance(tensor, DTensor):
        return None
    whole, each = tensor.shape[0], -(-tensor.shape[0] // ranks.size)
    start = min(ranks.rank * each, whole)
    return Rows(start, min(start + each, whole))


@torch.no_grad()
def gathered(
    named: Iterable[tuple[str, Tensor]], ranks: Ranks, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The whole tensors, bucket by bucket, on rank 0; nothing is yielded on the others, which join the collectives.

    Cast to `dtype` before they travel, where one is given. What is not sharded is yielded as it is. All ranks must
    iterate to the end. A yielded tensor is valid until the next one is asked for.
    """
    bucket: list[tuple[str, DTensor]] = []
    nbytes = 0
    for name, tensor in named:
        if not isinstance(tensor, DTensor):
            if ranks.rank == 0:
                yield name, tensor
            continue
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if bucket and nbytes + size > BUCKET_BYTES:
            yield from _gather(bucket, ranks, dtype)
            bucket, nbytes = [], 0
        bucket.append((name, tensor))
        nbytes += size
    if bucket:
        yield from _gather(bucket, ranks, dtype)


def _gather(bucket: list[tuple[str, DTensor]], ranks: Ranks, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    dtype = dtype or bucket[0][1].dtype
    parts = [_padded(tensor, ranks.size).to(dtype) for _, tensor in bucket]
    mine = torch.cat(parts)
    received: list[Tensor] | None = [torch.empty_like(mine) for _ in range(ranks.size)] if ranks.rank == 0 else None
    with ranks.naming("a bucket of parameters"):
        dist.gather(mine, received, dst=0)
    if received is None:
        return
    offset = 0
    for (name, tensor), part in zip(bucket, parts, strict=True):
        whole = torch.cat([rank[offset : offset + part.numel()] for rank in received])
        yield name, whole[: tensor.numel()].view(tensor.shape)
        offset += part.numel()


def _padded(tensor: DTensor, size: int) -> Tensor:
    """[rows per rank * elements of a row], the same on every rank."""
    flat = local(tensor).flatten()
    expected = -(-tensor.shape[0] // size) * prod(tensor.shape[1:])
    return F.pad(flat, (0, expected - flat.numel()))


def like(parameter: Tensor, mine: Tensor) -> Tensor:
    """`mine`, this rank's rows, as a tensor that is sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return mine
    wrap: Any = DTensor.from_local
    return wrap(
        mine, parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip
