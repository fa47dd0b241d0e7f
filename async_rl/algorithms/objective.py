"""A training objective assembled from parts: advantage x guard x surrogate x KL x aggregation.

    old = "proximal" (decoupled):   w = guard(sg[exp(proximal - behaviour)]),   u = exp(logp - proximal)
    old = "behaviour" (classic):    w = 1,                                      u = exp(logp - behaviour)
    loss = (1/N) sum m keep [w surrogate(u, A) + kl_coef KL - entropy_coef H],  N fixed before any guard

Decoupled PPO: Hilton et al. 2021 (arXiv:2110.00641) and AReaL (2505.24298, Eq. 5). With proximal = behaviour it is PPO;
with proximal = current it is REINFORCE with truncated importance weights. A token that is stale, guarded or filtered
leaves every term of the numerator and stays in the denominator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from async_rl.algorithms.adaptive_kl import HORIZON as KL_HORIZON
from async_rl.algorithms.aggregation import Aggregation, token_scale
from async_rl.algorithms.batch import CleanBatch, LossOutput, Normaliser, TokenBatch
from async_rl.algorithms.dppo import dppo_mask
from async_rl.algorithms.group_advantage import Center, Scale, group_advantage, max_advantage
from async_rl.algorithms.gspo import gspo
from async_rl.algorithms.guards import Guard, Guarded, guard_weights
from async_rl.algorithms.kimi import kimi_advantage, kimi_tokens
from async_rl.algorithms.kl import K3_BOUND, KLEstimator, kl_estimate, kl_slope
from async_rl.algorithms.metrics import loss_stats, weight_stats
from async_rl.algorithms.opsm import opsm_mask
from async_rl.algorithms.parts import check_parts
from async_rl.algorithms.ppo_clip import ppo_clip
from async_rl.algorithms.proximal import loglinear_proximal
from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.sapo import sapo
from async_rl.algorithms.stopgrad_is import aipo, cispo, reinforce
from async_rl.algorithms.surrogate import Surrogate, with_slope
from async_rl.algorithms.topr import topr

SurrogateName = Literal["ppo_clip", "gspo", "sapo", "reinforce", "cispo", "aipo", "topr", "kimi", "kimi_squared"]
AdvantageName = Literal["group", "max", "tau_log_z", "critic", "vtrace"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The parts of one method. The defaults are GRPO's advantages in the decoupled asynchronous loss."""

    advantage: AdvantageName = "group"
    """group: `center` and `scale`. max: the reward where it is the group's best, else 0. tau_log_z: Kimi's. critic:
    GAE. vtrace: a critic's too, corrected for samples of older policies.
    """
    rho_bar: float = 1.0
    c_bar: float = 1.0
    """V-trace's bounds of current / behaviour: in each difference of values, and in how far back it is felt."""
    center: Center = "mean"
    scale: Scale = "group"
    ddof: int = 1
    advantage_eps: float = 1e-6
    reward_clip: float = 20.0
    """Rewards are clipped to +-this before normalisation (AReaL)."""
    surrogate: SurrogateName = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    rho: float = 2.0
    """aipo's bound."""
    tau: float = 0.1
    """Kimi's strength of the pull to the proximal policy."""
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    """sapo's temperatures."""
    old: Literal["proximal", "behaviour"] = "proximal"
    """The denominator of u. proximal: decoupled, times the guarded weight w. behaviour: w = 1."""
    proximal: Literal["recomputed", "loglinear"] = "recomputed"
    """recomputed: `TokenBatch.proximal_T`. loglinear: A-3PO, from `versions_T` and `current_version`, no forward
    pass.
    """
    guard: Guard = "mask"
    guard_low: float | None = 0.5
    guard_high: float | None = 5.0
    veto: float | None = 1e-4
    opsm_delta: float | None = None
    dppo_low: float | None = None
    dppo_high: float | None = None
    kl: KLEstimator | Literal["none"] = "none"
    kl_in: Literal["loss", "reward"] = "loss"
    """reward: the caller shapes the rewards (reward_shaping.py) and the loss has no KL term."""
    kl_coef: float = 0.0
    kl_target: float | None = None
    """For a KL in the reward: `kl_coef` is where the coefficient starts, which then steers the KL of a rollout to so
    many nats (adaptive_kl.py). None: it stays."""
    kl_horizon: float = KL_HORIZON
    """Rollouts in which an adaptive coefficient changes by a fifth at most."""
    kl_ratio_weighted: bool = True
    entropy_coef: float = 0.0
    aggregation: Aggregation = "token_mean"

    def __post_init__(self) -> None:
        check_parts(self)
        if self.old == "behaviour" and (self.guard != "none" or self.veto is not None):
            raise ValueError(
                f"guard = {self.guard!r}, veto = {self.veto!r} with old = 'behaviour': guards act on "
                "proximal / behaviour; set old = 'proximal', or guard = 'none' and veto = None"
            )

        if self.kl_in == "reward" and self.kl not in ("k1", "none"):
            raise ValueError(f"kl = {self.kl!r} with kl_in = 'reward': rewards take k1 alone; write kl = 'k1'")
        whole = self.surrogate in ("gspo", "topr") or self.opsm_delta is not None
        if self.needs_critic and whole:
            raise ValueError(
                f"advantage = {self.advantage!r} with surrogate = {self.surrogate!r}, opsm_delta = "
                f"{self.opsm_delta!r}: those weigh whole sequences, a critic's advantages are per token; write "
                "ppo_clip and no opsm_delta"
            )
        if self.kl == "none" and self.kl_coef > 0:
            raise ValueError(f"kl_coef = {self.kl_coef!r} with kl = 'none': set kl to 'k1', 'k2' or 'k3'")
        self._check_adaptive_kl()
        self._check_vtrace()

    def _check_adaptive_kl(self) -> None:
        if self.kl_target is None:
            if self.kl_horizon != KL_HORIZON:
                raise ValueError(f"kl_horizon = {self.kl_horizon!r} without kl_target: write kl_target = 6.0")
        elif self.kl_in != "reward" or not self.needs_reference:
            raise ValueError(
                f"kl_target = {self.kl_target!r} with kl = {self.kl!r}, kl_in = {self.kl_in!r}, kl_coef = "
                f"{self.kl_coef!r}: what adapts is the coefficient of a KL in the reward, from above 0; write "
                "kl = 'k1', kl_in = 'reward' and kl_coef = 0.1, or no kl_target"
            )

    def _check_vtrace(self) -> None:
        bounds = f"rho_bar = {self.rho_bar!r}, c_bar = {self.c_bar!r}"
        if self.advantage != "vtrace" and (self.rho_bar, self.c_bar) != (1.0, 1.0):
            raise ValueError(f"{bounds} with advantage = {self.advantage!r}: write advantage = 'vtrace', or neither")
        if self.c_bar > self.rho_bar:
            raise ValueError(f"{bounds}: V-trace cuts traces no later than differences; write c_bar <= rho_bar")

    @property
    def needs_reference(self) -> bool:
        return self.kl != "none" and self.kl_coef > 0

    @property
    def needs_proximal(self) -> bool:
        """Whether the no-gradient forward at the start of the step is worth its time."""
        kimi = self.surrogate.startswith("kimi")
        return self.proximal == "recomputed" and (self.old == "proximal" or kimi)

    @property
    def needs_critic(self) -> bool:
        return self.advantage in ("critic", "vtrace")

    @property
    def needs_current(self) -> bool:
        """Whether advantages need the current policy's log-probs of the whole step."""
        return self.advantage == "vtrace"

    @property
    def has_ratio(self) -> bool:
        """Whether the loss weighs a token by current / behaviour itself, so that its advantage must not be."""
        return self.old == "proximal" or self.surrogate not in ("reinforce", "kimi", "kimi_squared")

    def advantages(self, rewards_N: Tensor, group_N: Tensor, in_batch_N: Tensor | None = None) -> Tensor:
        """[N] advantages of a whole step (batch statistics need all of it); NaN = missing reward = 0.

        in_batch_N: [N] bool, False = of another step: it counts in its group and in no batch statistic (REINFORCE++'s
        center, Lite PPO's scale). None = all are of this step.
        """
        rewards_N = rewards_N.clamp(-self.reward_clip, self.reward_clip)
        match self.advantage:
            case "group":
                return group_advantage(
                    rewards_N, group_N, center=self.center, scale=self.scale, ddof=self.ddof, eps=self.advantage_eps,
                    in_batch_N=in_batch_N,
                )  # fmt: skip
            case "max":
                return max_advantage(rewards_N, group_N)
            case "tau_log_z":
                return kimi_advantage(rewards_N, group_N, tau=self.tau)
            case "critic" | "vtrace":
                raise ValueError(f"advantage = {self.advantage!r} needs values: see learner.estimates.critic_estimates")

    def loss(self, tokens: TokenBatch, normaliser: Normaliser) -> LossOutput:
        """This micro-batch's part of the step's loss."""
        with torch.no_grad():
            batch = self._clean(tokens)
            scale_T = token_scale(tokens.mask_T, tokens.sequence_T, tokens.num_sequences, normaliser, self.aggregation)
            guarded = self._guard(batch)
            stats = weight_stats(batch, guarded)
            guarded = self._filter(batch, guarded)
            surrogate = self._surrogate(batch)
            stats |= loss_stats(tokens.mask_T, batch, guarded, surrogate)
            terms_T, slope_T = surrogate.loss_T.mul_(guarded.weight_T), surrogate.slope_T * guarded.weight_T
            if self.needs_reference and self.kl_in == "loss":
                kl_T, kl_slope_T = self._kl(batch, guarded)
                terms_T, slope_T = terms_T + self.kl_coef * kl_T, slope_T + self.kl_coef * kl_slope_T
            terms_T = terms_T.mul_(scale_T)
        total = with_slope(tokens.logp_T, terms_T.sum(), slope_T.mul_(scale_T))
        if tokens.entropy_T is not None and self.entropy_coef != 0:
            bonus_T = tokens.entropy_T.masked_fill(~guarded.keep_T, 0.0) * scale_T
            total = total - self.entropy_coef * bonus_T.sum()
        return LossOutput(total, stats, guarded.weight_T, terms_T)

    def _clean(self, tokens: TokenBatch) -> CleanBatch:
        """Everything in fp32 or better, with 0 wherever the token has no weight."""
        active_T = tokens.mask_T if tokens.weight_mask_T is None else tokens.mask_T & tokens.weight_mask_T
        all_are = not active_T.is_cuda and bool(active_T.all())  # saves the copies; a GPU would have to be waited for
        inactive_T = None if all_are else ~active_T

        def clean(x_T: Tensor) -> Tensor:
            x_T = x_T if x_T.dtype == torch.float64 else x_T.float()
            return x_T if inactive_T is None else x_T.masked_fill(inactive_T, 0.0)

        logp_T, behaviour_T = clean(tokens.logp_T), clean(tokens.behaviour_T)
        if self.proximal == "loglinear":
            if tokens.versions_T is None or tokens.current_version is None:
                raise ValueError("proximal = 'loglinear' needs versions_T and current_version in the TokenBatch")
            proximal_T = loglinear_proximal(behaviour_T, logp_T, tokens.versions_T, tokens.current_version)
        else:
            proximal_T = logp_T if tokens.proximal_T is None else clean(tokens.proximal_T)
        if self.needs_reference and tokens.reference_T is None:
            raise ValueError(f"kl = {self.kl!r} with kl_coef = {self.kl_coef} needs reference_T in the TokenBatch")
        advantages_T = tokens.advantages_T
        if advantages_T is None:
            advantages_T = tokens.advantages_N.index_select(0, tokens.sequence_T)
        return CleanBatch(
            logp_T,
            behaviour_T,
            proximal_T,
            None if tokens.reference_T is None else clean(tokens.reference_T),
            None if tokens.entropy_T is None else clean(tokens.entropy_T),
            clean(advantages_T),
            tokens.advantages_N,
            active_T,
            tokens.sequence_T,
        )

    def _guard(self, b: CleanBatch) -> Guarded:
        if self.old == "behaviour":
            return Guarded(None, None, b.active_T.to(b.logp_T.dtype), b.active_T)
        return guard_weights(
            b.proximal_T, b.behaviour_T, b.active_T, b.sequence_T, b.num_sequences,
            guard=self.guard, low=self.guard_low, high=self.guard_high, veto=self.veto,
        )  # fmt: skip

    def _filter(self, b: CleanBatch, guarded: Guarded) -> Guarded:
        """Also without the tokens that the filters on the current policy take out, and without w before the guard."""
        guarded = guarded._replace(log_w_T=None, raw_T=None)
        drop_T = None
        if self.opsm_delta is not None:
            opsm = opsm_mask(b.logp_T, b.behaviour_T, b.advantages_N, b.active_T, b.sequence_T, delta=self.opsm_delta)
            drop_T = ~opsm.keep_N[b.sequence_T]
        if self.dppo_low is not None and self.dppo_high is not None:
            band = {"low": self.dppo_low, "high": self.dppo_high}
            dppo_T = dppo_mask(b.logp_T, b.behaviour_T, b.advantages_T, b.active_T, **band)
            drop_T = dppo_T if drop_T is None else drop_T | dppo_T
        if drop_T is None:
            return guarded
        return guarded._replace(weight_T=guarded.weight_T.masked_fill(drop_T, 0.0), keep_T=guarded.keep_T & ~drop_T)

    def _surrogate(self, b: CleanBatch) -> Surrogate:
        old_T = b.proximal_T if self.old == "proximal" else b.behaviour_T
        clip = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        sequences = (b.active_T, b.sequence_T, b.num_sequences)
        match self.surrogate:
            case "ppo_clip":
                return ppo_clip(b.logp_T, old_T, b.advantages_T, **clip, dual_clip=self.dual_clip)
            case "gspo":
                return gspo(b.logp_T, old_T, b.advantages_N, b.active_T, b.sequence_T, **clip)
            case "sapo":
                taus = {"tau_positive": self.tau_positive, "tau_negative": self.tau_negative}
                return sapo(b.logp_T, old_T, b.advantages_T, **taus)
            case "reinforce":
                return reinforce(b.logp_T, b.advantages_T)
            case "cispo":
                return cispo(b.logp_T, old_T, b.advantages_T, **clip)
            case "aipo":
                return aipo(b.logp_T, old_T, b.advantages_T, rho=self.rho)
            case "topr":
                return topr(b.logp_T, old_T, b.advantages_N, b.active_T, b.sequence_T)
            case "kimi" | "kimi_squared":
                return kimi_tokens(self.surrogate, b.logp_T, b.proximal_T, b.advantages_T, *sequences, tau=self.tau)

    def _kl(self, b: CleanBatch, guarded: Guarded) -> tuple[Tensor, Tensor]:
        """[T] KL term and its derivative, 0 where the token has left the loss."""
        assert b.reference_T is not None and self.kl != "none"
        kl_T = kl_estimate(b.logp_T, b.reference_T, self.kl, bound=K3_BOUND)
        slope_T = kl_slope(b.logp_T, b.reference_T, self.kl, bound=K3_BOUND)
        if not self.kl_ratio_weighted:
            return kl_T.masked_fill_(~guarded.keep_T, 0.0), slope_T.masked_fill_(~guarded.keep_T, 0.0)
        old_T = b.proximal_T if self.old == "proximal" else b.behaviour_T
        weight_T = log_ratio(b.logp_T, old_T).exp_().mul_(guarded.weight_T)
        return weight_T * kl_T, slope_T.add_(kl_T).mul_(weight_T)  # (u k)' = u (k + k')
