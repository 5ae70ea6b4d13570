"""Generates text, images and other items from a run's checkpoint or an export, with the same transformers model.

A run's weights are mapped in memory to those of an export (weights.py), so that there is only one cache, one loop
(mmscale.inference.generate), and one gate that proves them equal to the trainer. Code in an exported folder is never
run: the classes are those of this package. Only `open_on_ranks` distributes a run over processes, without a cache.
mmscale.inference.draw handles batch routing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from checkpoints_tools.huggingface.export_checks import no_messages, no_modality
from checkpoints_tools.huggingface.export_settings import (
    CONFIG,
    config_of_export,
    history_of_export,
    read_config,
    refuse_quantised,
)
from checkpoints_tools.huggingface.fast_tokenizer import fast_tokenizer
from checkpoints_tools.huggingface.files import ModelFiles, refuse_two_output_layers
from checkpoints_tools.huggingface.item_rules import item_rules, refuse_unlearned_mask
from checkpoints_tools.huggingface.model_config import model_config
from checkpoints_tools.huggingface.prompts import Prompt, document_of, parts_of, refuse_unknown_characters
from checkpoints_tools.huggingface.run_weights import RunWeights
from checkpoints_tools.huggingface.shipped.configuration_moma import MomaConfig
from checkpoints_tools.huggingface.shipped.decoding_moma import special_grammar
from checkpoints_tools.huggingface.shipped.image_codes_moma import read_codes
from checkpoints_tools.huggingface.shipped.items_moma import ItemPiece
from checkpoints_tools.huggingface.shipped.modeling_moma import MomaForCausalLM
from checkpoints_tools.huggingface.shipped.pixels_moma import formats
from checkpoints_tools.huggingface.shipped.processing_moma import MomaProcessor
from checkpoints_tools.huggingface.to_hf import (
    DataTokenizers,
    accounted,
    causal_routers,
    tokenizers_of,
)
from checkpoints_tools.huggingface.training_history import TrainingHistory
from checkpoints_tools.huggingface.verify import check_digests, is_used
from checkpoints_tools.huggingface.weights import model_type
from mmscale.checkpoint import integrity
from mmscale.config import Config
from mmscale.data.modalities.table import MODALITIES, folder_of, load_codec
from mmscale.data.vocab import IMAGE, Vocabulary
from mmscale.errors import CheckpointError, DataError, UsageError
from mmscale.inference.generate import ItemRules, Sampling, generate
from mmscale.inference.model import open_run
from mmscale.inference.model_on_ranks import ModelOnRanks
from mmscale.runtime.device import current_device
from mmscale.runtime.rank_env import RankEnv
from mmscale.tables.routings import Routing
from mmscale.tables.settings import IMAGE_FITS

_UNBOUNDED = 1 << 62  # no limit here, because generation refuses prompts that are too long
_AGAIN = "export it again: `mmscale convert to-hf`"
_CLASSES: dict[str, tuple[Any, Any]] = {
    "moma": (MomaConfig, MomaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


@dataclass(frozen=True)
class DecodedSample:
    """One continuation.

    Attributes:
        prompt: the prompt that it continues.
        pieces: texts, pictures and other items in order.
        ids: its tokens, without the one that ended it.
        ended: by `</s>` or the end of a message; otherwise the limit was reached.
        likelihood: log-probability of the prompt after its drawing [nats], of the best of several; else None.
    """

    prompt: Prompt
    pieces: tuple[str | PIL.Image.Image | ItemPiece, ...]
    ids: tuple[int, ...]
    ended: bool
    likelihood: float | None = None


@dataclass(frozen=True)
class Generator:
    """A model with its tokenizers.

    Attributes:
        config: the configuration that it was trained with; `objective` has the causal masking that it has learned.
        step: of the checkpoint; None: of an exported folder.
        routing: mode by which experts are assigned to tokens; "none" for a model without routing.
        model: of transformers.
        processor: converts text and images to ids and back.
        use_cache: whether the model has a cache.
        history: what it was trained with besides `config`.
    """

    config: Config
    step: int | None
    routing: str
    model: Any
    processor: MomaProcessor
    use_cache: bool = True
    history: TrainingHistory = field(default=TrainingHistory(None))

    def sample(self, prompts: Sequence[Prompt], *, count: int = 1, sampling: Sampling) -> list[DecodedSample]:
        """Continue every prompt `count` times.

        Raises:
            UsageError: placeholders and images do not match, the model does not support images, or `unconditional` is
                "mask" and it was not trained with causal masking.
            DataError: an image cannot be read, a text cannot be encoded, or a prompt is too long.
        """
        refuse_unlearned_mask(self.config, sampling.unconditional)
        rows = [self.encode(prompt) for prompt in prompts]
        vocab = self.config.vocab
        found = generate(
            self.model,
            [row for row in rows for _ in range(count)],
            sampling=sampling,
            items=self.rules(),
            context=self.config.model.seq_length,
            never=range(vocab.size, vocab.padded_size),
            ends=Vocabulary.from_config(vocab).ends,
            use_cache=self.use_cache,
            grammars=[special_grammar(self.processor)],
        )
        asked = [prompt for prompt in prompts for _ in range(count)]
        return [
            DecodedSample(prompt, self._pieces(one.ids), one.ids, one.ended)
            for prompt, one in zip(asked, found, strict=True)
        ]

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt, `<s>` first. Errors as in `sample`."""
        for name in dict.fromkeys((*(one for one, _ in prompt.files), *([prompt.opens] if prompt.opens else []))):
            if name == "image" and self.processor.codes is None:
                raise no_modality(name)
            if name != "image" and name not in self.processor.codecs:
                raise no_modality(name)
        if prompt.chat and not self.config.vocab.reserved:
            raise no_messages()
        refuse_unknown_characters(self.processor.tokenizer, prompt.text)
        try:
            content = document_of(prompt)
            ids: list[int]
            if prompt.chat:
                ids = self.processor.apply_chat_template(
                    [{"role": "user", "content": parts_of(content)}],
                    add_generation_prompt=True,
                    draw=prompt.opens,
                    return_tensors=None,
                )["input_ids"][0]
            else:
                ids = self.processor(content=content, draw=prompt.opens, max_length=_UNBOUNDED, return_tensors=None)[
                    "input_ids"
                ][0]
        except (ValueError, OSError) as error:  # the processor's message about a file
            raise DataError(
                str(error), remedy="name another picture" if not prompt.items else "name another file"
            ) from None
        return ids

    def resized(self, prompt: Prompt) -> list[str]:
        """Notes about images of another size than in training, which become squares as in training."""
        assert self.processor.codes is not None
        edge, fit = self.processor.codes.size, self.processor.codes.fit
        found = []
        for file in prompt.images:
            with PIL.Image.open(file, formats=formats()) as picture:
                if picture.size != (edge, edge):
                    width, height = picture.size
                    done = "scaled" if width == height else f"scaled and {IMAGE_FITS[fit].verb}"
                    found.append(f"{file} has {width} x {height} pixels, {done} to {edge} x {edge}")
        return found

    def rules(self) -> list[ItemRules]:
        """Rules of each modality whose items the model can generate, images first."""
        return item_rules(self.processor)

    def _pieces(self, ids: Sequence[int]) -> tuple[str | PIL.Image.Image | ItemPiece, ...]:
        try:
            return tuple(self.processor.pieces(ids))
        except ValueError as error:  # a tokenizer without a decoder
            raise DataError(str(error), remedy="export with an image tokenizer that can decode") from None


