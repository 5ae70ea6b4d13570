"""The half of the gate that is independent of mmscale: loads an exported folder as users do, and compares.

Run as a script in a fresh, isolated and offline interpreter: `python -I gate_reload.py FOLDER EXPECTED`. EXPECTED is
gate.py's folder with the trainer's results; `found.json` is written there. gate.py decides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor


def main(folder: Path, expected: Path) -> None:
    """Write the findings.

    Args:
        folder: the exported model.
        expected: `logits.safetensors` ("ids.0", "logits.0", ...; items of every modality and their codes) and
            `texts.json` (texts, their ids, new_tokens).
    """
    transformers.utils.logging.disable_progress_bar()
    wanted = load_file(expected / "logits.safetensors")
    said = json.loads((expected / "texts.json").read_text())
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=said["remote_code"], dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "loading": {name: sorted(map(str, report.get(name) or ())) for name in _REPORTED},
        "weights": _weights(model, folder),
    }
    with torch.no_grad():
        found |= _compare(model, wanted)
        found["generated"] = _generated(model, wanted, new_tokens=said["new_tokens"])
    found |= _texts(folder, said, wanted)
    (expected / "found.json").write_text(json.dumps(found))


_REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def _weights(model: torch.nn.Module, folder: Path) -> dict[str, list[str]]:
    """Tensors of the files that the model lacks, and tensors of the model that the files lack; considers tied ones."""
    stored = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            stored |= set(opened.keys())
    state = model.state_dict(keep_vars=True)
    names: dict[int, set[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), set()).add(name)
    absent = [sorted(own)[0] for own in names.values() if not own & stored]
    return {"not_in_files": sorted(absent), "not_in_model": sorted(stored - set(state))}


class _Margins:
    """The smallest distance of any router's decision from its threshold. Below rounding, correct models may differ."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.smallest = float("inf")
        routing = getattr(model.config, "routing", None)
        for module in model.modules():
            if type(module).__name__ == "MomaAuxiliaryRouter":
                module.register_forward_hook(self._top1 if routing == "top1" else self._threshold)
            elif getattr(module, "router_bias", None) is not None:
                module.register_forward_hook(self._token_choice)
            elif routing == "threshold" and getattr(module, "threshold", None) is not None:
                module.register_forward_hook(self._cutoff)
            elif routing == "threshold" and getattr(module, "depth_threshold", None) is not None:
                module.register_forward_hook(self._depth_cutoff)

    def _note(self, distance: Tensor) -> None:
        if distance.numel():
            self.smallest = min(self.smallest, float(distance.min()))

    def _threshold(self, module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._note((output[0].sigmoid() - module.threshold.float()).abs())

    def _top1(self, module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self._threshold(module, inputs, output)
        if output[0].shape[-1] > 1:
            best = output[0].topk(2, dim=-1).values
            self._note((best[..., 0] - best[..., 1]).abs())

    def _cutoff(self, module: Any, inputs: Any, output: Tensor) -> None:
        logits = torch.nn.functional.linear(inputs[0].float(), module.router.float())
        self._note((module.ranked(logits) - module.threshold.float()).abs())

    def _token_choice(self, module: Any, inputs: Any, output: Tensor) -> None:
        top_k = module.token_choice["top_k"]
        logits = torch.nn.functional.linear(inputs[0].float(), module.router.float())
        ranked = (module.scores(logits) + module.router_bias.float()).sort(dim=-1, descending=True).values
        if top_k < ranked.shape[-1]:
            self._note(ranked[..., top_k - 1] - ranked[..., top_k])

    def _depth_cutoff(self, module: Any, inputs: Any, output: Tensor) -> None:
        logits = inputs[0].float() @ module.depth_router.float()
        self._note((logits - module.depth_threshold.float()).abs())

    def take(self) -> float:
        smallest, self.smallest = self.smallest, float("inf")
        return min(smallest, 1.0)


def _compare(model: Any, wanted: dict[str, Tensor]) -> dict[str, Any]:
    margins = _Margins(model)
    prompts = []
    count = sum(name.startswith("ids.") for name in wanted)
    for number in range(count):
        ids, logits = wanted[f"ids.{number}"], wanted[f"logits.{number}"]
        whole = model(ids[None]).logits[0]
        row = {"tokens": len(ids), **_distance(whole, logits), "margin": margins.take()}
        half = max(1, len(ids) // 2)
        first = model(ids[None, :half], use_cache=True)
        cached = [first.logits[0]]
        if half < len(ids):
            rest = model(ids[None, half:], past_key_values=first.past_key_values, use_cache=True)
            cached.append(rest.logits[0])
        row["cached_max_abs"] = float((torch.cat(cached) - logits).abs().max())
        prompts.append(row)
    width = max(row["tokens"] for row in prompts)
    pad = model.config.pad_token_id
    batch = torch.full((count, width), pad)
    mask = torch.zeros_like(batch)
    for number, row in enumerate(prompts):
        batch[number, width - row["tokens"] :] = wanted[f"ids.{number}"]
        mask[number, width - row["tokens"] :] = 1
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    padded = model(batch, attention_mask=mask, position_ids=position).logits
    for number, row in enumerate(prompts):
        own = padded[number, width - row["tokens"] :]
        row["padded_max_abs"] = float((own - wanted[f"logits.{number}"]).abs().max())
    return {"prompts": prompts}


def _generated(model: Any, wanted: dict[str, Tensor], *, new_tokens: int) -> list[dict[str, Any]]:
    """The output of `generate` after each beginning: with a cache, without one, and in a left-padded batch."""
    margins = _Margins(model)
    begins = [wanted[name] for name in sorted(name for name in wanted if name.startswith("begin."))]
    rows = []
    for begin in begins:
        alone = (begin[None], torch.ones_like(begin)[None])
        row: dict[str, Any] = {
            way: _continue(model, *alone, new_tokens=new_tokens, use_cache=way == "cached")[0]
            for way in ("cached", "uncached")
        }
        rows.append(row | {"margin": margins.take()})
    width = max(map(len, begins))
    batch = torch.full((len(begins), width), model.config.pad_token_id)
    mask = torch.zeros_like(batch)
    for number, begin in enumerate(begins):
        batch[number, width - len(begin) :] = begin
        mask[number, width - len(begin) :] = 1
    together = _continue(model, batch, mask, new_tokens=new_tokens, use_cache=True)
    return [row | {"batched": new} for row, new in zip(rows, together, strict=True)]


def _continue(model: Any, ids: Tensor, mask: Tensor, *, new_tokens: int, use_cache: bool) -> list[list[int]]:
    whole = model.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, max_length=None, do_sample=False, use_cache=use_cache
    )
    found: list[list[int]] = whole[:, ids.shape[1] :].tolist()
    return found


def _distance(got: Tensor, want: Tensor) -> dict[str, Any]:
    same = got.argmax(dim=-1) == want.argmax(dim=-1)
    best = want.topk(2, dim=-1).values
    gap = (best[:, 0] - best[:, 1])[~same]
    return {
        "max_abs": float((got - want).abs().max()),
        "argmax_same": int(same.sum()),
        "largest_gap_of_another_argmax": float(gap.max()) if len(gap) else 0.0,
        "finite": bool(torch.isfinite(got).all()),
    }


def _texts(folder: Path, said: dict[str, Any], wanted: dict[str, Tensor]) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tokens = processor.tokenizer
    texts, ids = said["texts"], said["ids"]
    literal = {"split_special_tokens": True} if tokens.chat_template else {}  # else it is the tokenizer's default
    found = {
        "other_ids": [text for text, own in zip(texts, ids, strict=True) if processor.encode([text])[1:] != own],
        "other_plain_ids": [
            text
            for text, own in zip(texts, ids, strict=True)
            if tokens(text, add_special_tokens=False, **literal)["input_ids"] != own
        ],
    }
    names = [key.removeprefix("codes.") for key in sorted(wanted) if key.startswith("codes.")]
    return found | {"other_items": {name: _other_items(processor, name, wanted) for name in names}}


def _other_items(processor: Any, name: str, wanted: dict[str, Tensor]) -> int:
    """How many items the processor encodes or decodes differently."""
    codes, made = wanted[f"codes.{name}"].numpy(), wanted[f"made.{name}"].numpy()
    image = name == "image"
    item = None if image else processor.codecs[name]
    first = processor.image_range[0] if item is None else item.first
    opens, closes = (processor.boi, processor.eoi) if item is None else (item.opens, item.closes)
    pieces = [processor.pieces([opens, *(row + first).tolist(), closes])[0] for row in codes]
    values = [processor.pixels(piece) if item is None else piece.values for piece in pieces]
    same = [bool((own == want).all()) for own, want in zip(values, made, strict=True)]
    given = pieces if item is None else [{"type": name, "path": piece.values} for piece in pieces]
    read = [processor(content=[one], return_tensors=None)["input_ids"][0][2:-1] for one in given]
    again = wanted[f"again.{name}"].numpy() + first
    same += [row == own.tolist() for row, own in zip(read, again, strict=True)]
    return len(same) - sum(same)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
