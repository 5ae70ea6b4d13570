"""Imports a Hugging Face folder as the checkpoint of a new run; exports of to_hf.py are restored bit by bit.

foreign.py imports other projects' dense models as a starting point, from safetensors or from checkpoints of torchtitan
and Megatron-LM (dcp_files.py). Tensors are read one by one; pickles and code of the folder are never run.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.huggingface import foreign
from checkpoints_tools.huggingface.dcp_files import INDEX as DCP_INDEX
from checkpoints_tools.huggingface.dcp_files import DcpFiles
from checkpoints_tools.huggingface.export_settings import (
    CONFIG,
    REPORT,
    config_of_export,
    is_ours,
    refuse_quantised,
    tokenizers_of_export,
)
from checkpoints_tools.huggingface.files import ModelFiles, WeightsByName, refuse_two_output_layers, unaccounted
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.verify import Digests, check_digests, check_shapes, check_values, is_weights
from checkpoints_tools.huggingface.weights import Move, moves, target_shapes
from checkpoints_tools.new_run import NewRun
from checkpoints_tools.new_schedules import restarted
from mmscale import bounded
from mmscale.checkpoint import integrity, rewrite, run_folder
from mmscale.checkpoint.tensors import OPTIMIZER, Region, TensorEntry, unknown_tensor
from mmscale.config import Config
from mmscale.data.modalities.text_tokens import FILE as TOKENIZER_FILE
from mmscale.data.modalities.text_tokens import FOLDER as TOKENIZER_FOLDER
from mmscale.data.modalities.text_tokens import TextTokenizer
from mmscale.errors import CheckpointError, shell_command
from mmscale.runtime.environment import code_version

# Values of keys that the config.json of an older export lacks.
_BEFORE: dict[str, Any] = {
    "choice": "sigmoid",
    "token_choice": None,
    "no_modality_id": 0,
    "qkv_bias": False,
    "untie": [],
}
# Keys that a fine-tuning may change, because they do not affect what the weights compute.
_FREE = {"dtype", "architectures", "auto_map", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id"}
_LINEAR = re.compile(r"\.(linear_qkv|linear_proj|linear_fc1|linear_fc2)\.weight$")  # an untied one has no FP8 state
_AGAIN = "copy the folder again, or export it again: `mmscale convert to-hf`"


def import_(folder: Path, run: Path, *, image_codes: int = 0, seq_length: int | None = None) -> dict[str, Any]:
    """Commit the weights of a folder as the checkpoint of step 0 of a new run.

    Everything is verified before anything is written: digests if the folder has them, shapes, and values.

    Args:
        folder: with config.json, and safetensors or a checkpoint of torchtitan or Megatron-LM.
        run: the run's folder, without checkpoints.
        image_codes: for a foreign model, number of ids to add for image tokens; 0: none.
        seq_length: for a foreign model, tokens of a training sequence; None: its context, at most 4096.

    Returns:
        `path` of the checkpoint, `run`, `tensors`, `bytes`, `model`, what was `verified`, and the user's `next` step.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or holds a model that is not supported; the run has
            checkpoints.
    """
    run_folder.refuse_checkpoints(run)
    content = _read_json(folder / CONFIG)
    refuse_quantised(folder, content)
    files: WeightsByName = DcpFiles(folder, content) if (folder / DCP_INDEX).is_file() else ModelFiles(folder)
    tokenizer: TextTokenizer | None = None
    rows = None
    if is_ours(folder, content):
        config, listed = _own(folder, content)
        config = restarted(config)
        kind, steps = "mmscale", f"{shell_command('eval', run)}, or {_train(run)}"
    else:
        config, listed = foreign.translate(content, files, image_codes=image_codes, seq_length=seq_length)
        tokenizer, rows = foreign.read_tokenizer(folder, config), int(content["vocab_size"])
        kind = str(content.get("model_type")) + (f", saved by {files.program}" if isinstance(files, DcpFiles) else "")
        file = run / TOKENIZER_FOLDER / TOKENIZER_FILE
        steps = f"`mmscale data prepare` with data.prepare.text.load: {file}, then {_train(run)} data.path=DIR"
    digests = _verified(folder, content, files, config, listed, rows=rows)
    report = _read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    source = HfTensors(folder, files, listed, config, tokenizers=tokenizers_of_export(folder, content))
    parent = {"path": str(folder)} | ({"origin": report["origin"]} if "origin" in report else {})
    origin = {"made_by": "convert from-hf", "parents": [parent]}
    with _nothing_left_of(run):
        if tokenizer is not None:
            tokenizer.save(run / TOKENIZER_FOLDER)
        made = rewrite.into_run(source, run, origin=origin, weights=True, code_version=code_version())
    names = source.names()
    return {
        "run": str(run),
        "path": str(made),
        "model": f"{config.model.kind} from {kind}",
        "tensors": len(names),
        "bytes": sum(source.entry(name).nbytes for name in names),
        "verified": digests.said,
        "next": steps,
    }


class HfTensors(NewRun):
    """The tensors that a checkpoint would have, computed from a folder (a `TensorSource`).

    Args:
        folder: for messages.
        files: its weights, whose shapes match the configuration.
        listed: how they are converted.
        config: of the new run.
        tokenizers: fingerprints of the tokenizers that it was trained with; empty if they are unknown.
    """

    def __init__(
        self, folder: Path, files: WeightsByName, listed: Sequence[Move], config: Config, *, tokenizers: dict[str, str]
    ) -> None:
        super().__init__(folder, config, tokenizers)
        self._files = files
        self._moves = {move.source: move for move in listed}
        self._entries = {name: self._measured(move) for name, move in self._moves.items()}

    def _measured(self, move: Move) -> TensorEntry:
        parts = [
            torch.empty(self._files.shape(name), dtype=self._files.dtype(name), device="meta") for name in move.targets
        ]
        whole = move.join(parts)
        return TensorEntry(move.source, tuple(whole.shape), whole.dtype)

    def names(self, *, weights: bool = False) -> list[str]:
        """Names of all tensors, sorted; there is no optimizer."""
        return sorted(name for name in self._entries if not (weights and name.startswith(OPTIMIZER)))

    def entry(self, name: str) -> TensorEntry:
        """Shape and type of a tensor."""
        if name not in self._entries:
            raise unknown_tensor(name, self.names(), where=self.path)
        return self._entries[name]

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A tensor, or a box of it."""
        self.entry(name)
        move = self._moves[name]
        whole = move.join([self._files.read(target) for target in move.targets])
        return whole if region is None else whole[tuple(region)].clone()

    def objects(self) -> dict[str, bytes]:
        """The empty extra states of megatron-core's linears, which it expects when they are loaded."""
        empty = io.BytesIO()
        torch.save([None], empty)
        linears = [name.removesuffix(".weight") for name in self._entries if _LINEAR.search(name)]
        return {f"{name}._extra_state/shard_0_1": empty.getvalue() for name in linears}


