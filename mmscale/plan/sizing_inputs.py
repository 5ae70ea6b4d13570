"""The inputs of a proposal: facts about documents, and the machine. sizing.py makes proposals."""

from __future__ import annotations

from dataclasses import dataclass

from mmscale.tables.gpus import Gpu

# Fraction of a machine's FLOP/s that models of this size reach; on a CPU small operations wait for Python.
REACHED = {"cpu": 0.25, "gpu": 0.30}
# Largest number of tokens per second on one rank for any model; starting operations is the limit for small ones. On a
# CPU 4 layers of width 64 reach 3,000 to 6,000 (docs/results/quickstart.md); on a GPU not measured.
MOST_PER_RANK = {"cpu": 4000.0, "gpu": 300_000.0}


@dataclass(frozen=True)
class Items:
    """Items of one modality besides text and images.

    Attributes:
        modality: its name.
        number: in all documents.
        most: in one document.
        tokens: of each item, with the default settings of the modality's tokenizer.
    """

    modality: str
    number: int
    most: int
    tokens: int


@dataclass(frozen=True)
class Facts:
    """Facts about the documents.

    Attributes:
        where: folders of prepared data sets, or document files.
        tokens_of: training tokens of each of these folders, if the documents are prepared.
        documents: number of them.
        characters: of text in all documents; None: unknown, because they are already prepared.
        text_ids: ids that a text tokenizer can learn from these texts, with special tokens and bytes; None: unknown.
        images: number of images in all documents.
        others: items of modalities besides text and images, of documents that are not prepared yet.
        edge: median of the shorter edges of images [pixels]; None: unknown.
        channels: 1 if all examined images are grey, otherwise 3.
        most_images: largest number in one document.
        most_bytes: largest amount of text in one document.
        distinct_images: number of distinct images; None: unknown.
        ids: ids of each modality in the order of the vocabulary, text first, if the documents are prepared.
        marked: modalities with separate begin and end tokens, if the documents are prepared.
        reserved: whether their vocabulary has the reserved ids, likewise.
        tokens: training tokens of each modality, if the documents are prepared.
        longest: tokens of the longest document, if the documents are prepared.
        held_out: documents that are held out, by the prepared data set or by their own `split`; None: unknown.
        rejected: records that were read and are no documents.
        first_rejected: where the first of them is, and why; "": none.
    """

    where: tuple[str, ...]
    documents: int
    images: int
    characters: int | None = None
    text_ids: int | None = None
    edge: int | None = None
    channels: int = 3
    most_images: int = 0
    most_bytes: int = 0
    distinct_images: int | None = None
    others: tuple[Items, ...] = ()
    ids: dict[str, int] | None = None
    marked: tuple[str, ...] = ()
    reserved: bool = False
    tokens: dict[str, int] | None = None
    tokens_of: tuple[int, ...] = ()
    longest: int | None = None
    held_out: int | None = None
    rejected: int = 0
    first_rejected: str = ""

    @property
    def is_prepared(self) -> bool:
        """Whether vocabulary and images are already determined."""
        return self.ids is not None


@dataclass(frozen=True)
class Machine:
    """The machine for a run.

    Attributes:
        name: for people.
        kind: cpu or gpu.
        ranks: processes: one per device, or per CPU core.
        flops: of one rank in the training format [FLOP/s].
        gpu: figures of the device; None: a CPU.
        memory: of a rank [GiB]; None: not considered.
    """

    name: str
    kind: str
    ranks: int
    flops: float
    gpu: Gpu | None = None
    memory: float | None = None

    @classmethod
    def of_gpus(cls, gpu: Gpu, number: int, *, memory: float | None = None) -> Machine:
        """A number of devices, in bf16.

        Args:
            gpu: figures of the device.
            number: of devices.
            memory: of each [GiB]; None: the device's.
        """
        return cls(f"{number} x {gpu.name}", "gpu", number, gpu.bf16, gpu, memory or gpu.memory)

    def tokens_per_second(self, active: int) -> float:
        """Training tokens per second for a number of active parameters: 6 FLOPs each (arXiv 2001.08361)."""
        return self.ranks * min(REACHED[self.kind] * self.flops / (6 * active), MOST_PER_RANK[self.kind])
