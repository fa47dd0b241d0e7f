"""Where the answer is in a reply."""

from __future__ import annotations

import pytest

from async_rl.rewards.answers import EXTRACTORS, extract


@pytest.mark.parametrize(
    ("how", "reply", "answer"),
    [
        ("text", "  1 2\n3 4\n", "1 2\n3 4"),
        ("text", " \n", None),
        ("last_number", "3 * 4 = 12", "12"),
        ("last_number", "It is **1,234,567.50**.", "1234567.50"),
        ("last_number", "x = -7", "-7"),
        ("last_number", "x = −7", "-7"),
        ("last_number", "10-20", "20"),
        ("last_number", "3, 4,5", "5"),
        ("last_number", "12,3456", "3456"),
        ("last_number", "0.25.", "0.25"),
        ("last_number", "about -.5", "-.5"),
        ("last_number", "none", None),
        ("last_line", "so\n\n  B  \n \n", "B"),
        ("last_line", "", None),
        ("tag", "<answer>1</answer> no: <answer>\n1 2\n3 4\n</answer>.", "1 2\n3 4"),
        ("tag", "write <answer> then <answer>7</answer>", "7"),
        ("tag", "<answer>7", None),
        ("tag", "7</answer>", None),
        ("tag", "<answer> </answer>", None),
        ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}", None),
        ("boxed", "1", None),
        ("code_block", "```\n1\n```\nor\n```text\n1 2\n3 4\n```", "1 2\n3 4"),
        ("code_block", "```\n1", None),
        ("final", r"<think>\boxed{7}</think> \boxed{4}, not 5", "4"),
        ("final", r"<think>\boxed{7}</think> 4", "4"),
        ("final", r"<answer>so \(x+1\)</answer> 9", "x+1"),
        ("final", "<answer>\\frac{1}{2}</answer>", "\\frac{1}{2}"),
        ("final", r"For $x = 2$ it is \[ x^2 + 1 \].", "x^2 + 1"),
        ("final", "At $5 each, 3 of them cost $15.", "15"),
        ("final", "It is $\\pi$", "\\pi"),
        ("final", "Half of 7 is 7/2.", "7/2"),
        ("final", "On 3/4/2020 it was -1,000/3", "-1000/3"),
        ("final", "I do not know.", None),
        ("final", r"\boxed{}", None),
        ("program", "```python\n1\n```\nprints\n```\n2\n```", "1"),
        ("program", "```\n1\n```\nor\n```\n2\n```", "2"),
        ("program", "```py\n1\n```\n</think>\n```Python3\n2\n```\n```text\n3\n```", "2"),
        ("program", "```python\n1\n```</think> I cannot.", None),
        ("program", "```python\n1", None),
    ],
)
def test_answers_are_extracted(how: str, reply: str, answer: str | None) -> None:
    assert extract(how, reply) == answer


def test_every_extractor_has_a_case() -> None:
    assert {how for how, *_ in test_answers_are_extracted.pytestmark[0].args[1]} == set(EXTRACTORS)
