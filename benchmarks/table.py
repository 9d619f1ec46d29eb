"""Figures as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence


def cell(value: object) -> str:
    """Three significant figures for fractions, everything else as it is."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with its columns aligned, so that it can be read in a terminal too."""
    cells = [list(heads), *[[cell(value) for value in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
