"""Rewards that environments use in one line. Nothing here imports torch.

    from async_rl import rewards

    correct = await rewards.math(reply.text, task["answer"])
    return rewards.combine({"accuracy": correct, "format": rewards.format(reply.text)}, how="gated")

What computes for long, may hang or runs code of the model does so in processes of its own, which are killed at their
deadline. A grader that fails raises GradingFailed: the rollout fails, and is not trained on as if it were wrong.
"""

from async_rl.algorithms.length_reward import add_length_reward as length
from async_rl.errors import GradingFailed
from async_rl.rewards.combine import combine
from async_rl.rewards.grade import Grade
from async_rl.rewards.judge import Judge
from async_rl.rewards.mathematics import math, require_math
from async_rl.rewards.pool import configure
from async_rl.rewards.programs import code, require_code
from async_rl.rewards.text import format, language, overlong, repetition

__all__ = [
    "Grade",
    "GradingFailed",
    "Judge",
    "code",
    "combine",
    "configure",
    "format",
    "language",
    "length",
    "math",
    "overlong",
    "repetition",
    "require_code",
    "require_math",
]
