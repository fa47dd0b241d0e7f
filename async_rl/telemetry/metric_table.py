"""Every metric of /metrics: its name, what it means, where its value comes from. docs/monitoring.md is made of it.

Names of generators are labels; ids of groups and rollouts never are. Counters of the ledger go on where they were after
a restart of the controller, the others begin again at 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from async_rl.telemetry.metrics import (
    Section,
    connections,
    counter,
    counters,
    each,
    each_two,
    ended,
    environment_metrics,
    evaluation_metrics,
    gauge,
    gauges,
    histogram,
    histograms,
    length_ratios,
    mask_budget,
    mismatch,
    of_engines,
    of_generators,
    of_row,
    of_rows,
    one_of,
    other_numbers,
    run_info,
    unaccounted,
)
from async_rl.telemetry.reading import STAGES

LEARNER_STATES = ("absent", "trains", "waits")

SECTIONS: Sequence[Section] = (
    Section(
        "The run",
        (
            gauges(
                "run_info",
                "run environment algorithm placement on_stale",
                "Always 1; says which run this is.",
                run_info,
            ),
            gauge("version", "Batches the learner has completed: the version of its weights.", lambda r: r.version),
            gauge("target_steps", "Steps the recipe asks for.", lambda r: r.run.steps),
            counter(
                "steps_total",
                "Steps trained, each counted once over all lineages.",
                lambda r: r.ledger.best_known_version,
            ),
            gauge("checkpoint_version", "Version of the newest durable checkpoint.", lambda r: r.ledger.checkpoint),
            gauge("last_step_timestamp_seconds", "Unix time at which the last step was done.", of_row("timestamp")),
            gauge("paused", "1 while no group is admitted because someone asked for that.", lambda r: float(r.paused)),
            gauges("stage", "stage", "1 for the stage the run is in.", one_of(STAGES, lambda r: r.stage)),
            gauges(
                "learner_state",
                "state",
                "1 for what the learner does: absent, trains, waits for a batch.",
                one_of(LEARNER_STATES, lambda r: r.learner),
            ),
            counter(
                "controller_starts_total", "Starts of the controller in this run directory.", lambda r: r.ledger.epoch
            ),
            counter("learner_starts_total", "Starts of the learner in this run directory.", lambda r: r.ledger.lineage),
            gauges("alarm", "alarm", "1 while an alarm is on that the user was told of.", each(lambda r: r.alarms)),
        ),
    ),
    Section(
        "Rollouts: the ledger",
        (
            counter("rollouts_admitted_total", "Training rollouts admitted.", lambda r: r.ledger.admitted),
            counters(
                "rollouts_ended_total",
                "event reason",
                "Rollouts by terminal event and kind of reason; without a reason, it is empty.",
                ended,
            ),
            gauges("rollouts", "state", "Rollouts alive, by state.", each(lambda r: r.alive)),
            gauge("rollouts_unaccounted", "Admitted less ended less alive: 0, or the ledger is wrong.", unaccounted),
            counter("results_repeated_total", "Results that arrived again and were removed.", lambda r: r.repeats),
            gauge(
                "slots_available",
                "Slots that the next step can use; it takes async_rl_step_slots.",
                lambda r: r.available,
            ),
            gauge("step_slots", "Slots of a step: groups_per_step * group_size.", lambda r: r.run.step_rollouts),
            gauge(
                "admission_free_rollouts",
                "Rollouts the staleness bound still lets in; 0 or less: admission is closed.",
                lambda r: r.free,
            ),
            gauge(
                "concurrency_limit_rollouts",
                "Rollouts that may run at the same time, where the mask budget limits them.",
                lambda r: None if r.room == float("inf") else r.room,
            ),
            gauge("leases_queued", "Leases that wait for a generator with credit.", lambda r: r.queued),
            gauge(
                "filtered_groups_in_a_row", "Groups that a filter took out since the last step.", lambda r: r.filtered
            ),
            gauge("failed_episodes_in_a_row", "Training episodes that failed since one did not.", lambda r: r.failed),
        ),
    ),
    Section(
        "Tokens and staleness",
        (
            counter(
                "tokens_trained_total",
                "Sampled tokens in trained steps, within the staleness bound.",
                lambda r: r.ledger.weighted_tokens,
            ),
            counter(
                "tokens_masked_total",
                "Sampled tokens in trained steps, over the staleness bound: without weight.",
                lambda r: r.ledger.stale_tokens,
            ),
            counter(
                "tokens_regenerated_total",
                "Tokens that had to be sampled again after a death.",
                lambda r: r.ledger.regenerated,
            ),
            counter(
                "tokens_sampled_total",
                "Tokens sampled by all generators since the controller started.",
                lambda r: r.usage.tokens.get("generator"),
            ),
            gauges(
                "token_rate",
                "role",
                "Tokens sampled (generator) or trained on (learner) per second of late.",
                each(lambda r: r.usage.rates),
            ),
            gauge(
                "tokens_per_cpu_second",
                "Tokens trained on per CPU second of all processes.",
                of_row("tokens_per_cpu_s"),
            ),
            histogram(
                "token_lag_versions", "Lag of the tokens trained on, masked ones included.", lambda r: r.totals.lag
            ),
            gauges(
                "step_lag_versions",
                "of",
                "Lag in the last step: of tokens with weight (mean, p95, max), "
                "of the oldest token of each rollout (head_mean, head_max).",
                of_rows(
                    mean="lag_mean", p95="lag_p95", max="lag_max", head_mean="head_lag_mean", head_max="head_lag_max"
                ),
            ),
            gauge("max_staleness_versions", "The bound eta.", lambda r: r.run.staleness.max_staleness),
            gauge("masked_ratio", "Share of the last step's tokens over the bound.", of_row("masked_fraction")),
            gauge(
                "mask_budget_ratio",
                "Share that may be masked (staleness.mask_budget), where on_stale is mask.",
                mask_budget,
            ),
            gauge(
                "early_ratio",
                "Share of the last step's rollouts whose group was not complete.",
                of_row("early_fraction"),
            ),
            gauges(
                "length_ratio",
                "of",
                "Mean length trained / submitted in the newest complete cohort; weighted: masked tokens left out.",
                length_ratios,
            ),
        ),
    ),
    Section(
        "Learning: the last step",
        (
            gauge("reward", "Mean reward.", of_row("reward")),
            gauge("reward_stddev", "Standard deviation of the reward.", of_row("reward_std")),
            gauges("environment_metric", "name", "Mean of a number that the environment logs.", environment_metrics),
            gauge(
                "evaluation_reward",
                "Mean reward on the held-out tasks, last evaluation.",
                lambda r: r.evaluation and r.evaluation.reward,
            ),
            gauges(
                "evaluation_metric",
                "name",
                "Mean of a number that the environment logs, last evaluation.",
                evaluation_metrics,
            ),
            gauge(
                "evaluation_version", "Version of the last evaluation.", lambda r: r.evaluation and r.evaluation.version
            ),
            counter("evaluations_total", "Evaluations since the controller started.", lambda r: r.totals.evaluations),
            gauges(
                "ess_ratio",
                "of",
                "Effective sample size as a share of the tokens; raw: before the guard.",
                of_rows(guarded="ess_frac", raw="ess_frac_raw"),
            ),
            gauges(
                "dropped_ratio",
                "by",
                "Share of the tokens without a gradient: stale, or outside the guard.",
                of_rows(stale="stale_fraction", guard="guarded_fraction"),
            ),
            gauges(
                "clip_ratio",
                "side",
                "Share of the tokens that the surrogate clips.",
                of_rows(low="clip_fraction_low", high="clip_fraction_high", dual="clip_fraction_dual"),
            ),
            gauges(
                "mismatch_nats",
                "lag",
                "Mean absolute difference of the log-probs of engine and learner, by lag.",
                mismatch("abs"),
            ),
            gauges(
                "mismatch_k3_nats",
                "lag",
                "KL divergence (k3) of learner and engine, by lag.",
                mismatch("k3"),
            ),
            gauges("mismatch_tokens", "lag", "Tokens compared, by lag.", mismatch("tokens")),
            gauges(
                "equal_version_mismatch_nats",
                "of",
                "The same under the same weights; limit: what the alarm lets the mean be.",
                of_rows(
                    mean="equal_version_gap",
                    max="equal_version_gap_max",
                    k3="equal_version_k3",
                    limit="equal_version_limit",
                ),
            ),
            gauges(
                "length_tokens",
                "of",
                "Length: of completions (mean), of sequences with prompts (mean, max).",
                of_rows(
                    completion_mean="completion_length_mean",
                    sequence_mean="sequence_length_mean",
                    sequence_max="sequence_length_max",
                ),
            ),
            gauge("entropy_nats", "Mean entropy of the policy.", of_row("entropy")),
            gauge("reference_kl_nats", "KL (k3) to the reference policy.", of_row("kl_k3")),
            gauge("gradient_norm", "Before clipping.", of_row("grad_norm")),
            gauge("loss", "The loss.", of_row("loss")),
            gauge("learning_rate", "The learning rate.", of_row("learning_rate")),
            gauge(
                "weights_changed_ratio",
                "Share of the weights that a step changed, where it is known.",
                of_row("weights_changed"),
            ),
            counters(
                "steps_skipped_total",
                "reason",
                "Steps that left the weights as they were, since the controller started.",
                each(lambda r: r.totals.skipped),
            ),
            gauges("step_metric", "name", "Every other number of the step's row in metrics.jsonl.", other_numbers),
        ),
    ),
    Section(
        "Time",
        (
            histogram(
                "step_duration_seconds", "From the end of one step to the end of the next.", lambda r: r.totals.step_s
            ),
            gauge(
                "train_step_seconds", "What the learner needed for the last step, from its batch on.", of_row("train_s")
            ),
            counters(
                "role_seconds_total",
                "role cause",
                "Time of all processes of a role by cause; engine_step and train_step are work, the rest is waiting.",
                each_two(lambda r: r.usage.spent),
            ),
            gauges(
                "role_time_ratio",
                "role cause",
                "The same as shares since the first batch; those of a role sum to 1.",
                each_two(lambda r: r.usage.shares),
            ),
            counters(
                "role_cpu_seconds_total", "role", "CPU time of all processes of a role.", each(lambda r: r.usage.cpu_s)
            ),
            histogram(
                "checkpoint_duration_seconds",
                "From the copy in memory to the rename on disk.",
                lambda r: r.totals.checkpoint_s,
            ),
        ),
    ),
    Section(
        "Weights",
        (
            histograms(
                "weight_update_seconds",
                "transport",
                "From the announcement until they are live at a generator.",
                each(lambda r: r.totals.swap_s),
            ),
            histograms(
                "weight_stall_seconds",
                "transport",
                "No decode step could run at a generator because of the swap.",
                each(lambda r: r.totals.stall_s),
            ),
            counters(
                "weight_bytes_total",
                "transport",
                "Weights that became live at a generator, each generator's counted.",
                each(lambda r: r.totals.nbytes),
            ),
            counters(
                "weight_failures_total",
                "transport",
                "Weights that did not reach a generator.",
                each(lambda r: r.totals.swap_failures),
            ),
        ),
    ),
    Section(
        "Generators",
        (
            gauges("generators", "state", "Generators connected, by state.", connections),
            gauge("generators_expected", "Generators that the recipe starts.", lambda r: r.run.generator.count),
            counter(
                "generators_lost_total", "Generators whose heartbeats stopped.", lambda r: r.totals.generators_lost
            ),
            gauges(
                "generator_version",
                "generator",
                "Version of the weights it samples with.",
                of_generators(lambda one: one.version),
            ),
            gauges("generator_rollouts", "generator", "Rollouts it works on.", of_generators(lambda one: one.held)),
            counters(
                "generator_tokens_total",
                "generator",
                "Tokens sampled since its process started.",
                of_generators(lambda one: one.tokens),
            ),
            gauges(
                "engine_running", "generator", "Sequences that its engine decodes: slots in use.", of_engines("running")
            ),
            gauges("engine_waiting", "generator", "Requests that wait for a slot.", of_engines("waiting")),
            gauges(
                "engine_kv_used_ratio",
                "generator",
                "Share of its KV cache in use.",
                of_engines("server_cache_used", "cache_used"),
            ),
            gauges("engine_restarts", "generator", "SGLang servers that were restarted.", of_engines("restarts")),
        ),
    ),
)
"""In the order of docs/monitoring.md."""
