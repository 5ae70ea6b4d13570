"""Weights of training documents: which ones a run excludes, and which ones it repeats.

`mmscale data dedup` and `data select` write them next to a prepared data set, whose tokens are unchanged. Each of the
two commands writes a layer; a document's weight is the product over the layers. In an epoch the sampler reads a
document as often as its weight, rounded up or down (`copies`). This module stores and reads weights. No torch.

D documents of the training split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from mmscale.data.arrays import read_array, scattered
from mmscale.data.digests import digest_of
from mmscale.data.prepared.folder_lock import held
from mmscale.data.prepared.made_for import MadeFor, read_made_for
from mmscale.data.prepared.manifest import Count, Inside, Manifest, Part, map_table
from mmscale.errors import DataError
from mmscale.runtime.atomic_files import publish, sync, temporary_for, write_atomic

FOLDER = "selection"
SCORES = "scores"  # folder of the scores from which weights are computed
FILE = f"{FOLDER}/selection.json"
MOST_WEIGHT = 64.0  # largest number of copies of a document in an epoch; more is probably a mistake of units
_FORMAT = 1
_MOST_BYTES = 1 << 24
_CHUNK = 1 << 20  # documents that are processed at once
_KEY = 12  # characters of a digest in the name of a file


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Layer(_Entry):
    """The weights that one command has written.

    Attributes:
        name: of the command.
        file: float32 [D] or bool [D], relative to the data set's folder.
        digest: of the file, as in digests.json.
        made: arguments of the command, for people.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    file: Inside
    digest: str
    made: dict[str, Any] = {}

    @property
    def key(self) -> str:
        """Its name and the digest of its content."""
        return f"{self.name}-{self.digest[:_KEY]}"


class SelectionFile(MadeFor):
    """The content of selection/selection.json.

    Attributes:
        of: identity of the documents that the weights are for.
        documents: D.
        layers: in the order of their names.
        kept: documents with a weight above 0.
        copies: sum of the weights, which is the mean number of documents of an epoch.
        tokens: mean number of tokens of an epoch, by modality.
    """

    documents: Count
    layers: tuple[Layer, ...]
    kept: Count
    copies: float
    tokens: dict[str, float]

    @property
    def identity(self) -> str:
        """Identifies the weights by their content: the keys of the layers."""
        return "+".join(layer.key for layer in self.layers)

    def share(self) -> dict[str, float]:
        """Share of each modality in the tokens of an epoch."""
        total = sum(self.tokens.values())
        return {name: count / total if total else 0.0 for name, count in self.tokens.items()}


def read_selection(folder: Path, *, of: str | None = None) -> SelectionFile | None:
    """The selection of a data set; None if it has none.

    Args:
        folder: the data set.
        of: identity of its training documents; None: not compared.

    Raises:
        DataError: it is damaged, of another version, or was made for other documents.
    """
    found = read_made_for(
        SelectionFile, folder / FILE, version=_FORMAT, most=_MOST_BYTES, of=of, remedy=_remedy(folder)
    )
    return found if found is not None and found.layers else None


def _remedy(folder: Path) -> str:
    return (
        f"remove {folder / FOLDER} and run `mmscale data dedup` or `data select` again; or train on all documents with "
        "data.selection=ignore"
    )


class DocumentWeights:
    """The weights of the documents of a split, in mapped files.

    Args:
        folder: the data set.
        identity: `SelectionFile.identity`. Files of replaced selections are kept, so that a run that has used them
            finds its position.
        documents: D.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, identity: str, *, documents: int) -> None:
        self.identity = identity
        self._folder, self._documents = folder, documents
        self._layers = self._open()

    def _open(self) -> list[NDArray[Any]]:
        found = []
        for key in self.identity.split("+"):
            file = self._folder / FOLDER / f"{key}.npy"
            try:
                weights = read_array(file, mapped=True)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"data: the weights of documents {file} cannot be read: {error}",
                    remedy="copy the file again; or start a run of another name",
                ) from error
            if weights.shape != (self._documents,) or weights.dtype not in (np.float32, np.bool_):
                raise DataError(
                    f"data: {file} has {weights.dtype} of shape {weights.shape}, not weights of {self._documents} "
                    "documents",
                    remedy=_remedy(self._folder),
                )
            found.append(weights)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """All attributes except the maps, for worker processes that do not fork."""
        return {**self.__dict__, "_layers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._layers = self._open()

    def weights(self, documents: NDArray[np.integer] | slice) -> NDArray[np.float64]:
        """Weights of some documents, float64 [n].

        Raises:
            DataError: a value is not a valid weight.
        """
        product = np.asarray(1.0)
        for layer in self._layers:
            product = product * layer[documents].astype(np.float64)
        found = np.atleast_1d(product)
        if not ((found >= 0.0) & (found <= MOST_WEIGHT)).all():
            raise DataError(
                f"data: the weights in {self._folder / FOLDER} are not all numbers from 0 to {MOST_WEIGHT:g}",
                remedy=_remedy(self._folder),
            )
        return found

    def repeated(self, documents: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The documents in their order, each as often as the epoch reads it."""
        return np.repeat(documents, copies(self.weights(documents), documents, epoch))


