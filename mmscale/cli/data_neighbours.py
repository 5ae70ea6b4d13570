"""`mmscale data retrieve`: finds the neighbours of the documents of a prepared data set; calls data/retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmscale.cli.data_weights import DataSet, Workers
from mmscale.cli.output import Json, emit, pairs
from mmscale.errors import UsageError
from mmscale.runtime.activity import report_activity


def retrieve(
    folder: DataSet,
    columns: Annotated[
        int, typer.Option("--neighbours", metavar="K", min=1, max=64, help="Neighbours of each document.")
    ] = 8,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            metavar="FILE.npy",
            show_default=False,
            help="Embeddings, a row for each training document. Default: TF-IDF of text and image tokens, reduced by "
            "an SVD.",
        ),
    ] = None,
    held_out_embeddings: Annotated[
        Path | None,
        typer.Option(
            "--held-out-embeddings",
            metavar="FILE.npy",
            show_default=False,
            help="Embeddings by the same model, a row for each held-out document.",
        ),
    ] = None,
    similarity: Annotated[
        float,
        typer.Option(
            "--most-similar",
            min=0.0,
            max=0.9,
            help="Largest cosine similarity between a document and its neighbour, and between two neighbours.",
        ),
    ] = 0.9,
    dropout: Annotated[
        float,
        typer.Option(
            "--dropout",
            min=0.0,
            max=0.9,
            help="Share of a document's tokens that are ignored when its neighbours are searched. Embeddings that are "
            "given are used as they are.",
        ),
    ] = 0.2,
    dimensions: Annotated[int, typer.Option("--dimensions", min=1, help="Dimensions of the SVD, per modality.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, max=(1 << 24) - 1, help="Seed of dropout and SVD.")] = 0,
    workers: Workers = 2,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove the neighbours, so that documents are read alone.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the training documents that are nearest to each training and held-out document.

    Training places some of them before the document (data.retrieval). Duplicates of a document, by the rule of `data
    dedup`, are not its neighbours. Documents with held-out content, or left out of training, are not neighbours of any
    document.
    """
    from mmscale.data.prepared.neighbours import remove_neighbours
    from mmscale.data.progress import Reporter
    from mmscale.data.retrieval.request import RetrievalRequest, check_request

    if remove:
        removed = {"folder": str(folder), "removed": remove_neighbours(folder)}
        words = "has no neighbours any more" if removed["removed"] else "had no neighbours"
        emit(removed, as_json=as_json, text=lambda: pairs([("data set", words)]))
        return
    request = RetrievalRequest(
        columns=columns,
        most_similar=similarity,
        embeddings=embeddings,
        held_out_embeddings=held_out_embeddings,
        dropout=dropout,
        dimensions=dimensions,
        seed=seed,
    )
    check_request(folder, request)
    with report_activity("loading torch", enabled=not as_json):
        from mmscale.data.retrieval.retrieve import retrieve as find_neighbours
    result = find_neighbours(folder, request, workers=workers, reporter=Reporter(enabled=not as_json))
    emit(result, as_json=as_json, text=lambda: _found(result))


def given_neighbours(text: str) -> int | Literal["random"]:
    """The value of `--neighbours` of `mmscale eval`: a number, or the word "random".

    Raises:
        UsageError: it is neither.
    """
    if text != "random" and not text.isdecimal():
        raise UsageError(f"--neighbours {text!r} is no number", remedy="give a number, e.g. 2, or random")
    return int(text) if text.isdecimal() else "random"


def _found(result: dict[str, Any]) -> None:
    rows: list[tuple[str, object]] = [
        ("data set", result["folder"]),
        ("may be neighbours", f"{result['allowed']:,} of {result['documents']:,} documents"),
    ]
    for split, own in result["found"].items():
        nearest = (
            "" if own["nearest"] is None else f"; the nearest has a similarity of {own['nearest']:.3f} in the mean"
        )
        rows.append(
            (
                split,
                f"{own['with_neighbours']:,} of {own['documents']:,} documents have neighbours, "
                f"{own['neighbours']:.2f} in the mean{nearest}",
            )
        )
    pairs(rows)
