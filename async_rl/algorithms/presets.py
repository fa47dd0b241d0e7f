"""A paper's method in a few lines: named assemblies of parts. `preset("grpo", kl_coef=0.01)` overrides any part.

`PRESETS` carries for each method its objective, its source and when to use it; docs/algorithms.md is generated from it.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from async_rl.algorithms.objective import Objective


@dataclass(frozen=True)
class Preset:
    objective: Objective
    method: str
    paper: str
    use: str


def preset(name: str, **overrides: Any) -> Objective:
    """The objective of a method, with some of its parts replaced.

    Raises:
        ValueError: naming the preset or the field, its value, and what is allowed.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"preset = {name!r}: {hint}known: {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(Objective)]
    for field, value in overrides.items():
        if field not in fields:
            close = difflib.get_close_matches(field, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(fields)}"
            raise ValueError(f"{field} = {value!r}: an objective has no such part; {hint}")
    return dataclasses.replace(PRESETS[name].objective, **overrides)


def _classic(**parts: Any) -> Objective:
    """One ratio, current / behaviour, and no importance weight: for samples that are (nearly) on policy."""
    on_policy: dict[str, Any] = {"old": "behaviour", "guard": "none", "veto": None, "dual_clip": None, "clip_high": 0.2}
    return Objective(**(on_policy | parts))


