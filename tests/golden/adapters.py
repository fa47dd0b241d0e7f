"""One adapter per operation of the golden cases: lists in, a public function, lists out.

The numbers were computed independently in numpy fp64. Rows of a [B, T] input are the sequences of a packed batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from async_rl.algorithms.adaptive_kl import adaptive_kl
from async_rl.algorithms.aggregation import aggregate, masked_normalize
from async_rl.algorithms.baseline import bernoulli_baseline, offpolicy_baseline
from async_rl.algorithms.batch import LossOutput, Normaliser, TokenBatch
from async_rl.algorithms.calibration import brier, ece
from async_rl.algorithms.curation import difficulty, long2short_pairs, pass_rate, shortest_correct, survives_guessing
from async_rl.algorithms.distillation import distill_kl
from async_rl.algorithms.dppo import dppo_mask
from async_rl.algorithms.entropy import entropy
from async_rl.algorithms.ess import ess, ess_lr_scale
from async_rl.algorithms.exact_kl import exact_kl, expected_estimate
from async_rl.algorithms.gae import gae
from async_rl.algorithms.group_advantage import group_advantage, max_advantage
from async_rl.algorithms.gspo import sequence_ratio
from async_rl.algorithms.guards import guard_weights
from async_rl.algorithms.kimi import group_tau_log_z, kimi_closed_form
from async_rl.algorithms.kl import kl_estimate
from async_rl.algorithms.length_reward import add_length_reward, kimi_length_reward, length_weight
from async_rl.algorithms.m2po import m2po_mask
from async_rl.algorithms.merge import merge_weights
from async_rl.algorithms.metrics import summarise
from async_rl.algorithms.mismatch import mismatch
from async_rl.algorithms.objective import Objective
from async_rl.algorithms.opsm import opsm_mask
from async_rl.algorithms.overlong import overlong_penalty
from async_rl.algorithms.overoptimisation import detect_overoptimisation, gold_curve, gold_peak
from async_rl.algorithms.pass_at_k import pass_at_k
from async_rl.algorithms.ppo_clip import ppo_clip
from async_rl.algorithms.ppo_ptx import ppo_ptx
from async_rl.algorithms.preference import preference_loss
from async_rl.algorithms.presets import preset
from async_rl.algorithms.proximal import loglinear_alpha, loglinear_proximal
from async_rl.algorithms.ratios import log_ratio
from async_rl.algorithms.repetition import repeat_stop
from async_rl.algorithms.reward_model import kwise_loss, normalise_scores, pair_loss
from async_rl.algorithms.reward_shaping import kl_shaped_rewards
from async_rl.algorithms.sampling import keep_group, prioritized_probabilities
from async_rl.algorithms.segments import segment_mean
from async_rl.algorithms.stopgrad_is import aipo, aipo_weight, cispo, cispo_weight, reinforce
from async_rl.algorithms.text_rewards import combine_rewards, format_reward, language_consistency
from async_rl.algorithms.thinking import BUDGET_STOP, BUDGET_STOP_REPORT, thinking_enabled
from async_rl.algorithms.topr import topr_alpha
from async_rl.algorithms.trpo import trpo_step
from async_rl.algorithms.value_loss import value_loss
from async_rl.algorithms.versions import segment_mask, version_lag
from async_rl.algorithms.vtrace import vtrace
from async_rl.algorithms.whitening import masked_whiten
from async_rl.environments.sorting import distance, inclusion_ordering
from async_rl.staleness.admission import capacity

Case = dict[str, Any]


def tensor(value: Any, *, grad: bool = False) -> Tensor:
    """fp64, null = missing = NaN."""

    def numbers(x: Any) -> Any:
        return [numbers(y) for y in x] if isinstance(x, list) else math.nan if x is None else float(x)

    return torch.tensor(numbers(value), dtype=torch.float64, requires_grad=grad)


class Packed:
    """The [B, T] inputs of a case as packed tensors, and back."""

    def __init__(self, inputs: Case, like: str = "mask") -> None:
        self.inputs = inputs
        self.shape = tensor(inputs[like]).shape
        self.num = self.shape[0]
        self.sequence_T = torch.arange(self.num).repeat_interleave(self.shape[1])
        self.mask_T = self("mask").bool()

    def __call__(self, name: str, *, grad: bool = False) -> Tensor:
        return tensor(self.inputs[name]).flatten().requires_grad_(grad)

    def versions(self) -> Tensor:
        return self("versions").long()

    def list(self, x_T: Tensor) -> list[list[float]]:
        return x_T.detach().double().reshape(self.shape).tolist()

    def run(self, objective: Objective, logp_T: Tensor, behaviour_T: Tensor, **options: Any) -> LossOutput:
        """Loss and gradient of one batch; advantages per token or per sequence."""
        constant = options.pop("constant", None)
        advantages = options.pop("advantages", None)
        advantages = tensor(self.inputs["advantages"]) if advantages is None else advantages
        if advantages.ndim == 2:
            options["advantages_T"], advantages = advantages.flatten(), advantages[:, 0]
        tokens = TokenBatch(
            logp_T=logp_T, behaviour_T=behaviour_T, mask_T=self.mask_T, sequence_T=self.sequence_T,
            advantages_N=advantages, **options,
        )  # fmt: skip
        out = objective.loss(tokens, Normaliser.of(self.mask_T, self.sequence_T, self.num, constant))
        logp_T.grad = None
        out.loss.backward()
        return out


def gradient(value: Tensor, of: Tensor) -> list[Any]:
    return torch.autograd.grad(value, of, retain_graph=True)[0].tolist()


def group_advantage_op(inputs: Case, params: Case) -> Case:
    rewards = tensor(inputs["rewards"])
    group_N = torch.arange(rewards.shape[0]).repeat_interleave(rewards.shape[1])
    return {"advantages": group_advantage(rewards.flatten(), group_N, **params).reshape(rewards.shape).tolist()}


def group_advantage_ragged(inputs: Case, params: Case) -> Case:
    return {"advantages": group_advantage(tensor(inputs["rewards"]), tensor(inputs["group"]).long(), **params).tolist()}


def lecture17_deltas(inputs: Case, params: Case) -> Case:
    rewards = tensor(inputs["rewards"])
    group_N = torch.arange(rewards.shape[0]).repeat_interleave(rewards.shape[1])

    def deltas(**options: Any) -> list[Any]:
        return group_advantage(rewards.flatten(), group_N, **options).reshape(rewards.shape).tolist()

    return {
        "rewards": deltas(center="none", scale="none"),
        "centered_rewards": deltas(scale="none"),
        "normalized_rewards": deltas(**params),
        "max_rewards": max_advantage(rewards.flatten(), group_N).reshape(rewards.shape).tolist(),
    }


def kl_shaped_rewards_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    shaped = kl_shaped_rewards(p("logp"), p("ref_logp"), tensor(inputs["score"]), p.mask_T, p.sequence_T, **params)
    return {"kl": p.list(shaped.kl_T), "rewards": p.list(shaped.rewards_T)}


def gae_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    advantages_T, returns_T = gae(p("rewards"), p("values"), p.mask_T, p.sequence_T, **params)
    return {"advantages": p.list(advantages_T), "returns": p.list(returns_T)}


def masked_whiten_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    return {"whitened": p.list(masked_whiten(p("x"), p.mask_T, ddof=params["ddof"], eps=params["eps_in_sqrt"]))}


def value_loss_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    values_T = p("values", grad=True)
    loss, clip_fraction = value_loss(values_T, p("old_values"), p("returns"), p.mask_T, **params)
    loss.backward()
    return {"loss": loss.item(), "grad": p.list(values_T.grad), "clipfrac": clip_fraction.item()}


def ppo_clip_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    clip = {"clip_low": params["eps_low"], "clip_high": params["eps_high"], "dual_clip": params.get("dual_c")}
    objective = preset("dapo", **clip, aggregation=params["agg"])
    logp_T = p("logp", grad=True)
    out = p.run(objective, logp_T, p("old_logp"), constant=params.get("const"))
    return {
        "loss": out.loss.item(),
        "grad": p.list(logp_T.grad),
        "per_token": p.list(ppo_clip(p("logp"), p("old_logp"), p("advantages"), **clip).loss_T.where(p.mask_T, 0.0)),
        "clipfrac": summarise(out.stats)["clip_fraction"],
    }


def decoupled_ppo(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    guard = {"guard": params["guard"], "veto": params.get("veto")}
    low, high = params.get("guard_low"), params.get("guard_high")
    objective = preset(
        "async_default", clip_low=params["eps_low"], clip_high=params["eps_high"], dual_clip=params.get("dual_c"),
        guard_low=low, guard_high=high, **guard,
    )  # fmt: skip
    logp_T = p("logp", grad=True)
    out = p.run(objective, logp_T, p("behav_logp"), proximal_T=p("prox_logp"))
    guarded = guard_weights(p("prox_logp"), p("behav_logp"), p.mask_T, p.sequence_T, p.num, low=low, high=high, **guard)
    return {
        "loss": out.loss.item(),
        "grad": p.list(logp_T.grad),
        "weight": p.list(out.weight_T),
        "kept": p.list(guarded.keep_T),
        "raw_weight": p.list(guarded.raw_T),
        "guarded_fraction": summarise(out.stats)["guarded_fraction"],
    }


def prox_loglinear(inputs: Case, params: Case) -> Case:
    behaviour, versions = tensor(inputs["behav_logp"]), tensor(inputs["versions"]).long()
    return {
        "prox_logp": loglinear_proximal(behaviour, tensor(inputs["logp"]), versions, **params).tolist(),
        "alpha": loglinear_alpha(versions, **params).tolist(),
    }


def version_lag_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    lag = version_lag(p.versions(), p.mask_T, p.sequence_T, p.num, **params)
    return {
        "head_lag": lag.head_N.tolist(),
        "max_lag": lag.max_N.tolist(),
        "mean_token_lag": lag.token_mean.item(),
        "n_versions": lag.num_versions_N.tolist(),
    }


def segment_mask_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    return {"mask": p.list(segment_mask(p.versions(), p.mask_T, min_version=params["min_version"]))}


def ess_op(inputs: Case, params: Case) -> Case:
    mask = inputs.get("mask")
    size, fraction = ess(tensor(inputs["weights"]), None if mask is None else tensor(mask).bool())
    return {"ess": size.item(), "ess_frac": fraction.item()}


def mismatch_metrics(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    found = mismatch(p("prox_logp"), p("behav_logp"), p.mask_T)
    return {
        "k1_behav_from_prox": found.k1.item(),
        "k3": found.k3.item(),
        "log_ppl_train": found.log_ppl_proximal.item(),
        "log_ppl_behav": found.log_ppl_behaviour.item(),
        "abs_diff_mean": found.abs_difference.item(),
        "max_ratio": found.max_ratio.item(),
        "chi2": found.chi2.item(),
    }


def stopgrad_is_loss(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    logp_T, behaviour_T = p("logp", grad=True), p("behav_logp")
    advantages_T = p("advantages")
    if params["loss"] == "cispo":
        parts = {"clip_low": params["eps_low"], "clip_high": params["eps_high"]}
        weight_T = cispo_weight(logp_T, behaviour_T, **parts)
        surrogate = cispo(logp_T, behaviour_T, advantages_T, **parts)
    elif params["loss"] == "aipo":
        parts = {"rho": params["rho"]}
        weight_T = aipo_weight(logp_T, behaviour_T, **parts)
        surrogate = aipo(logp_T, behaviour_T, advantages_T, **parts)
    else:
        parts, weight_T, surrogate = {}, torch.ones_like(logp_T), reinforce(logp_T, advantages_T)
    out = p.run(preset(params["loss"], **parts), logp_T, behaviour_T)
    return {
        "loss": out.loss.item(),
        "grad": p.list(logp_T.grad),
        "weight": p.list(weight_T.where(p.mask_T, 0.0)),
        "per_token": p.list(surrogate.loss_T.where(p.mask_T, 0.0)),
        "grad_sum_reduction": p.list(surrogate.slope_T.where(p.mask_T, 0.0)),
    }


def topr_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    logp_T, rewards_N = p("logp", grad=True), tensor(inputs["rewards"])
    out = p.run(preset("topr"), logp_T, p("behav_logp"), advantages=rewards_N)
    alpha_N = topr_alpha(logp_T, p("behav_logp"), rewards_N, p.mask_T, p.sequence_T)
    return {"loss": out.loss.item(), "grad": p.list(logp_T.grad), "alpha": alpha_N.tolist()}


def gspo_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    logp_T = p("logp", grad=True)
    objective = preset("gspo", clip_low=params["eps_low"], clip_high=params["eps_high"])
    out = p.run(objective, logp_T, p("old_logp"))
    ratio_N = sequence_ratio(logp_T.detach(), p("old_logp"), p.mask_T, p.sequence_T, p.num)
    return {"loss": out.loss.item(), "grad": p.list(logp_T.grad), "ratio": ratio_N.tolist()}


def sapo_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    logp_T = p("logp", grad=True)
    objective = preset("sapo", tau_positive=params["tau_pos"], tau_negative=params["tau_neg"])
    out = p.run(objective, logp_T, p("old_logp"))
    return {"loss": out.loss.item(), "grad": p.list(logp_T.grad)}


def opsm_mask_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    found = opsm_mask(p("logp"), p("behav_logp"), tensor(inputs["advantages"]), p.mask_T, p.sequence_T, **params)
    return {"seq_kl": found.seq_kl_N.tolist(), "keep": found.keep_N.double().tolist()}


def dppo_mask_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    return {"drop": p.list(dppo_mask(p("logp"), p("behav_logp"), p("advantages"), p.mask_T, **params))}


def vtrace_op(inputs: Case, params: Case) -> Case:
    rewards, values, ratios = (tensor(inputs[name]) for name in ("rewards", "values", "ratios"))
    one_sequence = torch.ones(len(values), dtype=torch.bool), torch.zeros(len(values), dtype=torch.int64)
    assert inputs["bootstrap"] == 0.0, "an answer ends"
    found = vtrace(rewards, values, ratios, *one_sequence, **params)
    return {"vs": found.targets_T.tolist(), "pg_adv": (found.rho_T * found.advantages_T).tolist()}


def m2po_mask_op(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    found = m2po_mask(p("prox_logp"), p("behav_logp"), p.mask_T, **params)
    return {"keep": p.list(found.keep_T), "m2_after": found.second_moment.item()}


def _kimi(name: str, inputs: Case, params: Case) -> Case:
    """Each answer as a sequence of one token, whose log-prob is the answer's."""
    logp_N, rewards_N = tensor(inputs["seq_logp"], grad=True), tensor(inputs["rewards"])
    objective, one = preset(name, **params), torch.ones(len(rewards_N), dtype=torch.bool)
    group_N = torch.zeros(len(rewards_N), dtype=torch.int64)
    reference_N, index_N = tensor(inputs["seq_ref_logp"]), torch.arange(len(rewards_N))
    tokens = TokenBatch(
        logp_T=logp_N, behaviour_T=reference_N, proximal_T=reference_N, mask_T=one, sequence_T=index_N,
        advantages_N=objective.advantages(rewards_N, group_N),
    )  # fmt: skip
    loss = objective.loss(tokens, Normaliser.of(one, index_N, len(one))).loss
    log_z_N = group_tau_log_z(rewards_N, group_N, **params)
    return {"loss": loss.item(), "grad": gradient(loss, logp_N), "tau_log_z": log_z_N[0].item()}


