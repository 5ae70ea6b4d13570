"""What is mirrored of a stage, and how: converts its settings for the process that uploads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmscale import bounded
from mmscale.checkpoint.layout import FOLDER, Store
from mmscale.checkpoint.mirror.remote import Pace, Remote
from mmscale.checkpoint.mirror.uploads import Uploader
from mmscale.checkpoint.save_settings import Retention

if TYPE_CHECKING:  # not imported in the uploading process
    from mmscale.config import Config


@dataclass(frozen=True)
class MirrorSettings:
    """What is mirrored, and how.

    Attributes:
        url: the mirror's folder for this stage.
        root: the folder with the checkpoints.
        retention: what is kept in the mirror.
        bandwidth: bytes per second; 0: unbounded.
        streams: files sent at the same time.
    """

    url: str
    root: Path
    retention: Retention
    bandwidth: float = 0.0
    streams: int = 4

    @classmethod
    def of_stage(cls, settings: Config, *, run: Path, folder: Path) -> MirrorSettings | None:
        """What is mirrored of a stage; None: nothing. Each stage has a separate folder in the mirror, as in the run.

        Args:
            settings: the stage's.
            run: the run's folder.
            folder: the stage's folder: the same, or one in it.
        """
        checkpoint = settings.checkpoint
        if checkpoint.mirror is None:
            return None
        return cls(
            "/".join((checkpoint.mirror.rstrip("/"), settings.run.name, *folder.relative_to(run).parts)),
            folder / FOLDER,
            Retention(checkpoint.mirror_keep, checkpoint.keep_every, checkpoint.early),
            checkpoint.mirror_bandwidth,
            checkpoint.mirror_streams,
        )

    def line(self) -> str:
        """One line of JSON for the uploading process."""
        return json.dumps(asdict(self) | {"root": str(self.root.absolute())})

    @classmethod
    def parse(cls, line: str) -> MirrorSettings:
        """The inverse of `line`."""
        fields = bounded.parse_json(line)
        return cls(**fields | {"root": Path(fields["root"]), "retention": Retention(**fields["retention"])})

    def uploader(self) -> Uploader:
        """An uploader with these settings. Some stores connect here.

        Raises:
            Exception: of the store.
        """
        remote = Remote(self.url, pace=Pace(self.bandwidth))
        return Uploader(Store(self.root), remote, self.retention, streams=self.streams)
