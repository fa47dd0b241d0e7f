"""The forward pass of Llama, Qwen2 (bias on q, k, v) and Qwen3 (norm on q, k), written for decoding.

Tokens come flat, without padding; whoever calls says how they attend. Weights are kept fused: q, k and v are one
matrix, gate and up another. Within a head the rotary pairs (i, i + D/2) of q and k lie next to each other, so that
the rotation is one complex product; scores do not change when both are permuted alike.

N tokens, C hidden size, H heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from async_rl.engines.linear import Linear, linear
from async_rl.errors import UserError
from async_rl.models.loading import check_supported

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")
"""Scalings whose frequencies do not depend on the length of the sequence."""

Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q [N, H, D], kv [N, 2K, D]: keys, then values) -> [N, H * D]"""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block."""

    norm: torch.Tensor
    qkv: Linear
    """To (H + 2K) * D."""
    qk_norm: torch.Tensor | None
    """[H + K, D]"""
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A whole set. A swap exchanges the reference, or copies what is in it where addresses must stay."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Linear

    def tensors(self) -> Iterator[torch.Tensor]:
        """Each once, in an order that all sets of a model share."""
        yield self.embedding
        yield self.norm
        products = [self.head]
        for layer in self.layers:
            yield layer.norm
            yield layer.mlp_norm
            if layer.qk_norm is not None:
                yield layer.qk_norm
            products += (layer.qkv, layer.out, layer.gate_up, layer.down)
        for product in products:
            if product.weight is not self.embedding:
                yield product.weight
            if product.bias is not None:
                yield product.bias

    def copy_(self, other: DecoderWeights) -> None:
        operators: Any = torch.ops.aten
        operators._foreach_copy_(list(self.tensors()), list(other.tensors()))  # few launches on a GPU


class Decoder:
    """The architecture; weights are passed in."""

    def __init__(self, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UserError where the config asks for something this forward pass does not do."""
        _check(config)
        c: Any = config
        self.dtype = dtype
        self.device = device
        self.vocabulary: int = c.vocab_size
        self.num_layers: int = c.num_hidden_layers
        self.heads: int = c.num_attention_heads
        self.kv_heads: int = c.num_key_value_heads
        self.head_size: int = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.eps: float = c.rms_norm_eps
        self.tied: bool = c.tie_word_embeddings
        with torch.device("cpu"):
            rotary: Any = LlamaRotaryEmbedding(c)
        self._frequencies: torch.Tensor = rotary.inv_freq.float()
        self._rotation_scale: float = rotary.attention_scaling
        half = self.head_size // 2
        self._pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).flatten()

    def rotations(self, length: int) -> torch.Tensor:
        """Complex [length, 1, D/2], on the CPU: how q and k at each position are turned."""
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        return torch.polar(torch.full_like(angles, self._rotation_scale), angles).unsqueeze(1)

    @torch.inference_mode()
    def prepare(self, tensors: Mapping[str, torch.Tensor]) -> DecoderWeights:
        """Weights under Hugging Face names -> a set of our own that shares no memory with them.

        Raises:
            ValueError: a tensor is missing or has another shape than the config says.
        """
        take = _Taker(tensors, self.dtype, self.device)
        heads, kv_heads = self.heads * self.head_size, self.kv_heads * self.head_size
        embedding = take("model.embed_tokens.weight")
        if len(embedding) != self.vocabulary:
            raise ValueError(f"model.embed_tokens.weight has {len(embedding)} rows, the config {self.vocabulary}")
        layers: list[Layer] = []
        for i in range(self.num_layers):
            attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            q = self._paired(take(f"{attention}.q_proj.weight", heads))
            k = self._paired(take(f"{attention}.k_proj.weight", kv_heads))
            v = take(f"{attention}.v_proj.weight", kv_heads)
            q_bias = take.maybe(f"{attention}.q_proj.bias", heads)
            qkv_bias = qk_norm = gate_up_bias = None
            if q_bias is not None:
                k_bias, v_bias = take(f"{attention}.k_proj.bias", kv_heads), take(f"{attention}.v_proj.bias", kv_heads)
                qkv_bias = torch.cat((self._paired(q_bias), self._paired(k_bias), v_bias))
            q_norm = take.maybe(f"{attention}.q_norm.weight", self.head_size)
            if q_norm is not None:
                k_norm = take(f"{attention}.k_norm.weight", self.head_size)
                rows = [q_norm[self._pairs]] * self.heads + [k_norm[self._pairs]] * self.kv_heads
                qk_norm = torch.stack(rows)
            gate_bias = take.maybe(f"{mlp}.gate_proj.bias")
            if gate_bias is not None:
                gate_up_bias = torch.cat((gate_bias, take(f"{mlp}.up_proj.bias")))
            layer = Layer(
                norm=take(f"model.layers.{i}.input_layernorm.weight"),
                qkv=linear(torch.cat((q, k, v)), qkv_bias),
                qk_norm=qk_norm,
                out=linear(take(f"{attention}.o_proj.weight"), take.maybe(f"{attention}.o_proj.bias")),
                mlp_norm=take(f"model.layers.{i}.post_attention_layernorm.weight"),
                gate_up=linear(
                    torch.cat((take(f"{mlp}.gate_proj.weight"), take(f"{mlp}.up_proj.weight"))), gate_up_bias
                ),
                down=linear(take(f"{mlp}.down_proj.weight"), take.maybe(f"{mlp}.down_proj.bias")),
            )
            layers.append(layer)
        head = embedding if self.tied else take("lm_head.weight")
        return DecoderWeights(embedding, tuple(layers), take("model.norm.weight"), linear(head))

    def forward(
        self, weights: DecoderWeights, tokens_N: torch.Tensor, rotations_N: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Hidden states [N, C] before the final norm. `rotations_N` is [N, 1, D/2]: `rotations` at each position."""
        x_NC = F.embedding(tokens_N, weights.embedding)
        rotated = self.heads + self.kv_heads
        for i, layer in enumerate(weights.layers):
            h_NC = self._norm(x_NC, layer.norm)
            qkv = layer.qkv(h_NC).view(len(x_NC), -1, self.head_size)
            qk = qkv[:, :rotated]
            if layer.qk_norm is not None:
                qk.copy_(F.rms_norm(qk, (self.head_size,), eps=self.eps) * layer.qk_norm)
            turned = torch.view_as_complex(qk.unflatten(-1, (-1, 2)).float()).mul_(rotations_N)  # in place in float32
            if self.dtype != torch.float32:
                qk.copy_(torch.view_as_real(turned).flatten(-2))
            attended = attend(i, qkv[:, : self.heads], qkv[:, self.heads :])
            x_NC = x_NC + layer.out(attended)
            h_NC = self._norm(x_NC, layer.mlp_norm)
            gate, up = layer.gate_up(h_NC).chunk(2, dim=-1)
            x_NC = x_NC + layer.down(F.silu(gate).mul_(up))
        return x_NC

    def logits(self, weights: DecoderWeights, hidden_NC: torch.Tensor) -> torch.Tensor:
        """[N, V] float32."""
        return weights.head(self._norm(hidden_NC, weights.norm)).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _paired(self, rows: torch.Tensor) -> torch.Tensor:
        """Within each head: row i, row i + D/2, row i + 1, ..."""
        return rows.unflatten(0, (-1, self.head_size))[:, self._pairs].flatten(0, 1)


PIECE = 1 << 21
"""Elements that go to a GPU at a time: a decode step that is launched meanwhile waits for one piece, not for all of an
embedding."""


class _Taker:
    """Copies tensors out of a snapshot, cast and moved."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = tensors
        self._dtype = dtype
        self._device = device

    def __call__(self, name: str, rows: int | None = None) -> torch.Tensor:
        tensor = self.maybe(name, rows)
        if tensor is None:
            raise ValueError(f"the weights lack {name}")
        return tensor

    def maybe(self, name: str, rows: int | None = None) -> torch.Tensor | None:
        tensor = self._tensors.get(name)
        if tensor is None:
            return None
        if rows is not None and len(tensor) != rows:
            raise ValueError(f"{name} has {len(tensor)} rows, the config says {rows}")
        if self._device.type == "cpu" or tensor.device.type != "cpu":
            return tensor.detach().to(device=self._device, dtype=self._dtype, copy=True)
        moved = torch.empty_like(tensor, device=self._device, dtype=self._dtype)
        for piece, of in zip(moved.flatten().split(PIECE), tensor.detach().flatten().split(PIECE), strict=True):
            piece.copy_(of)
        return moved


def _check(config: PreTrainedConfig) -> None:
    check_supported(config, "the model")
    c: Any = config
    if c.hidden_act not in ("silu", "swish"):
        raise UserError(f"the model's hidden_act is {c.hidden_act!r}: the embedded engine runs silu")
    rope = c.rope_parameters["rope_type"]
    if rope not in SUPPORTED_ROPE:
        raise UserError(f"the model's rope_type is {rope!r}: the embedded engine runs {', '.join(SUPPORTED_ROPE)}")
    if "sliding_attention" in (getattr(c, "layer_types", None) or []):
        raise UserError("the model has sliding-window attention: the embedded engine runs full attention only")