def kimi_closed_form_op(inputs: Case, params: Case) -> Case:
    policy_V, partition = kimi_closed_form(tensor(inputs["pi_ref"]), tensor(inputs["rewards"]), **params)
    return {"pi_star": policy_V.tolist(), "Z": partition.item()}


def kl_estimators(inputs: Case, params: Case) -> Case:
    logp, reference = tensor(inputs["logp"], grad=True), tensor(inputs["ref_logp"])
    found: Case = {"k3_clamped10": kl_estimate(logp, reference, "k3", bound=10.0).tolist()}
    for kind in ("k1", "k2", "k3"):
        value = kl_estimate(logp, reference, kind)
        found |= {kind: value.tolist(), f"grad_{kind}": gradient(value.sum(), logp)}
    return found


def kl_categorical(inputs: Case, params: Case) -> Case:
    logits, reference = tensor(inputs["logits"], grad=True), tensor(inputs["ref_logits"])
    exact = exact_kl(logits, reference)
    found: Case = {"kl_exact": exact.item(), "grad_exact": gradient(exact, logits)}
    for kind in ("k1", "k2", "k3"):
        value = expected_estimate(logits, reference, kind)
        found |= {f"E_{kind}": value.item(), f"E_grad_{kind}": gradient(value, logits)}
    weighted = expected_estimate(logits, reference, "k3", ratio_weighted=True)
    elsewhere = {"sampler_V": torch.full_like(reference, 1 / len(reference))}
    return found | {
        "E_grad_ratio_k3": gradient(weighted, logits),
        "E_mu_k3_uncorrected": expected_estimate(logits, reference, "k3", **elsewhere).item(),
        "E_mu_k3_is_corrected": expected_estimate(logits, reference, "k3", ratio_weighted=True, **elsewhere).item(),
    }