def open_generator(path: Path, step: int | None = None, *, routing: str | None = None) -> Generator:
    """Load a run's checkpoint or an exported folder for generation.

    Args:
        path: either.
        step: the run's checkpoint; None: the newest.
        routing: causal, top1 or threshold; None: causal for a run, the one in config.json for a folder.

    Raises:
        CheckpointError: there is none, it is damaged, or does not support that routing.
        DataError: the run's data set, which has the tokenizers, is missing or was replaced.
        UsageError: a step was given for a folder.
    """
    transformers_logging.disable_progress_bar()
    # transformers would only report missing weights; they are an error here.
    transformers_logging.set_verbosity_error()
    if (path / CONFIG).is_file():
        if step is not None:
            raise UsageError(f"{path} is an exported folder, which has no steps", remedy=f"name it {path}")
        return _of_folder(path, routing)
    if not (path / "config.yaml").is_file():
        raise CheckpointError(
            f"{path} is not a run folder (no config.yaml), nor an export (no {CONFIG})",
            remedy="name a run: `mmscale train` prints it",
        )
    return _of_run(path, step, routing or "causal")


def _of_run(run: Path, step: int | None, routing: str) -> Generator:
    source = RunWeights(run, step)
    config = source.config
    auxiliary, thresholds, listed = accounted(source, config, run, routing=routing)
    own = tokenizers_of(config, source, None)
    content = model_config(
        config,
        auxiliary_size=auxiliary,
        thresholds=thresholds,
        routing=routing,
        tokens_per_image=own.tokens_per_image,
    )
    weights: dict[str, Tensor] = {}
    for move in listed:
        weights |= zip(move.targets, move.split(source.read(move.source)), strict=True)
    model = _loaded(content, weights, where=source.path)
    name = routing if config.model.routes else "none"
    history = TrainingHistory.of_run(source)
    return Generator(history.applied_to(config), source.step, name, model, _processor(config, own), history=history)


