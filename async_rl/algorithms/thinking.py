"""Qwen 3's thinking switch and thinking budget (arXiv:2505.09388, Sec. 4.3).

Stage 3, which teaches the switch, is supervised fine-tuning and not RL; the stop at the budget is injected and not
trained: its tokens have mask False and version -1. The notes say otherwise on both. The report's string ends in
`</think>.`, the deployed one in `</think>`; use the latter.
"""

from __future__ import annotations

from collections.abc import Sequence

_BUDGET = "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
BUDGET_STOP_REPORT = f"{_BUDGET}\n</think>.\n\n"
BUDGET_STOP = f"\n\n{_BUDGET}\n</think>\n\n"
NO_THINK_PREFIX = "<think>\n\n</think>\n\n"
"""Answers without thinking keep an empty block."""


def thinking_enabled(messages: Sequence[str]) -> bool:
    """The last `/think` or `/no_think` (a word of its own) of the user and system turns wins; thinking is the
    default.
    """
    flags = [word for message in messages for word in message.split() if word in ("/think", "/no_think")]
    return not flags or flags[-1] == "/think"
