"""Titles and units of the values of metrics.jsonl that have no special chart in a report."""

from __future__ import annotations

from mmscale.runs.display_names import in_words

# By the name, or the part of the name before its first slash (docs/reference/metrics.md).
_WORDS = {
    "memory_stall_s": ("Pauses: snapshots in memory", "s"),
    "parameter_hash_s": ("Pauses: comparing replicas", "s"),
    "calibration_s": ("Pauses: calibration of thresholds", "s"),
    "profile_s": ("Pauses: writing a profile", "s"),
    "save_failures": ("Failed saves so far", ""),
    "saves_skipped": ("Skipped saves so far", ""),
    "anomalies": ("Findings of the anomaly policy so far", ""),
}


def title_of(key: str) -> tuple[str, str]:
    """Title and unit of a value without a special chart; the words of the key if it is unknown."""
    name, _, kind = key.partition("/")
    seconds = name.endswith("_s")
    title, unit = _WORDS.get(name, (in_words(name.removesuffix("_s")).capitalize(), "s" if seconds else ""))
    return (f"{title}: {in_words(kind)}" if kind else title), unit
