"""Writes the model card of an exported model: description, usage, training data, provenance.

Text only; every number comes from the run's own logs and the gate's report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from checkpoints_tools.huggingface.card_results import measured
from checkpoints_tools.huggingface.data_sources import blend_sources
from checkpoints_tools.huggingface.example_prompt import example_prompt
from checkpoints_tools.huggingface.shipped.versions_moma import NEWEST, OLDEST
from checkpoints_tools.huggingface.weights import is_native
from mmscale.config import Config
from mmscale.config.load import dump
from mmscale.data.prepared.manifest import NO_TOKENIZER
from mmscale.data.vocab import IMAGE
from mmscale.runs.events import read_events
from mmscale.runs.recorded_leaks import leaks_in
from mmscale.train.stages.stage_report import report_of

TAGS = ["mixed-modal", "early-fusion", "mmscale"]
_NO_PROMPT = "a prompt in the words of the training documents"  # the data is not at hand
_TASK = "text-generation"
_OF_ONE = ("documents", "tokens", "source", "sources")  # of `data` in the report: about one data set, not a blend
_USE = """Tested with transformers {oldest} to {newest}; the code here warns about others.

```python
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder{remote})
inputs = processor(text={prompt}, draw={draw})
ids = model.generate(**inputs, max_length={context}, do_sample=True{grammar})
print(processor.pieces(ids[0]))  # {pieces}
```"""


def card(config: Config, report: dict[str, Any], *, run: Path, step: int, licence: str = "") -> str:
    """README.md of the exported folder, with metadata for the Hugging Face Hub.

    Args:
        config: the run's configuration.
        report: the content of conversion_report.json.
        run: the run's folder.
        step: optimizer steps done.
        licence: the Hub's identifier of the weights' licence, e.g. apache-2.0; "": the card names none.
    """
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=TAGS,
        license=licence or None,
        model_name=config.run.name,
        eval_results=[one.for_hub(config, task_type=_TASK) for one in measured(run, step)] or None,
    )
    body = _body(config, report, run=run, step=step)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))


def _body(config: Config, report: dict[str, Any], *, run: Path, step: int) -> str:
    native, images = is_native(config), report["data"]["image_tokenizer"] != NO_TOKENIZER
    others = [name for name in config.vocab.marked if f"{name}_tokenizer" in report["data"]]
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
        prompt=json.dumps(example_prompt(config, item=IMAGE if images else "") or _NO_PROMPT, ensure_ascii=False),
        draw=images,
        pieces="texts and Pillow images"
        if not others
        else f'texts, Pillow images, pieces of {" and ".join(others)} with .save(FILE); draw="{others[0]}" begins one',
        context=config.model.seq_length,
        grammar=", logits_processor=[processor.grammar()]" if images or others else "",
    )
    return (
        "\n\n".join(
            [
                f"# {config.run.name}, step {step}",
                f"A language model over {' and '.join(config.vocab.names)} tokens, trained with mmscale. It is {code}"
                f"{routed} A row of a batch is one document; pad on the left.",
                "## Use",
                use,
                "## Results on held-out data",
                losses_table(config, run, step),
                *(f"{line}." for line in leaks_in(read_events(run), step=step)),
                "## Data",
                _sources(config, step, report["data"]),
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


def losses_table(config: Config, run: Path, step: int) -> str:
    """The last held-out losses up to the step, including those with the auxiliary stage's routers, by routing mode."""
    found, report = measured(run, step), report_of(run)
    other = f"The {report.note}." if report is not None and report.main_step == step and report.note else ""
    if not found:
        return "\n\n".join(filter(None, ("None were logged.", other)))
    rows = [f"| {one.named(config)} | {one.data} | {one.shown} | {one.step} |" for one in found]
    note = (
        "Losses are in nats. With batch routing, as in training, experts chose among all tokens of a sequence, later "
        "ones too. With causal and threshold routing no number uses a later token."
    )
    more = ["", note] if config.model.routes else []
    more += ["", other] if other else []
    return "\n".join(["| measured | data | value | step |", "|---|---|---|---|", *rows, *more])


def _sources(config: Config, step: int, data: dict[str, Any]) -> str:
    """The data of a run. The report of an export describes one set, which has the tokenizers of all."""
    sources = blend_sources(config, step)
    if not sources:
        return _facts(data)
    shared = {"tokenizers_of" if key == "folder" else key: value for key, value in data.items() if key not in _OF_ONE}
    return "\n".join(["- data sets:", *(f"  - {_source(one)}" for one in sources), _facts(shared)])


def _source(source: dict[str, Any]) -> str:
    """`data/a: weight 3, 20 documents, tokens 13,999 text + 72,064 image, source 1a2b`."""
    counts = (
        [f"{source['documents']:,} documents", f"tokens {_counts(source['tokens'])}"] if "documents" in source else []
    )
    weight = f"weight {source['weight']:g}"
    origin = [f"source {source['source']}"] if "source" in source else ["not at hand for this export"]
    return f"{source['folder']}: {', '.join((weight, *counts, *origin))}"


def _facts(values: dict[str, Any]) -> str:
    shown = {key.replace("_", " "): value for key, value in values.items() if value not in ("", None)}
    return "\n".join(f"- {key}: {_counts(value) if isinstance(value, dict) else value}" for key, value in shown.items())


def _counts(by_modality: dict[str, int]) -> str:
    """`13,999 text + 72,064 image`."""
    return " + ".join(f"{count:,} {name}" for name, count in by_modality.items())
