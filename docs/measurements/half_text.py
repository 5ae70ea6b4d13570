# python docs/measurements/half_text.py half_text
# mmscale data prepare configs/quickstart.yaml --out data/half_text data.prepare.source=documents \
#     'data.prepare.documents=[half_text/documents.jsonl]' data.prepare.augment=0 data.prepare.held_out=0.1
"""Documents of which half have no image: digits, each described and drawn, and Python's help texts."""

import json
import re
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

from mmscale.data.built_in.digits import digit_slices
from mmscale.data.documents.schema import Image
from mmscale.data.modalities.image_files import save_png

CHARACTERS = 120  # of a text at most


def main(out: Path) -> None:
    """Write `documents.jsonl` and the pictures."""
    out.mkdir(parents=True)
    (slices,) = digit_slices(augment=0, slice_records=10**6)
    digits = list(slices.read())
    paragraphs = (re.sub(r"\s+", " ", part) for text in topics.values() for part in text.split("\n\n"))
    lines = [line for part in paragraphs for line in textwrap.wrap(part, CHARACTERS)]
    with (out / "documents.jsonl").open("w") as file:
        for number, (document, line) in enumerate(zip(digits, lines, strict=False)):
            content = []
            for item in document.content:
                if isinstance(item, Image):
                    save_png(item.source[..., None], out / f"{number}.png")
                    content.append({"type": "image", "path": f"{number}.png"})
                else:
                    content.append({"type": "text", "text": item.text})
            digit = document.id[: document.id.rindex("-")]  # both documents of a picture are of one split
            print(json.dumps({"id": digit, "content": content}), file=file)
            print(json.dumps({"id": f"help{number}", "content": [{"type": "text", "text": line}]}), file=file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