# Sources whose numbers differ from a field's default are written out; what a paper does not fix stays at our default.
PRESETS: dict[str, Preset] = {
    "async_default": Preset(
        Objective(),
        "Decoupled PPO with a two-sided token mask",
        "AReaL 2505.24298 Eq. 5; mask: IcePop; dual clip: 1912.09729",
        "asynchronous training with bounded staleness; the product's default",
    ),
    "areal": Preset(
        Objective(clip_high=0.2, dual_clip=None, guard_low=None, veto=None),
        "Decoupled PPO as published",
        "2505.24298 Eq. 5",
        "to compare with AReaL: only weights above 5 are masked",
    ),
    "tis": Preset(
        Objective(guard="truncate", guard_low=None, guard_high=2.0, veto=None),
        "Decoupled PPO with truncated importance sampling",
        "slime, verl, SkyRL (C = 2)",
        "small mismatch, every token should train",
    ),
    "cis": Preset(
        Objective(guard="clip", guard_low=0.5, guard_high=2.0, veto=None),
        "Decoupled PPO with clipped importance sampling",
        "slime (.5 / 2)",
        "like tis, with a floor under small weights",
    ),
    "a3po": Preset(
        Objective(proximal="loglinear"),
        "Decoupled PPO with a log-linear proximal policy",
        "A-3PO 2512.06547",
        "when the extra forward of the proximal policy costs too much",
    ),
    "ppo": Preset(
        _classic(advantage="critic", kl="k1", kl_in="reward", kl_coef=0.02),
        "PPO with a critic and KL in the reward",
        "1707.06347 Eq. 7; 2203.02155 Eq. 2",
        "RLHF with a reward model, when a critic is affordable",
    ),
    "async_ppo": Preset(
        _classic(advantage="vtrace", kl="k1", kl_in="reward", kl_coef=0.02),
        "PPO with a critic, V-trace and KL in the reward",
        "1707.06347 Eq. 7; 1802.01561 Eq. 1",
        "the same on samples of older policies: the clip stays near them, V-trace corrects values and advantages",
    ),
    "impala": Preset(
        _classic(surrogate="reinforce", advantage="vtrace"),
        "IMPALA: actor-critic with V-trace",
        "1802.01561 Sec. 4 (there with an entropy bonus, 0.01 or less)",
        "V-trace's own policy gradient, with no clip: for small updates",
    ),
    "grpo": Preset(
        _classic(kl="k3", kl_coef=0.04, aggregation="seq_mean_token_mean"),
        "GRPO",
        "2402.03300 Eq. 3-4 (there the KL is not ratio-weighted)",
        "verifiable rewards, synchronous, no critic",
    ),
    "r1": Preset(
        _classic(kl="k3", kl_coef=0.001, clip_low=10.0, clip_high=10.0, aggregation="seq_mean_token_mean"),
        "GRPO as in DeepSeek-R1",
        "2501.12948 (clip 10, KL 1e-3)",
        "to reproduce R1's second reasoning stage and its general RL",
    ),
    "r1_zero": Preset(
        _classic(kl="k3", kl_coef=0.001, clip_low=10.0, clip_high=10.0, aggregation="seq_mean_token_mean"),
        "GRPO from the base model, as in DeepSeek-R1-Zero",
        "2501.12948 (clip 10, KL 1e-3, reference refreshed every 400 steps)",
        "RL straight from a base model with rule rewards only",
    ),
    "dr_grpo": Preset(
        _classic(scale="none", aggregation="seq_mean_token_sum_norm"),
        "Dr. GRPO",
        "2503.20783 Sec. 3.2",
        "GRPO without its length and difficulty bias",
    ),
    "dapo": Preset(
        _classic(clip_high=0.28),
        "DAPO",
        "2503.14476 Eq. 8-12",
        "long chains of thought; with dynamic sampling and the overlong penalty",
    ),
    "lite_ppo": Preset(
        _classic(scale="batch"),
        "Lite PPO",
        "2508.08221",
        "small models: group mean, batch std, token mean",
    ),
    "max_rl": Preset(
        _classic(scale="group_mean"),
        "MaxRL",
        "2602.02710",
        "rewards in {0, 1} where rare successes should count more",
    ),
    "gspo": Preset(
        _classic(surrogate="gspo", clip_low=3e-4, clip_high=4e-4, aggregation="seq_mean_token_mean"),
        "GSPO",
        "2507.18071 Eq. 5-7",
        "mixture-of-experts models, whose token ratios are noisy",
    ),
    "sapo": Preset(_classic(surrogate="sapo"), "SAPO", "2511.20347", "a soft trust region instead of a hard clip"),
    "cispo": Preset(
        _classic(surrogate="cispo", clip_low=1.0, clip_high=4.0),
        "CISPO",
        "MiniMax-M1 2506.13585 Eq. 4-5; bound: ScaleRL",
        "asynchronous; no token should lose its gradient",
    ),
    "aipo": Preset(
        _classic(surrogate="aipo", rho=2.0),
        "AIPO",
        "LlamaRL 2505.24034",
        "asynchronous and simple: one truncated ratio, no proximal policy",
    ),
    "topr": Preset(
        _classic(surrogate="topr", center="none", scale="none", aggregation="seq_mean_token_sum"),
        "TOPR",
        "2503.14286",
        "very old or foreign samples, rewards in {-1, 1}",
    ),
    "dppo": Preset(
        _classic(clip_low=1.0, clip_high=float("inf"), dppo_low=0.2, dppo_high=0.2),
        "DPPO (total variation mask)",
        "2602.04879",
        "when rare tokens are clipped too often",
    ),
    "opsm": Preset(
        _classic(opsm_delta=0.1, kl="k3", kl_coef=0.001, aggregation="seq_mean_token_mean"),
        "GRPO with off-policy sequence masking and unbiased KL",
        "DeepSeek-V3.2 2512.02556",
        "several mini-batches per rollout batch",
    ),
    "reinforce": Preset(
        _classic(surrogate="reinforce", center="none", scale="none"),
        "REINFORCE without baseline (naive policy gradient)",
        "Williams 1992; CS336 lecture 17, naive",
        "teaching; strictly on policy",
    ),
    "reinforce_plus_plus": Preset(
        _classic(center="batch", kl="k1", kl_in="reward", kl_coef=0.01),
        "REINFORCE++",
        "2501.03262",
        "one sample per prompt: the baseline is the batch",
    ),
    "rloo": Preset(
        _classic(
            surrogate="reinforce",
            center="loo",
            scale="none",
            kl="k1",
            kl_in="reward",
            kl_coef=0.05,
            aggregation="seq_mean_token_sum",
        ),
        "RLOO",
        "2402.14740",
        "RLHF on policy without a critic; exactly unbiased",
    ),
    "raft": Preset(
        _classic(surrogate="reinforce", advantage="max"),
        "RAFT: likelihood of the best answers of each prompt, weighted by reward",
        "2304.06767",
        "a robust baseline; rewards >= 0",
    ),
    "expert_iteration": Preset(
        _classic(surrogate="reinforce", center="none", scale="none"),
        "Expert iteration / rejection-sampling fine-tuning",
        "2308.01825; DeepSeekMath 2402.03300 Sec. 5",
        "rewards in {0, 1}: likelihood of the right answers",
    ),
    "kimi_k1_5": Preset(
        _classic(surrogate="kimi", scale="none", aggregation="seq_mean_token_sum"),
        "Kimi k1.5 policy mirror descent",
        "2501.12599 Eq. 3",
        "whole-answer updates pulled to the policy of the iteration's start",
    ),
    "kimi_squared": Preset(
        _classic(surrogate="kimi_squared", advantage="tau_log_z", aggregation="seq_mean_token_sum"),
        "Kimi k1.5, exact squared surrogate",
        "2501.12599 Eq. 2",
        "the same without replacing tau log Z by the mean reward",
    ),
}