def entropy_op(inputs: Case, params: Case) -> Case:
    logits = tensor(inputs["logits"], grad=True)
    value = entropy(logits)
    return {"entropy": value.tolist(), "grad": gradient(value.sum(), logits)}


def adaptive_kl_op(inputs: Case, params: Case) -> Case:
    return {"value_after": [adaptive_kl(inputs["value"], kl, inputs["n_steps"], **params) for kl in inputs["kl"]]}


def preference_loss_op(inputs: Case, params: Case) -> Case:
    chosen, rejected = tensor(inputs["policy_chosen"], grad=True), tensor(inputs["policy_rejected"], grad=True)
    names = ("ref_chosen", "ref_rejected", "len_chosen", "len_rejected")
    rest = (tensor(inputs[name]) if name in inputs else None for name in names)
    loss = preference_loss(chosen, rejected, *rest, **params).loss_B
    return {
        "loss": loss.tolist(),
        "mean": loss.mean().item(),
        "grad_chosen": gradient(loss.sum(), chosen),
        "grad_rejected": gradient(loss.sum(), rejected),
    }


def bt_loss(inputs: Case, params: Case) -> Case:
    chosen = tensor(inputs["chosen"], grad=True)
    loss, accuracy = pair_loss(chosen, tensor(inputs["rejected"]), tensor(inputs.get("margin", 0.0)))
    grad = gradient(loss.sum(), chosen)
    return {"loss": loss.tolist(), "mean": loss.mean().item(), "grad_chosen": grad, "accuracy": accuracy.item()}


