"""A language model that says one number instead of a distribution: critics and reward models.

    critic = PackedScalar.of(model, seed=1, head="zero")
    values_K = critic(tokens)                       # V of the state before each trained token
    scores_S = reward_model.score(ends)             # `ends`: packed sequences of `Sequences.ending`

The head is a linear map in fp32 without a bias, its standard deviation 1 / sqrt(H + 1) (Stiennon et al. 2020,
arXiv:2009.01325), so that scores start at order 1. On disk it is transformers' sequence classifier with one label.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from async_rl.config import Model
from async_rl.learner.distributed import Ranks
from async_rl.learner.packed_attention import run_packed, use_packed_attention
from async_rl.learner.packing import PackedTokens
from async_rl.learner.policy import ONE_TOKEN, compile_layers, recompute
from async_rl.learner.sharding import shard
from async_rl.models.loading import build_model, load_config, read

Head = Literal["normal", "zero"]
CLASSIFIER = "ForSequenceClassification"
BIAS = "reward_bias"
"""In config.json: what `score` subtracts, so that reference answers have mean 0."""


class PackedScalar(nn.Module):
    """Not in training mode: without dropout."""

    def __init__(self, model: PreTrainedModel, *, dtype: str = "float32") -> None:
        """model: a sequence classifier with one label. dtype: of the matrix products but the head's (autocast)."""
        super().__init__()
        self.model = model
        self._low = torch.bfloat16 if dtype == "bfloat16" else None
        self._collective = False
        self.eval()
        use_packed_attention(model)

    @classmethod
    def of(cls, base: PreTrainedModel, *, seed: int, head: Head = "normal", dtype: str = "float32") -> PackedScalar:
        """A fresh head on the body of a causal language model, which becomes this module's own: pass a copy where the
        other goes on. The global RNG is left as it was."""
        config: Any = base.config.__class__.from_dict(base.config.to_dict())
        config.num_labels = 1
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config)
        setattr(model, model.base_model_prefix, base.base_model)
        weight = torch.zeros(1, config.hidden_size)
        if head == "normal":
            drawn = torch.Generator().manual_seed(seed)
            weight.normal_(0.0, (config.hidden_size + 1) ** -0.5, generator=drawn)
        model.score = nn.Linear(config.hidden_size, 1, bias=False, device="meta")
        model.score.weight = nn.Parameter(weight.to(next(base.parameters()).device))
        return cls(model, dtype=dtype)

    @classmethod
    def load(
        cls,
        model: Model,
        *,
        seed: int,
        head: Head = "normal",
        dtype: str = "float32",
        field: str = "model.path",
    ) -> PackedScalar:
        """From a directory that `save` wrote, or with a fresh head from a causal language model or a tiny config.

        All parameters are fp32. field: what an error names.

        Raises:
            UserError: there is no such model, or it is a classifier of several labels.
        """
        architectures = load_config(model, field=field).architectures or [""]
        if not architectures[0].endswith(CLASSIFIER):
            return cls.of(build_model(model, seed=seed, field=field), seed=seed, head=head, dtype=dtype)
        options: dict[str, Any] = {"dtype": torch.float32, "num_labels": 1}
        found: Any = read(model, "weights", AutoModelForSequenceClassification.from_pretrained, field, **options)
        return cls(found, dtype=dtype)

    def shard(self, ranks: Ranks) -> None:
        """As `PackedPolicy.shard`. The head is not gathered in a lower dtype."""
        shard(self.head, (), ranks)
        shard(self, self._layers(), ranks, self._low)
        self._collective = True

    def fuse(self) -> None:
        """Fuse what is between matrix products, for a GPU; before `recompute_layers`."""
        compile_layers(self._layers())

    def recompute_layers(self) -> None:
        """As `PackedPolicy.recompute_layers`."""
        recompute(self._layers())

    def _layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.base_model.layers)

    @property
    def head(self) -> nn.Linear:
        return cast(nn.Linear, self.model.score)

    @property
    def bias(self) -> float:
        return float(getattr(self.model.config, BIAS, 0.0))

    @bias.setter
    def bias(self, value: float) -> None:
        setattr(self.model.config, BIAS, value)

    def forward(self, tokens: PackedTokens) -> Tensor:
        """[K] float32, at the positions that predict the trained tokens. The bias is not subtracted."""
        input_1T, position_1T, families = tokens.input_1T, tokens.position_1T, tokens.families
        if not len(tokens.target_K):
            if not self._collective:
                return torch.zeros(0, device=input_1T.device)
            input_1T = position_1T = torch.zeros(1, 1, dtype=torch.int64, device=input_1T.device)
            families = ONE_TOKEN
        with torch.autocast(input_1T.device.type, self._low) if self._low else nullcontext():
            hidden_TH = run_packed(self.model, input_1T, position_1T, families)
        scores_K1: Tensor = self.head(hidden_TH.index_select(0, tokens.predictor_K).float())
        return scores_K1.squeeze(1)

    @torch.no_grad()
    def score(self, tokens: PackedTokens) -> Tensor:
        """[K] float32, the bias subtracted: the reward."""
        return self(tokens) - self.bias

    def save(self, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """`AutoModelForSequenceClassification.from_pretrained(directory)` gives the logits of `forward`, of the last
        token that is not `config.pad_token_id`: where that is the end token too, transformers reads one too early."""
        self.model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
