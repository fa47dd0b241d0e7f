"""Every algorithm as small pure functions on torch tensors: no I/O, no processes, no clock.

A method is assembled from parts (advantage x guard x surrogate x KL x aggregation) by `presets.preset`:

    objective = preset("async_default", clip_high=0.28)
    advantages_N = objective.advantages(rewards_N, group_N)
    out = objective.loss(tokens, normaliser)  # tokens: TokenBatch, normaliser: Normaliser, both in batch.py
    out.loss.backward()

Axis suffixes:
    T  tokens, packed over all sequences of the micro-batch, without padding, in the order of each sequence
    N  sequences (rollouts); `sequence_T` maps each token to one of them
    G  members of a group: rollouts of one prompt
    V  vocabulary, K  ranked answers of one prompt, B  a batch of anything else

Names: `logp` current policy (with gradient), `proximal` the policy at the start of the training step, `behaviour` the
one that sampled, `reference` a frozen one. All logarithms are natural; gradients never flow through anything but
`logp`, `entropy`, `values` and scores. Losses are minimised.

Modules that work on plain numbers or text import no torch (`curation`, `sampling`, `length_reward`, ...),
so that the controller may use them.
"""