@contextlib.contextmanager
def open_on_ranks(
    run: Path, step: int | None = None, *, routing: str | None = None, env: RankEnv
) -> Iterator[Generator]:
    """Load a run's checkpoint over tensor-parallel ranks for generation without a cache; all ranks call it.

    Args:
        run: the run's folder.
        step: the checkpoint; None: the newest.
        routing: causal, top1 or threshold; None: causal.
        env: this process's place among the ranks.

    Raises:
        CheckpointError: there is none, it is damaged, or does not support that routing.
        ConfigError: the model cannot be sharded over so many ranks.
        DataError: the run's data set, which has the tokenizers, is missing or was replaced.
    """
    transformers_logging.set_verbosity_error()
    routing = routing or "causal"
    source = RunWeights(run, step)
    config = source.config
    causal_routers(source, config, run, routing=routing)
    own = tokenizers_of(config, source, None)
    dtype = "fp32" if current_device().type == "cpu" else None  # as in a single process
    with open_run(run, step=source.step, dtype=dtype, env=env) as model:
        on_ranks = ModelOnRanks(model, Routing(routing)).eval()
        name = routing if config.model.routes else "none"
        history, processor = TrainingHistory.of_run(source), _processor(config, own)
        learned = history.applied_to(config)
        yield Generator(learned, source.step, name, on_ranks, processor, use_cache=False, history=history)


def _processor(config: Config, own: DataTokenizers) -> MomaProcessor:
    tokenizer = fast_tokenizer(own.text, own.vocabulary, rows=config.vocab.padded_size, context=config.model.seq_length)
    processor = MomaProcessor(tokenizer, modalities=_ranges(own.vocabulary), marked=list(own.vocabulary.marked))
    processor.codes = read_codes(own.folder) if IMAGE in own.codecs else None
    for name, codec in own.codecs.items():
        if name != IMAGE:
            processor.add_codec(MODALITIES[name], codec=codec)
    return processor


def _of_folder(folder: Path, routing: str | None) -> Generator:
    content = read_config(folder)
    refuse_quantised(folder, content)
    config = config_of_export(folder, content)
    check_digests(folder, content, used=is_used)
    files = ModelFiles(folder)  # refuses missing shards and files outside of the folder
    if content.get("model_type") != model_type(config):
        raise CheckpointError(
            f"{folder}: {CONFIG} says {content.get('model_type')!r}, which its run's settings do not", remedy=_AGAIN
        )
    if routing is not None and config.model.routes:
        content["routing"] = routing
    refuse_two_output_layers(files, tied=bool(content.get("tie_word_embeddings")))
    model = _loaded(content, {name: files.read(name) for name in sorted(files.names())}, where=folder)
    processor = _saved_processor(folder)
    name = content["routing"] if config.model.routes else "none"
    history = history_of_export(folder, content)
    return Generator(history.applied_to(config), None, name, model, processor, history=history)


def _saved_processor(folder: Path) -> MomaProcessor:
    try:
        if not (folder / "processor_config.json").is_file():  # transformers would create an empty tokenizer
            raise OSError("there is no processor_config.json")
        made = MomaProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for name in made.marked:  # with the classes of this package, not with code of the folder
            if name in MODALITIES and (folder / folder_of(name)).is_dir():
                made.add_codec(MODALITIES[name], codec=load_codec(name, folder / folder_of(name)))
        return made
    except Exception as error:  # transformers may raise anything for damaged or missing files
        raise CheckpointError(
            f"{folder} has no readable processor: {str(error).strip().splitlines()[0]}",
            remedy=f"a fine-tuned export needs it too: processor.save_pretrained(DIR); else {_AGAIN}",
        ) from error


def _loaded(content: dict[str, Any], weights: dict[str, Tensor], *, where: Path) -> Any:
    """The model with exactly these weights, on this machine's device; hosts compute in fp32, where bf16 is exact."""
    config_class, model_class = _CLASSES[content["model_type"]]
    own = {key: value for key, value in content.items() if key not in ("architectures", "auto_map", "model_type")}
    try:
        config = config_class(**own)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}", remedy="choose another --routing, or train what it needs") from None
    device = current_device()
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, own["dtype"])
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, attn_implementation="sdpa"
    )
    wrong = [
        f"{kind.removesuffix('_keys')} {name}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for name in sorted(map(str, report.get(kind) or ()))
    ]
    if wrong:
        raise CheckpointError(f"{where} holds other weights than its model: {integrity.describe(wrong)}", remedy=_AGAIN)
    return model.eval().to(device)


def _ranges(vocabulary: Vocabulary) -> list[list[Any]]:
    return [[name, *ids] for name, ids in zip(vocabulary.names, vocabulary.ranges, strict=True)]