def bt_kwise(inputs: Case, params: Case) -> Case:
    loss, num_pairs = kwise_loss(tensor(inputs["scores_ranked_best_first"]))
    return {"loss": loss.item(), "n_pairs": num_pairs}


def rm_normalise(inputs: Case, params: Case) -> Case:
    scores, bias = normalise_scores(tensor(inputs["scores"]), tensor(inputs["reference_scores"]))
    return {"normalised": scores.tolist(), "bias": bias.item()}


def ppo_ptx_op(inputs: Case, params: Case) -> Case:
    mask = tensor(inputs["pretrain_mask"]).bool()
    nll, total = ppo_ptx(tensor(inputs["ppo_loss"]), tensor(inputs["pretrain_logp"]), mask, **params)
    return {"ptx_nll": nll.item(), "total": total.item()}


def trpo(inputs: Case, params: Case) -> Case:
    found = trpo_step(tensor(inputs["logits"]), tensor(inputs["advantages"]), **params)
    return {
        "grad": found.gradient_V.tolist(),
        "fisher": found.fisher_VV.tolist(),
        "step": found.step_V.tolist(),
        "kl_old_new": found.kl_old_new.item(),
        "surrogate_gain": found.surrogate_gain.item(),
    }


def optimal_baseline(inputs: Case, params: Case) -> Case:
    found = bernoulli_baseline(inputs["p"], tensor(inputs["rewards"]))
    return {
        "b_star": found.optimal.item(),
        "b_mean": found.mean.item(),
        "var_none": found.variance_none.item(),
        "var_mean": found.variance_mean.item(),
        "var_star": found.variance_optimal.item(),
        "grad_any_b": found.gradient.item(),
    }