def copies(weights: NDArray[np.float64], documents: NDArray[np.integer], epoch: int) -> NDArray[np.int64]:
    """How often an epoch reads each document, int64 [n]; a pure function of the arguments.

    After E epochs a document was read E * weight times, up to a difference of one. Each document has a random offset in
    [0, 1), so that documents with the same fractional weight do not all occur in the same epoch.

    Args:
        weights: of the documents [n].
        documents: their numbers [n].
        epoch: number of the epoch.
    """
    # 32 bits, so that sums with integer weights are exact and weight 1 means exactly once.
    offset = (scattered(documents.astype(np.uint64)) >> np.uint64(32)).astype(np.float64) / 2.0**32
    return (np.floor((epoch + 1) * weights + offset) - np.floor(epoch * weights + offset)).astype(np.int64)


# ------------------------------------------------------------------------------------------------- writing


def write_layer(
    folder: Path,
    manifest: Manifest,
    parts: Sequence[Part],
    weights: NDArray[Any],
    *,
    name: str,
    of: str,
    made: Mapping[str, Any],
) -> SelectionFile:
    """Write the weights of one command, atomically; the layers of other commands are kept.

    Args:
        folder: the data set.
        manifest: its manifest.
        parts: of its training split that have documents.
        weights: bool [D] or float32 [D].
        name: of the layer, which is replaced.
        of: identity of the documents.
        made: arguments of the command.

    Raises:
        DataError: no document would be left, or a value is not a valid weight.
    """
    assert weights.dtype in (np.bool_, np.float32)
    (folder / FOLDER).mkdir(exist_ok=True)
    temporary = temporary_for(folder / FOLDER / f"{name}.npy")
    with held(folder):  # another command may write its layer at the same time, and `prepare` removes temporary files
        try:
            with temporary.open("wb") as stream:
                np.lib.format.write_array(stream, weights, allow_pickle=False)
                sync(stream)
            digest = digest_of(temporary)
            assert digest is not None
            layer = Layer(name=name, file=f"{FOLDER}/{name}-{digest[:_KEY]}.npy", digest=digest, made=dict(made))
            known = (folder / layer.file).exists()
            publish([(temporary, folder / layer.file)])
        finally:
            temporary.unlink(missing_ok=True)
        try:
            return _publish(folder, manifest, parts, {**_layers(folder, of), name: layer}, of=of)
        except DataError:
            if not known:
                (folder / layer.file).unlink()
            raise


def remove_layer(folder: Path, manifest: Manifest, parts: Sequence[Part], *, name: str, of: str) -> bool:
    """Stop applying the weights of one command; its file is kept, because a run may need it.

    Args:
        folder: the data set.
        manifest: of it.
        parts: of its training split.
        name: of the command's layer, such as `dedup`.
        of: identity of the training documents.

    Returns:
        Whether there were any.

    Raises:
        DataError: the selection is damaged.
    """
    with held(folder):
        layers = _layers(folder, of)
        if layers.pop(name, None) is None:
            return False
        _publish(folder, manifest, parts, layers, of=of)
        return True


def _layers(folder: Path, of: str) -> dict[str, Layer]:
    """The layers that are still valid; those for other documents are dropped."""
    before = read_selection(folder)
    return {layer.name: layer for layer in before.layers} if before is not None and before.of == of else {}


def _publish(
    folder: Path, manifest: Manifest, parts: Sequence[Part], layers: Mapping[str, Layer], *, of: str
) -> SelectionFile:
    documents = sum(part.documents for part in parts)
    listed = tuple(layers[name] for name in sorted(layers))
    selection = DocumentWeights(folder, "+".join(one.key for one in listed), documents=documents) if listed else None
    kept, total, tokens = 0, 0.0, np.zeros(len(manifest.modalities))
    start = 0
    for part in parts:
        table = map_table(folder, part)
        for begin in range(0, part.documents, _CHUNK):
            rows = table[begin : begin + _CHUNK, :-1]
            if selection is None:
                weights = np.ones(len(rows))
            else:
                weights = selection.weights(slice(start + begin, start + begin + len(rows)))
            kept += int((weights > 0.0).sum())
            total += float(weights.sum())
            tokens += weights @ rows
        start += part.documents
    if not kept:
        raise DataError(
            f"data: no document of {folder} would be left ({', '.join(layers)})",
            remedy="keep more of them; what was there before is unchanged",
        )
    content = SelectionFile(
        format=_FORMAT,
        of=of,
        documents=documents,
        layers=listed,
        kept=kept,
        copies=total,
        tokens=dict(zip(manifest.modalities, tokens.tolist(), strict=True)),
    )
    write_atomic(folder / FILE, (content.model_dump_json(indent=1) + "\n").encode())
    return content


def digests_of(folder: Path) -> dict[str, str]:
    """Digests of the files of weights in use by their paths relative to the folder; empty without a selection.

    Raises:
        DataError: the selection is damaged.
    """
    found = read_selection(folder)
    return {} if found is None else {layer.file: layer.digest for layer in found.layers}
