"""Memory that is left, by the machine and by control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmscale.runtime import host_memory

MIB = 1 << 20


def machine(at: Path, monkeypatch: pytest.MonkeyPatch, *, groups: str, files: dict[str, str]) -> None:
    proc, cgroups = at / "proc", at / "cgroup"
    for file, text in {
        proc / "meminfo": f"MemTotal: {9000 * 1024} kB\nMemAvailable: {8000 * 1024} kB\n",
        proc / "self" / "cgroup": groups,
        **{cgroups / name: text for name, text in files.items()},
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(host_memory, "_PROC", proc)
    monkeypatch.setattr(host_memory, "_CGROUPS", cgroups)


V2 = {
    "job/step/memory.max": "max\n",
    "job/step/memory.current": f"{100 * MIB}\n",
    "job/memory.current": f"{900 * MIB}\n",
}
V1 = {
    "memory/a/memory.limit_in_bytes": f"{500 * MIB}\n",
    "memory/a/memory.usage_in_bytes": f"{450 * MIB}\n",
    "memory/a/memory.stat": f"cache 1\ntotal_inactive_file {20 * MIB}\n",
}


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/\n", {}, 8000),
        ("0::/job/step\n", V2, 8000),
        ("0::/job/step\n", {**V2, "job/memory.max": f"{1000 * MIB}\n"}, 100),
        (
            "0::/job/step\n",
            {**V2, "job/memory.max": f"{1000 * MIB}\n", "job/memory.stat": f"inactive_file {50 * MIB}\n"},
            150,
        ),
        ("0::/job\n", {**V2, "job/memory.max": f"{10 * MIB}\n"}, 0),
        ("4:cpu,memory:/a/b\n1:pids:/a\n0::/\n", V1, 70),
        ("4:cpuset:/a\n", V1, 8000),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, groups: str, files: dict[str, str], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, groups=groups, files=files)
    assert host_memory.available() == left * MIB


def test_what_cannot_be_read_does_not_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_PROC", tmp_path)
    monkeypatch.setattr(host_memory, "_CGROUPS", tmp_path)
    assert host_memory.available() == 1 << 62


def test_this_machine() -> None:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert 0 < host_memory.available() <= total * 1024
