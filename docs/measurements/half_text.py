# python examples/digits/write_documents.py --out half_text/digits --copies 0
# python docs/measurements/half_text.py half_text
# mmscale data prepare configs/quickstart.yaml --out data/half_text --documents half_text/documents.jsonl \
#     'data.prepare.tasks={}' data.prepare.held_out=0.1
"""Documents of which half have no image: digits, each described and drawn, and Python's help texts."""

import json
import re
import sys
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

CHARACTERS = 120  # of a text at most


def main(out: Path) -> None:
    """Write `documents.jsonl`, whose pictures are those of OUT/digits."""
    digits = [json.loads(line) for line in (out / "digits" / "documents.jsonl").read_text().splitlines()]
    paragraphs = (re.sub(r"\s+", " ", part) for text in topics.values() for part in text.split("\n\n"))
    lines = [line for part in paragraphs for line in textwrap.wrap(part, CHARACTERS)]
    with (out / "documents.jsonl").open("w") as file:
        for number, (document, line) in enumerate(zip(digits, lines, strict=False)):
            content = [
                item | {"path": f"digits/{item['path']}"} if "path" in item else item for item in document["content"]
            ]
            digit = document["id"][: document["id"].rindex("-")]  # both documents of a picture are of one split
            print(json.dumps({"id": digit, "content": content}), file=file)
            print(json.dumps({"id": f"help{number}", "content": [{"type": "text", "text": line}]}), file=file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
