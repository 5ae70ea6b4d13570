"""The model card of an exported model: what it is, how it is used, what it was trained on, where it comes from.

Text only; every number comes from the run's own logs and the gate's report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_tools.hf.versions_moma import NEWEST, OLDEST
from checkpoints_tools.hf_weights import is_native
from mmscale.config import Config
from mmscale.config.load import dump
from mmscale.data.manifest import NO_TOKENIZER
from mmscale.train.metrics import read_metrics

_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mixed-modal, early-fusion, mmscale]
---"""
_USE = """Tested with transformers {oldest} to {newest}; the code here warns about others.

```python
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder{remote})
inputs = processor(text="{prompt}", draw={draw})
ids = model.generate(**inputs, max_length={context}, do_sample=True{grammar})
print(processor.pieces(ids[0]))  # texts and Pillow images
```"""


def card(config: Config, report: dict[str, Any], *, run: Path, step: int) -> str:
    """README.md of the exported folder.

    Args:
        config: the run's configuration.
        report: the content of conversion_report.json.
        run: the run's folder.
        step: optimizer steps done.
    """
    native, images = is_native(config), report["data"]["image_tokenizer"] != NO_TOKENIZER
    gate, origin = report["gate"], report["origin"]["parents"][0]
    kind = report["model"]["class"]
    code = (
        f"transformers' own `{kind}`; only the processor of images is code of this folder."
        if native
        else f"`{kind}`, whose code is in this folder (`trust_remote_code=True`)."
    )
    routing = report["model"]["routing"]
    routed = f" Experts are chosen token by token (`{routing}`); nothing looks ahead." if routing else ""
    use = _USE.format(
        oldest=OLDEST,
        newest=NEWEST,
        remote="" if native else ", trust_remote_code=True",
        prompt="draw a seven" if images else "Once",
        draw=images,
        context=config.model.seq_length,
        grammar=", logits_processor=[processor.image_grammar()]" if images else "",
    )
    return (
        "\n\n".join(
            [
                _HEADER,
                f"# {config.run.name}, step {step}",
                f"A language model over {' and '.join(config.vocab.names)} tokens, trained with mmscale. It is {code}"
                f"{routed} A row of a batch is one document; pad on the left.",
                "## Use",
                use,
                "## Losses on held-out data",
                _losses(config, run, step),
                "## Data",
                _facts(report["data"]),
                "## Conversion",
                f"Logits of {gate['compared']} prompts ({gate['tokens']} tokens), whole, with a cache and left-padded, "
                f"differ from the trainer's by at most {gate['max_abs']:.2g} (fp32, limit {gate['tolerance']:g}); the "
                f"most likely token is the same at {gate['argmax_same']} of {gate['tokens']} places. `generate` gives "
                f"the trainer's {gate['generated']} most likely next tokens with a cache, without one, left-padded. "
                "Details: `conversion_report.json`.",
                _facts(
                    {
                        "checkpoint": origin["path"],
                        "manifest digest": origin["manifest"],
                        "configuration digest": origin["config_digest"],
                        "written by mmscale": origin["code_version"],
                        "converted by mmscale": report["versions"]["mmscale"],
                    }
                ),
                "## Configuration",
                f"```yaml\n{dump(config).strip()}\n```",
            ]
        )
        + "\n"
    )


def _losses(config: Config, run: Path, step: int) -> str:
    """The last held-out losses up to the step; those with batch routing are said to be so."""
    found: dict[str, tuple[int, float]] = {}
    for record in read_metrics(run):
        if record["step"] <= step:
            found |= {
                key: (record["step"], value)
                for key, value in record.items()
                if key.startswith("eval/") and isinstance(value, float)
            }
    if not found:
        return "None were logged."
    rows = [f"| `{key.removeprefix('eval/')}` | {value:.4f} | {at} |" for key, (at, value) in sorted(found.items())]
    note = (
        "Numbers whose name does not say causal were measured with batch routing, as in training: experts chose among "
        "all tokens of a sequence, later ones too."
    )
    more = ["", note] if config.model.routes else []
    return "\n".join(["| measured | value | step |", "|---|---|---|", *rows, *more])


def _facts(values: dict[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in values.items() if value not in ("", None))