def _own(folder: Path, content: dict[str, Any]) -> tuple[Config, list[Move]]:
    """Configuration and conversions of a folder that to_hf.py wrote.

    Raises:
        CheckpointError: its two configurations disagree, or it is of another version.
    """
    config = config_of_export(folder, content)
    auxiliary, thresholds = int(content.get("auxiliary_size", 0)), bool(content.get("keeps_thresholds", False))
    wanted = model_config(
        config,
        auxiliary_size=auxiliary,
        thresholds=thresholds,
        routing=str(content.get("routing", "causal")),
        tokens_per_image=int(content.get("tokens_per_image", 0)),
    )
    found = content | {"head_dim": _head_width(content)}
    wanted |= {"head_dim": _head_width(wanted)}
    wanted.pop("head_width", None)
    other = sorted(key for key in wanted if key not in _FREE and found.get(key, _BEFORE.get(key)) != wanted[key])
    if other == ["vocab_size"]:
        raise CheckpointError(
            f"{folder} has {content.get('vocab_size')} ids, its run had {wanted['vocab_size']}: tokens were added",
            remedy="a run's ids are fixed by its data: resize the embedding back, or fine-tune without new tokens",
        )
    if other:
        raise CheckpointError(
            f"{folder / CONFIG} and the settings of its run disagree about {', '.join(other)}",
            remedy="restore these keys as they were exported",
        )
    if auxiliary:
        # The checkpoint holds routers together with the other weights, as that of a joint run does.
        routers = config.model.auxiliary.model_copy(update={"mode": "joint", "width": auxiliary})
        config = config.model_copy(update={"model": config.model.model_copy(update={"auxiliary": routers})})
    return config, moves(config, auxiliary=auxiliary > 0, thresholds=thresholds)


def _head_width(content: dict[str, Any]) -> Any:
    """Width of a head; `head_dim` is wider in exports with Mixture-of-Depths, and was not in their first versions."""
    return content.get("head_width") or content.get("head_dim")


def _verified(
    folder: Path,
    content: dict[str, Any],
    files: WeightsByName,
    config: Config,
    listed: Sequence[Move],
    *,
    rows: int | None,
) -> Digests:
    """The result of comparing digests, after checking that all tensors exist and have plausible values.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    used = [target for move in listed for target in move.targets]
    wrong = unaccounted((name for name in files.names() if not _redundant(name, config)), used)
    if wrong:
        raise CheckpointError(
            f"{folder} does not hold what its {CONFIG} says: {integrity.describe(wrong)}", remedy=_AGAIN
        )
    digests = check_digests(folder, content, used=is_weights)
    auxiliary, thresholds = int(content.get("auxiliary_size", 0)), bool(content.get("keeps_thresholds", False))
    check_shapes(files, target_shapes(config, auxiliary_size=auxiliary, thresholds=thresholds, rows=rows))
    check_values(files, used, whole=digests.same)
    refuse_two_output_layers(files, tied=config.model.tie_embeddings)
    return digests


@contextlib.contextmanager
def _nothing_left_of(run: Path) -> Iterator[None]:
    """After an error, remove new files from the run's folder, and new folders above it."""
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    before = set(run.iterdir()) if run.is_dir() else set()
    try:
        yield
    except BaseException:
        for path in [path for path in run.iterdir() if path not in before] if run.is_dir() else []:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process has created something there in the meantime
            for folder in missing:
                folder.rmdir()
        raise


def _train(run: Path) -> str:
    command = shell_command("train", run / "config.yaml", "checkpoint.allow_missing=true")
    return f"{command} (there is no optimizer state)"


def _redundant(name: str, config: Config) -> bool:
    """Whether this is a tensor of older exports that follows from others."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.model.tie_embeddings)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return bounded.read_object(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", remedy="name a Hugging Face folder on this machine") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}", remedy=_AGAIN) from None
