"""Patches of images: cutting, clustering, comparison with a codebook. Arrays only.

image_tokens.py converts them to codes. Letters: n images, H W C height, width, channels, N patches, K entries of a
codebook, D numbers of a patch. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 4096  # patches compared with the codebook at a time: 4096 x 4096 float32 distances are 64 MB

Pixels = NDArray[np.uint8]
Codes = NDArray[np.int64]


class Book:
    """A codebook, prepared for comparisons with any number of patches.

    Args:
        entries_KD: integers, each -255..255.
    """

    def __init__(self, entries_KD: NDArray[np.integer]) -> None:
        # With signs, sums reach 3 * D * 255^2; float32 represents integers exactly up to 2^24.
        self._exact: type[np.floating] = np.float32 if 3 * entries_KD.shape[1] * 255**2 < 2**24 else np.float64
        self._entries_KD: NDArray[np.floating] = entries_KD.astype(self._exact)
        self._norm_K = (self._entries_KD**2).sum(axis=1)

    def nearest(self, patches_ND: NDArray[np.integer]) -> Codes:
        """Index of each patch's nearest entry, int64 [N]; of two equal distances the lower index wins.

        Args:
            patches_ND: integers, each -255..255.
        """
        codes = np.empty(len(patches_ND), dtype=np.int64)
        for start in range(0, len(patches_ND), _CHUNK):
            chunk_ND: NDArray[np.floating] = patches_ND[start : start + _CHUNK].astype(self._exact)
            codes[start : start + _CHUNK] = np.argmin(self._norm_K - 2 * (chunk_ND @ self._entries_KD.T), axis=1)
        return codes


def silent(detail: str) -> None:
    """Ignores the progress of `cluster`."""


def cluster(
    distinct_ND: NDArray[np.integer],
    counts_N: NDArray[np.int64],
    codes: int,
    *,
    on_progress: Callable[[str], None] = silent,
) -> NDArray[np.float32]:
    """Centres [codes, D] of distinct patches with weights.

    `on_progress` is called before each start of k-means++ and after each step; with 8,192 codes a start takes minutes.

    Clustering distinct patches with weights is faster: augmented digits have 18 thousand distinct ones of 240 thousand,
    which take 0.2 s instead of 1.5 s, with the same PSNR (24.0 dB held out). Reassigning rarely used centres,
    scikit-learn's default, would cost 0.3 dB.
    """
    # scikit-learn takes most of a second to import; only the fitting process needs it.
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    # scikit-learn has no public callback. The two overridden methods only count and change no result.
    class Telling(MiniBatchKMeans):
        starts = 0

        def _init_centroids(self, *args: Any, **kwargs: Any) -> Any:
            self.starts += 1
            on_progress(f"k-means start {self.starts} of {self.n_init}")
            return super()._init_centroids(*args, **kwargs)

        def _mini_batch_convergence(self, step: int, n_steps: int, *args: Any) -> Any:
            on_progress(f"k-means step {step + 1} of {n_steps}")
            return super()._mini_batch_convergence(step, n_steps, *args)

    kmeans = Telling(
        n_clusters=codes, batch_size=max(4096, 2 * codes), max_iter=10, n_init=3, random_state=0, reassignment_ratio=0
    )
    with threadpool_limits(1):  # fixes the order of sums; also, spinning OpenMP threads are slow on busy machines
        centres_KD: NDArray[np.float32] = kmeans.fit(
            distinct_ND.astype(np.float32), sample_weight=counts_N
        ).cluster_centers_
    return centres_KD


def codebook(vectors_ND: Pixels, codes: int, *, on_progress: Callable[[str], None] = silent) -> Pixels:
    """A k-means codebook of bytes; the distinct vectors themselves if there are at most `codes`.

    Args:
        vectors_ND: uint8 [N, D], at least one.
        codes: entries at most.
        on_progress: receives the progress of k-means.

    Returns:
        uint8 [K, D], from dark to bright, so that neighbouring codes look alike in plots.
    """
    distinct, counts = np.unique(vectors_ND, axis=0, return_counts=True)
    if len(distinct) > codes:
        centres = np.rint(cluster(distinct, counts, codes, on_progress=on_progress)).clip(0, 255).astype(np.uint8)
        distinct = np.unique(centres, axis=0)
    order = np.argsort(distinct.sum(axis=1, dtype=np.int64), kind="stable")
    return np.ascontiguousarray(distinct[order])


def to_patches(images_nHWC: Pixels, patch: int) -> Pixels:
    """Images uint8 [n, H, W, C] to patches uint8 [n * rows * columns, patch*patch*C], row by row."""
    n, height, width, channels = images_nHWC.shape
    rows, columns = height // patch, width // patch
    blocks: Pixels = images_nHWC.reshape(n, rows, patch, columns, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    patches: Pixels = blocks.reshape(n * rows * columns, patch * patch * channels)
    return patches


def from_patches(patches_nTD: Pixels, patch: int, *, grid: tuple[int, int]) -> Pixels:
    """Images uint8 [n, H, W, C] from their patches uint8 [n, rows * columns, patch*patch*C], row by row."""
    n, (rows, columns), channels = len(patches_nTD), grid, patches_nTD.shape[-1] // patch**2
    blocks = patches_nTD.reshape(n, rows, columns, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    images: Pixels = blocks.reshape(n, rows * patch, columns * patch, channels)
    return images
