"""Asynchronous reinforcement learning of language models. Importing this imports no torch."""

from async_rl.environments.api import Policy, Reply, Reward, environment
from async_rl.tasks.source import Rows, TaskSource
from async_rl.wire.messages import Task

__all__ = ["Policy", "Reply", "Reward", "Rows", "Task", "TaskSource", "environment"]
__version__ = "0.1.0"
