"""Records hangs of an attempt.

Writes the event about a hang, from the reports that ranks wrote when no step ended (mmscale/resilience/watchdog.py).
"""

from __future__ import annotations

from pathlib import Path

from launch.record import Record
from mmscale.resilience import watchdog
from mmscale.runs.events import EventLog


def record_hang(record: Record, attempt: int, lease_id: str, events: EventLog) -> None:
    """Add the event `hang`, if ranks of this attempt wrote reports: unlike their logs these are in its own folder."""
    logs = Path(record.run) / "logs" / f"attempt_{attempt}"
    hung = watchdog.reports(logs)
    if not hung:
        return
    events.add(
        "hang",
        attempt_id=lease_id,
        ranks=watchdog.culprits(hung, world_size=record.world_size),
        step=max(report.step for report in hung),
        waited_s=max(report.waited_s for report in hung),
        reports=str(logs / watchdog.FOLDER),
    )