def std(inputs: Case, params: Case) -> Case:
    return {
        "std": tensor(inputs["x"]).std(correction=params["ddof"]).item(),
        "std_baselined": tensor(inputs["baselined"]).std(correction=params["ddof"]).item(),
    }


def ratio_grad(inputs: Case, params: Case) -> Case:
    w = tensor(inputs["w"], grad=True)
    logp = torch.nn.functional.logsigmoid(w)
    return {
        "grad_without_stopgrad": gradient(log_ratio(logp, logp).exp(), w),
        "grad_with_stopgrad": gradient(log_ratio(logp, logp.detach()).exp(), w),
    }


def lecture17_naive_loss(inputs: Case, params: Case) -> Case:
    log_probs, deltas = tensor(inputs["log_probs"]), tensor(inputs["deltas"]).flatten()
    rows = log_probs.flatten(0, 1)
    p = Packed({"log_probs": rows.tolist(), "mask": torch.ones_like(rows).tolist()})
    logp_T = p("log_probs", grad=True)
    return {"loss": p.run(preset("reinforce"), logp_T, p("log_probs"), advantages=deltas).loss.item()}


def a5_length_norm(inputs: Case, params: Case) -> Case:
    p = Packed(inputs)
    ratio_T, constant = p("ratio", grad=True), params["constant"]
    terms_T = ratio_T * p("advantages")
    where = (p.mask_T, p.sequence_T, p.num)
    normaliser = Normaliser.of(*where, constant)
    mean = aggregate(terms_T, *where, normaliser, "seq_mean_token_mean")
    norm = aggregate(terms_T, *where, normaliser, "seq_mean_token_sum_norm")
    return {
        "masked_mean": segment_mean(terms_T, *where).tolist(),
        "masked_normalize": masked_normalize(terms_T, *where, constant).tolist(),
        "grad_masked_mean": p.list(torch.tensor(gradient(mean, ratio_T))),
        "grad_masked_normalize": p.list(torch.tensor(gradient(norm, ratio_T))),
    }


