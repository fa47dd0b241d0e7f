"""A decode step of few launches: what `engines.decoding.decode` computes, by kernels of our own.

Up to `FEW_ROWS` rows, all layers are one launch (kernels.layers). More rows keep the matrix units busy, and cuBLAS
knows better; attention and drawing stay.

N rows: slots [0, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from async_rl.engines.decoder import Decoder, DecoderWeights, Layer
from async_rl.engines.kernels.attention import attend
from async_rl.engines.kernels.drawing import draw
from async_rl.engines.kernels.layers import Layers, Table
from async_rl.engines.kv_cache import KVCache
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
        self.layers = Layers(decoder, decoder.device)
        self._table: Table | None = None

    def settle(self, weights: DecoderWeights) -> None:
        """To be called, outside a recording, when the weights are in other tensors than before."""
        self._table = Table(weights)

    def __call__(self, weights: DecoderWeights, rows: int, length: int, count: torch.Tensor, due: torch.Tensor) -> None:
        """Advance slots [0, rows), of which the first `count` [1] are in use, by one token; set their flags in `due`.

        length: a bound of every sequence, for the choice of a shape.
        """
        assert self._table is not None, "settle comes first"
        splits = self._splits(rows, length)
        rotations = torch.view_as_real(self._slots.rotations)
        tokens_N, positions = self._slots.state[TOKEN, :rows], self._slots.state[POSITION]
        if rows <= self.few_rows:
            x_NC = self.layers(
                self._table, weights.embedding, tokens_N, splits, rotations, positions, count, self._cache.store
            ).to(weights.norm.dtype)
        else:
            x_NC = F.embedding(tokens_N, weights.embedding)
            for i, layer in enumerate(weights.layers):
                self._attend(x_NC, layer, i, splits, rotations, positions, count)
                h_NC = F.rms_norm(x_NC, layer.mlp_norm.shape, layer.mlp_norm, self._decoder.eps)
                gate, up = layer.gate_up(h_NC).chunk(2, dim=-1)
                x_NC += layer.down(F.silu(gate).mul_(up))
        logits_NV = weights.head(F.rms_norm(x_NC, weights.norm.shape, weights.norm, self._decoder.eps))
        draw(self._slots, logits_NV, count, due)

    def _splits(self, rows: int, length: int) -> int:
        wanted = min(PROGRAMS // (rows * self._decoder.kv_heads), length // LEAST_KEYS, 8 if rows == 1 else 32)
        return 1 << max(wanted, 1).bit_length() - 1

    def _attend(
        self, x_NC: torch.Tensor, layer: Layer, index: int, splits: int, rotations: torch.Tensor,
        positions: torch.Tensor, count: torch.Tensor,
    ) -> None:  # fmt: skip
        qkv = layer.qkv(F.rms_norm(x_NC, layer.norm.shape, layer.norm, self._decoder.eps))
        attended = attend(
            qkv, layer.qk_norm, self._decoder.eps, rotations, positions, count, self._cache.layer(index),
            heads=self._decoder.heads, splits=splits,
        )  # fmt: skip
        x_NC += layer.out(attended)
