"""The tables of a model card, as a reader of the page sees them."""

from __future__ import annotations


def card_rows(text: str) -> list[list[str]]:
    """The cells of every row of every table of a model card, stripped; headers and rules too."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
