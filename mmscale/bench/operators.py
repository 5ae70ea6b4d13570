"""Profiles a piece of work: torch.profiler's operators, grouped by purpose.

Self times of the host on a CPU, of the device's kernels on CUDA. Operators are classified by name, so an elementwise
product of a gate counts with all elementwise work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity
from torch.profiler import profile as _torch_profile

from mmscale.runtime import device

# First match wins; words are parts of operator names.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("scaled_dot_product", "flash_attention")),
    ("matmul", ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "grouped_mm", "aten::linear", "aten::matmul")),
    ("choice", ("sort", "topk", "masked_fill", "bitwise", "one_hot", "nonzero", "aten::where")),
    ("gather and scatter", ("index", "gather", "scatter", "embedding")),
    ("norm", ("norm",)),
    ("silu", ("silu",)),
    ("copies", ("copy_", "cat", "clone", "contiguous", "zero_", "fill_", "repeat")),
)
_TOP = 15


def kind(operator: str) -> str:
    """The purpose of an operator."""
    name = operator.lower()
    return next((kind for kind, words in _KINDS if any(word in name for word in words)), "elementwise and rest")


def profile(work: Callable[[], None]) -> dict[str, Any]:
    """Run a piece of work once under the profiler.

    Returns:
        `total` [s], `kinds` and `operators` (the largest): name, self seconds, share, and calls for operators.
    """
    on_device = device.has_cuda()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with _torch_profile(activities=activities) as found:
        work()
        device.synchronize()
    events = [
        (event.key, (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6, event.count)
        for event in found.key_averages()
    ]
    total = sum(seconds for _, seconds, _ in events) or 1.0
    kinds: dict[str, float] = {}
    for name, seconds, _ in events:
        kinds[kind(name)] = kinds.get(kind(name), 0.0) + seconds
    return {
        "total": total,
        "kinds": {name: {"seconds": s, "share": s / total} for name, s in sorted(kinds.items(), key=lambda i: -i[1])},
        "operators": [
            {"name": name, "kind": kind(name), "seconds": seconds, "share": seconds / total, "calls": calls}
            for name, seconds, calls in sorted(events, key=lambda event: -event[1])[:_TOP]
        ],
    }


def render(profiles: dict[str, dict[str, Any]]) -> str:
    """Profiles of several variants side by side, then the largest operators of each."""
    order = sorted({k for found in profiles.values() for k in found["kinds"]}, key=lambda k: -_seconds(profiles, k))
    lines = [
        f"| forward + backward, self time, s | {' | '.join(profiles)} |",
        "|---|" + "---|" * len(profiles),
    ]
    for name in order:
        cells = [f"{p['kinds'].get(name, {'seconds': 0.0})['seconds']:.2f}" for p in profiles.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(format(p['total'], '.2f') for p in profiles.values())} |")
    for variant, found in profiles.items():
        lines += ["", f"| {variant}: operator | kind | self time, s | share | calls |", "|---|---|---|---|---|"]
        lines += [
            f"| {one['name']} | {one['kind']} | {one['seconds']:.3f} | {one['share']:.1%} | {one['calls']} |"
            for one in found["operators"]
        ]
    return "\n".join(lines)


def _seconds(profiles: dict[str, dict[str, Any]], name: str) -> float:
    return max(float(found["kinds"].get(name, {"seconds": 0.0})["seconds"]) for found in profiles.values())
