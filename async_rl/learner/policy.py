"""The policy as one module: packed tokens in, log-probs and entropy of the trained ones out.

Head and body are one module, because whoever shards its parameters has to gather those of both around one forward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from async_rl.learner.distributed import Ranks
from async_rl.learner.families import Block, Family
from async_rl.learner.logprobs import TokenLogprobs, token_logprobs
from async_rl.learner.packed_attention import run_packed, use_packed_attention
from async_rl.learner.packing import PackedTokens
from async_rl.learner.sharding import shard

ONE_TOKEN = (Family(0, (Block(1, 1),)),)
T = TypeVar("T")


def recompute(layers: nn.ModuleList) -> None:
    """Activation checkpointing: keep what goes into a decoder layer, compute the layer again when its gradient is
    wanted (arXiv 1604.06174). The gradients are the same bit for bit."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def compile_layers(layers: nn.ModuleList) -> None:
    """Each decoder layer as torch.compile makes it: norms, rotary embedding, gate, residuals, casts in a few kernels.
    Layers of one shape share what is compiled, in the first two steps, the second time for any number of tokens. Before
    `recompute`."""
    for layer in layers:
        layer.forward = torch.compile(layer.forward)


class PackedPolicy(nn.Module):
    """Not in training mode: without dropout, log-probs are those of the policy that samples."""

    def __init__(self, model: PreTrainedModel, *, temperature: float = 1.0, dtype: str = "float32") -> None:
        """temperature: logits are divided by it, as by who sampled. dtype: of the matrix products (autocast); the
        parameters keep theirs."""
        super().__init__()
        self.model = model
        self._temperature = temperature
        self._low = torch.bfloat16 if dtype == "bfloat16" else None
        self._collective = self._fused = False
        self.eval()
        use_packed_attention(model)

    def fuse(self) -> None:
        """Fuse what is between matrix products, for a GPU; before `recompute_layers`."""
        compile_layers(self._layers())
        self._fused = True

    def recompute_layers(self) -> None:
        """Activation checkpointing, see `recompute`."""
        recompute(self._layers())

    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.base_model.layers)

    def shard(self, ranks: Ranks) -> None:
        """Spread the parameters over the ranks (learner.sharding), before an optimiser is made. From now on all ranks
        make equally many forward and backward passes; one without trained tokens reads a single token."""
        shard(self, self._layers(), ranks, self._low)
        self._collective = True

    def forward(self, tokens: PackedTokens) -> TokenLogprobs:
        """[K] each, float32."""
        if not len(tokens.target_K) and not self._collective:
            nothing = torch.zeros(0, device=tokens.target_K.device)
            return TokenLogprobs(nothing, nothing)
        return token_logprobs(
            self._hidden(tokens),
            cast(nn.Linear, self.model.get_output_embeddings()).weight,
            tokens.target_K,
            temperature=self._temperature,
            dtype=self._low,
            fused=self._fused,
        )

    def hidden(self, tokens: PackedTokens) -> Tensor:
        """[K, H] after the last norm, at the positions that predict the trained tokens."""
        return self.with_head(tokens, lambda hidden_KH, _: hidden_KH)

    def with_head(self, tokens: PackedTokens, judge: Callable[[Tensor, Tensor], T]) -> T:
        """What `judge` makes of the hidden states, [K, H] as in `hidden`, and the head's weights, [V, H].

        Where parameters are spread over ranks the head is whole here and in the backward pass of what is returned; who
        keeps its weights for longer copies them."""
        return judge(self._hidden(tokens), cast(nn.Linear, self.model.get_output_embeddings()).weight)

    def _hidden(self, tokens: PackedTokens) -> Tensor:
        input_1T, position_1T, families = tokens.input_1T, tokens.position_1T, tokens.families
        if not input_1T.numel():
            input_1T, families = torch.zeros(1, 1, dtype=torch.int64, device=input_1T.device), ONE_TOKEN
            position_1T = input_1T
        with torch.autocast(input_1T.device.type, self._low) if self._low else nullcontext():
            hidden_TH = run_packed(self.model, input_1T, position_1T, families)
        return hidden_TH.index_select(0, tokens.predictor_K)
