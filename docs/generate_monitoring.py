"""Writes the table of metrics in docs/monitoring.md: python docs/generate_monitoring.py"""

from __future__ import annotations

from pathlib import Path

from async_rl.telemetry.metric_table import SECTIONS

PAGE = Path(__file__).parent / "monitoring.md"
BEGIN, END = "<!-- metrics: generated -->\n", "<!-- end of metrics -->\n"


def table() -> str:
    lines: list[str] = []
    for section in SECTIONS:
        lines += [f"\n### {section.title}\n", "| metric | type | labels | |", "|---|---|---|---|"]
        for metric in section.metrics:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n\n"


def page(text: str) -> str:
    """The page with the table that belongs there."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
