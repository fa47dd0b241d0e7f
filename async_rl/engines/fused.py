"""A decode step of few launches: what `engines.decoding.decode` computes, by kernels that read every weight once.

Up to `FEW_ROWS` rows a layer is five launches: norm and q, k, v; attention; its output; norm, gate, up and their
product; down. More rows keep the matrix units busy, and cuBLAS knows better; attention and drawing stay.

N rows: slots [0, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from async_rl.engines.decoder import Decoder, DecoderWeights, Layer
from async_rl.engines.kernels.attention import attend, combine
from async_rl.engines.kernels.drawing import draw
from async_rl.engines.kernels.project import project
from async_rl.engines.kv_cache import KVCache
from async_rl.engines.linear import Linear
from async_rl.engines.slots import POSITION, TOKEN, Slots

FEW_ROWS = 64
PROGRAMS = 128
"""Of an attention, so that every multiprocessor has something to do."""
LEAST_KEYS = 64
"""That are worth a program of their own."""


class Fused:
    def __init__(self, decoder: Decoder, cache: KVCache, slots: Slots) -> None:
        self._decoder, self._cache, self._slots = decoder, cache, slots
        self.few_rows = FEW_ROWS
        self.early = False
        """See kernels.project."""

    def __call__(self, weights: DecoderWeights, rows: int, length: int, count: torch.Tensor, due: torch.Tensor) -> None:
        """Advance slots [0, rows), of which the first `count` [1] are in use, by one token; set their flags in `due`.

        length: a bound of every sequence, for the choice of a shape.
        """
        x_NC = F.embedding(self._slots.state[TOKEN, :rows], weights.embedding)
        splits = self._splits(rows, length)
        for i, layer in enumerate(weights.layers):
            self._attend(x_NC, layer, i, splits, count)
            self._feed_forward(x_NC, layer)
        logits_NV = x_NC.new_empty((rows, self._decoder.vocabulary))
        self._project(x_NC, weights.head, logits_NV, norm=weights.norm)
        draw(self._slots, logits_NV, count, due, early=self.early)

    def _splits(self, rows: int, length: int) -> int:
        wanted = min(PROGRAMS // (rows * self._decoder.kv_heads), length // LEAST_KEYS, 8 if rows == 1 else 32)
        return 1 << max(wanted, 1).bit_length() - 1

    def _attend(self, x_NC: torch.Tensor, layer: Layer, index: int, splits: int, count: torch.Tensor) -> None:
        rows = len(x_NC)
        qkv = x_NC.new_empty((rows, layer.qkv.weight.shape[0]))
        self._project(x_NC, layer.qkv, qkv, norm=layer.norm)
        rotations = torch.view_as_real(self._slots.rotations)
        positions = self._slots.state[POSITION]
        attended, mass = attend(
            qkv, layer.qk_norm, self._decoder.eps, rotations, positions, count, self._cache.layer(index),
            heads=self._decoder.heads, splits=splits, early=self.early,
        )  # fmt: skip
        weighting = None
        if splits > 1 and rows == 1 and self.few_rows:
            weighting = mass
        elif splits > 1:
            attended = combine(attended, mass, x_NC.dtype, early=self.early)
        self._project(attended, layer.out, x_NC, residual=True, weighting=weighting)

    def _feed_forward(self, x_NC: torch.Tensor, layer: Layer) -> None:
        inner = x_NC.new_empty((len(x_NC), layer.down.weight.shape[1]))
        self._project(x_NC, layer.gate_up, inner, norm=layer.mlp_norm, gated=True)
        self._project(inner, layer.down, x_NC, residual=True)

    def _project(
        self,
        x: torch.Tensor,
        product: Linear,
        y_NM: torch.Tensor,
        *,
        norm: torch.Tensor | None = None,
        gated: bool = False,
        residual: bool = False,
        weighting: torch.Tensor | None = None,
    ) -> None:
        """See kernels.project."""
        eps = self._decoder.eps
        if len(y_NM) <= self.few_rows:
            project(
                x, product.weight, product.bias, y_NM,
                norm=norm, eps=eps, gated=gated, residual=residual, weighting=weighting, early=self.early,
            )  # fmt: skip
            return
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, eps)
        result = product(x)
        if gated:
            gate, up = result.chunk(2, dim=-1)
            torch.mul(F.silu(gate), up, out=y_NM)
        elif residual:
            y_NM += result
        else:
            y_NM.copy_(result)