def long2short_pairs_op(inputs: Case, params: Case) -> Case:
    chosen, rejected = long2short_pairs(inputs["lengths"], inputs["correct"], **params)
    return {"chosen": chosen, "rejected": rejected}


def reward_combine(inputs: Case, params: Case) -> Case:
    rows = list(zip(inputs["accuracy"], inputs["format"], inputs["language"], strict=True))
    return {"sum": [combine_rewards(*row) for row in rows], "gated": [combine_rewards(*r, how="gated") for r in rows]}


def overoptimisation(inputs: Case, params: Case) -> Case:
    return detect_overoptimisation(inputs["proxy"], inputs["gold"], **params)._asdict()


def distill_kl_op(inputs: Case, params: Case) -> Case:
    student, teacher = tensor(inputs["student_logits"], grad=True), tensor(inputs["teacher_logits"])
    found: Case = {}
    for direction in ("reverse", "forward"):
        value = distill_kl(student, teacher, direction=direction)
        found |= {f"{direction}_kl": value.tolist(), f"grad_{direction}": gradient(value.sum(), student)}
    return found


OPS: dict[str, Callable[[Case, Case], Case]] = {
    "group_advantage": group_advantage_op,
    "group_advantage_ragged": group_advantage_ragged,
    "lecture17_deltas": lecture17_deltas,
    "kl_shaped_rewards": kl_shaped_rewards_op,
    "gae": gae_op,
    "masked_whiten": masked_whiten_op,
    "value_loss": value_loss_op,
    "ppo_clip": ppo_clip_op,
    "decoupled_ppo": decoupled_ppo,
    "prox_loglinear": prox_loglinear,
    "version_lag": version_lag_op,
    "segment_mask": segment_mask_op,
    "staleness_capacity": lambda i, _: {
        "capacity": capacity(
            steps_ahead=i["eta"],
            version=i["version"],
            per_step=i["batch"],
            consumed=i["accepted"],
            running=i["running"],
            max_concurrent=i["max_concurrent"],
        )
    },
    "ess": ess_op,
    "mismatch_metrics": mismatch_metrics,
    "stopgrad_is_loss": stopgrad_is_loss,
    "topr": topr_op,
    "gspo": gspo_op,
    "sapo": sapo_op,
    "opsm_mask": opsm_mask_op,
    "dppo_mask": dppo_mask_op,
    "vtrace": vtrace_op,
    "m2po_mask": m2po_mask_op,
    "kimi_mirror_descent": lambda i, p: _kimi("kimi_k1_5", i, p),
    "kimi_squared": lambda i, p: _kimi("kimi_squared", i, p),
    "kimi_closed_form": kimi_closed_form_op,
    "kl_estimators": kl_estimators,
    "kl_categorical": kl_categorical,
    "entropy": entropy_op,
    "adaptive_kl": adaptive_kl_op,
    "preference_loss": preference_loss_op,
    "bt_loss": bt_loss,
    "bt_kwise": bt_kwise,
    "rm_normalise": rm_normalise,
    "ppo_ptx": ppo_ptx_op,
    "trpo": trpo,
    "optimal_baseline": optimal_baseline,
    "std": std,
    "ratio_grad": ratio_grad,
    "lecture17_naive_loss": lecture17_naive_loss,
    "a5_length_norm": a5_length_norm,
    "kimi_length_reward": lambda i, _: {"len_reward": kimi_length_reward(i["lengths"], i["correct"])},
    "length_weight_schedule": lambda i, p: {"weight": [length_weight(step, **p) for step in i["steps"]]},
    "length_total": lambda i, p: {"total": add_length_reward(i["reward"], i["lengths"], i["correct"], **p)},
    "dapo_overlong": lambda i, p: {"reward": [overlong_penalty(length, **p) for length in i["lengths"]]},
    "sort_rewards": lambda i, _: {
        "distance": [distance(i["prompt"], response) for response in i["responses"]],
        "inclusion_ordering": [inclusion_ordering(i["prompt"], response) for response in i["responses"]],
    },
    "language_consistency": lambda i, _: {
        "reward": list(map(language_consistency, i["total_words"], i["target_words"])),
    },
    "reward_combine": reward_combine,
    "prioritized_probs": lambda i, p: {"probs": prioritized_probabilities(i["success"], **p)},
    "pass_at_k": lambda i, _: {"pass_at_k": list(map(pass_at_k, i["n"], i["c"], i["k"]))},
    "difficulty": lambda i, _: {
        "pass_rate": list(map(pass_rate, i["correct"])),
        "difficulty": list(map(difficulty, i["correct"])),
    },
    "guess_filter": lambda i, p: {"keep": [survives_guessing(guesses, **p) for guesses in i["guess_correct"]]},
    "long2short_pairs": long2short_pairs_op,
    "shortest_rejection": lambda i, p: {"chosen": shortest_correct(i["lengths"], i["correct"], **p)},
    "dynamic_filter": lambda i, _: {"keep": list(map(keep_group, i["rewards"]))},
    "merge": lambda i, p: {"merged": merge_weights({"w": tensor(i["a"])}, {"w": tensor(i["b"])}, **p)["w"].tolist()},
    "repeat_stop": lambda i, p: {"stop_at": repeat_stop(i["tokens"], **p)},
    "budget_string": lambda i, p: {"report": BUDGET_STOP_REPORT, "hf_model_card": BUDGET_STOP},
    "ece": lambda i, p: {
        "ece": ece(i["confidence"], i["correct"], **p),
        "brier": brier(i["confidence"], i["correct"]),
    },
    "overoptimisation": overoptimisation,
    "ess_lr_scale": lambda i, p: {"scale": ess_lr_scale(tensor(i["ess_frac"]), **p).tolist()},
    "offpolicy_baseline": lambda i, _: {
        "b": offpolicy_baseline(tensor(i["weights"]), tensor(i["grad_norm2"]), tensor(i["rewards"])).item(),
        "b_unweighted": tensor(i["rewards"]).mean().item(),
    },
    "distill_kl": distill_kl_op,
    "gao_curve": lambda i, p: {"gold": [gold_curve(d, **p) for d in i["d"]], "d_peak": gold_peak(**p)},
    "think_flag": lambda i, _: {"thinking": thinking_enabled(i["user_messages"])},
    "format_reward": lambda i, _: {"format": format_reward(i["response"])},
}
