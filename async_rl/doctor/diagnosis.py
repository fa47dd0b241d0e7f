"""Pure: why the engine's log-probs are not the learner's, from what was observed (doctor.numerics observes).

Each cause has a hypothesis under which the two agree again, or a pattern no other cause leaves:

    temperature     they agree at another temperature, or the tokens were drawn at another than the log-probs say
    truncation      the difference is the mass of the likeliest tokens, renormalised; or the tail is never drawn from
    stale_weights   they agree when the learner takes the weights that the engine had before
    stale_cache     an engine that never had other weights agrees: KV of older weights was used
    dtype           they agree when engine or learner computes in float32
    kv_cache        the first token after a prompt agrees, those computed from the cache do not
    prefill         the other way round
    tokenizer       prompts change when they are decoded and encoded again
    weights         none of these: the engine runs other weights than the learner gave it, or another architecture
"""

from __future__ import annotations

from typing import Literal

import msgspec

from async_rl.telemetry.agreement import limits

Cause = Literal[
    "none",
    "temperature",
    "truncation",
    "stale_weights",
    "stale_cache",
    "dtype",
    "kv_cache",
    "prefill",
    "tokenizer",
    "weights",
]
DRAWS_ALARM = 2.2
"""Kolmogorov-Smirnov distance times the root of the number of tokens; by chance above it once in 8000."""
CUT_ALARM = 1e-4
"""Probability that the tail is empty by chance."""
PART_SLACK = 2.0
"""A part of the tokens may differ by so many times what all of them may: there are fewer, and none like the others."""
CUT_SHARE = 0.99
"""Share of tokens that a truncation must explain."""


class Gap(msgspec.Struct, frozen=True):
    """How far the learner's log-probs are from the engine's, over some of the sampled tokens."""

    tokens: int
    mean: float
    """Of the absolute difference, nats."""
    max: float
    k3: float
    """Mean of w - 1 - log w, w = p_learner / p_engine: an estimate of the KL divergence, never negative."""
    outside: float
    """Share of tokens with w outside [0.8, 1.25]."""


class Draws(msgspec.Struct, frozen=True):
    """Whether the tokens are draws from the distribution the learner computes, at some temperature."""

    temperature: float
    distance: float
    """Kolmogorov-Smirnov distance of the tokens' places in their distributions from a uniform draw, times sqrt(n)."""
    empty_tail: float
    """Probability that none of the tokens is less likely than the least likely one is, among its alternatives."""


class Observations(msgspec.Struct, frozen=True, kw_only=True):
    """None: not tried, because log-probs agree."""

    engine_dtype: str
    learner_dtype: str
    temperature: float
    """The recipe's."""
    gap: Gap
    """Every sampled token, as a train step at these weights would see it."""
    first: Gap
    """Tokens sampled right after a prompt."""
    later: Gap
    """Tokens sampled from the KV cache of sampled tokens."""
    draws: Draws
    """At the recipe's temperature."""
    prompts_survive: bool
    """Decoding prompts and encoding them again gives the same tokens."""
    best_temperature: float | None = None
    """At which log-probs differ least."""
    at_best_temperature: Gap | None = None
    best_draws: Draws | None = None
    """At the temperature under which the tokens look most like draws."""
    older_weights: Gap | None = None
    """The learner takes the weights the engine had before."""
    renormalised: float | None = None
    """Share of tokens whose log-probs differ as they do when the engine renormalises over the likeliest tokens."""
    fresh_engine: Gap | None = None
    """Tokens of an engine that never had other weights."""
    float32_engine: Gap | None = None
    """Tokens of an engine that computes in float32, and never had other weights."""
    float32_learner: Gap | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    cause: Cause
    explanation: str


def agrees(gap: Gap | None, *dtypes: str, slack: float = 1.0) -> bool:
    """No further apart than engine and learner of these dtypes may be; False where it was not tried."""
    if gap is None or gap.tokens == 0:
        return False
    return limits(*dtypes).hold(gap.mean, gap.k3, slack)


def drawn(draws: Draws | None) -> bool:
    """The tokens may be draws from this distribution; False where it was not tried."""
    return draws is not None and draws.distance <= DRAWS_ALARM and draws.empty_tail >= CUT_ALARM


def diagnose(o: Observations) -> Diagnosis:
    """The cause that explains the observations, `none` where nothing is wrong."""
    dtypes = (o.engine_dtype, o.learner_dtype)
    if agrees(o.gap, *dtypes):
        return Diagnosis("none", "engine and learner agree") if drawn(o.draws) else _wrong_draws(o)
    best = o.best_temperature
    if agrees(o.at_best_temperature, *dtypes):
        return Diagnosis(
            "temperature",
            f"the engine's log-probs are those of temperature {best:.2f}, the learner computes them at "
            f"{o.temperature:g} (rollout.temperature)",
        )
    if agrees(o.older_weights, *dtypes):
        return Diagnosis(
            "stale_weights", "the engine samples with the weights it had before: loading new ones had no effect"
        )
    if o.renormalised is not None and o.renormalised >= CUT_SHARE:
        return Diagnosis(
            "truncation",
            "the engine renormalises over the likeliest tokens (top-p, top-k, min-p), which the learner does not",
        )
    fresh = agrees(o.fresh_engine, *dtypes)
    if agrees(o.float32_engine, "float32", o.learner_dtype) and not fresh:
        return Diagnosis("dtype", "an engine in float32 agrees: it is the engine's precision")
    if agrees(o.float32_learner, o.engine_dtype, "float32"):
        return Diagnosis("dtype", "a learner in float32 agrees: it is the learner's precision")
    if fresh:
        return Diagnosis(
            "stale_cache", "an engine that never had other weights agrees: keys and values of older weights are used"
        )
    first, later = (agrees(part, *dtypes, slack=PART_SLACK) for part in (o.first, o.later))
    if first and not later:
        return Diagnosis("kv_cache", "the first token after a prompt agrees, later ones do not: the KV cache is wrong")
    if later and not first:
        return Diagnosis("prefill", "only the first token after a prompt differs: it is the end of the prefill")
    if not o.prompts_survive:
        return Diagnosis(
            "tokenizer",
            "prompts change when they are decoded and encoded again: engine and learner may not see the same tokens",
        )
    return Diagnosis(
        "weights",
        "no temperature, precision or cache explains it: the engine computes with other weights than the learner's "
        "(names, a tied head, rotary settings)",
    )


def _wrong_draws(o: Observations) -> Diagnosis:
    """Log-probs agree, but the tokens are not drawn from the distribution they belong to."""
    if o.best_draws is not None and drawn(o.best_draws):
        return Diagnosis(
            "temperature",
            f"tokens are drawn at a temperature of about {o.best_draws.temperature:.2f}, the log-probs that come with "
            f"them are of {o.temperature:g}",
        )
    return Diagnosis(
        "truncation",
        "unlikely tokens are drawn too rarely: top-p, top-k, min-p or another truncation that the log-probs leave out",
    )
