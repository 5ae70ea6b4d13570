"""Copies the modules of modalities besides images next to the weights, so that an export needs no mmscale for them."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable
from pathlib import Path

from mmscale.data.modalities.table import MODALITIES

FILE = "codecs_moma.py"


def write_codecs(folder: Path, names: Iterable[str]) -> None:
    """Write `codecs_moma.py` and the modules of its classes.

    Modalities whose module needs this package are omitted; the export's processor then knows only their ids.

    Args:
        folder: the export.
        names: modalities with a tokenizer.
    """
    lines, entries = [], []
    for name in names:
        modality = MODALITIES[name]
        if not modality.shipped:
            continue
        module = f"modality_{name}_moma"
        source = inspect.getsourcefile(modality)
        assert source is not None
        shutil.copyfile(source, folder / f"{module}.py")
        lines.append(f"from .{module} import {modality.__name__}")
        entries.append(f'    "{name}": {modality.__name__},')
    if not lines:
        return  # the copied file already has an empty table
    table = ["CODECS: dict[str, Any] = {", *entries, "}"]
    head = '"""Modalities besides text and images that this folder\'s model has: name -> class."""'
    content = [head, "", "from typing import Any", "", *lines, "", *table, "", '__all__ = ["CODECS"]', ""]
    (folder / FILE).write_text("\n".join(content))
