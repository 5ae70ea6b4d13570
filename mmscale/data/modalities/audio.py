"""Short recordings as a modality: WAV files, a k-means codebook of log-mel frames, decoded by Griffin-Lim.

`convert to-hf` copies this file next to the weights, so it imports nothing of this package, and only NumPy.

Letters: n recordings, S samples, F frames, M mel bands, T tokens of a recording, K codes, D numbers of a code.
"""

from __future__ import annotations

import hashlib
import io
import json
import wave
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

MOST_SECONDS = 600  # longer files are refused before they are read
_WINDOW_S, _HOP_S = 0.04, 0.01  # of the short-time Fourier transform [s]
# A recording with a lower peak is silence: levels are relative to the peak and would amplify noise.
_QUIETEST_PEAK_DB = -40.0
_FLOOR_DB, _STEPS = -80.0, 255  # a band's level is an integer number of steps above the floor, relative to the peak
_LOUD = 0.02  # sound begins at this share of the peak; silence before it is cut off
_ROUNDS = 32  # iterations of Griffin-Lim
_RECORDINGS, _LONGER, _LOST = "recordings", "longer", "lost"  # keys of the tally of read recordings
_SETTINGS, _CODEBOOK = "audio_tokenizer.json", "codebook.npy"


@dataclass(frozen=True)
class AudioSettings:
    """Settings of the tokenizer (`data.prepare.modalities.audio`).

    Attributes:
        rate: samples per second; recordings are resampled.
        seconds: length of every recording; shorter ones are padded with silence, longer ones are cut off.
        bands: mel bands of a frame.
        frames: frames of 10 ms that together become one token.
        fit_items: recordings that the codebook is fitted to, at most.
    """

    rate: int = 8000
    seconds: float = 0.8
    bands: int = 32
    frames: int = 2
    fit_items: int = 4000

    def __post_init__(self) -> None:
        """Refuse invalid settings."""
        for name, least, most in (
            ("rate", 2000, 48000),
            ("bands", 4, 256),
            ("frames", 1, 100),
            ("fit_items", 1, 10**7),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most}")
        if not isinstance(self.seconds, int | float) or not self.frames * _HOP_S <= self.seconds <= MOST_SECONDS:
            raise ValueError(f"seconds is {self.seconds!r}, not from {self.frames * _HOP_S:g} to {MOST_SECONDS}")


class AudioCodec:
    """A tokenizer: a token is the nearest entry of a codebook for every `frames` frames.

    Frames are integers, so for given frames the codes do not depend on the machine.

    Args:
        settings: of the frames.
        codebook_KD: uint8 [K, frames*bands].
    """

    kind = "mel-kmeans"

    def __init__(self, settings: AudioSettings, codebook_KD: NDArray[np.uint8]) -> None:
        if codebook_KD.dtype != np.uint8 or codebook_KD.ndim != 2:
            raise ValueError("the codebook is no table of bytes")
        if codebook_KD.shape[1] != settings.frames * settings.bands or not len(codebook_KD):
            raise ValueError(f"the codebook has shape {codebook_KD.shape}, which its settings have not")
        self.settings, self.codebook_KD = settings, codebook_KD
        self.rate = settings.rate
        self.hop, self.window = round(settings.rate * _HOP_S), round(settings.rate * _WINDOW_S)
        self._bands = mel_bands(settings.rate, self.window, settings.bands)

    @property
    def vocab_size(self) -> int:
        """Entries of the codebook."""
        return len(self.codebook_KD)

    @property
    def tokens_per_item(self) -> int:
        """Tokens of a recording."""
        return max(1, int(self.settings.seconds / (self.settings.frames * _HOP_S) + 1e-6))

    @property
    def samples(self) -> int:
        """Samples of a recording."""
        return self.tokens_per_item * self.settings.frames * self.hop

    def features(self, items_nS: NDArray[Any]) -> NDArray[np.uint8]:
        """Recordings float [n, S] to blocks of frames uint8 [n * T, D]."""
        n = len(items_nS)
        power_nFM = np.abs(spectra(items_nS, self.window, self.hop)) ** 2 @ self._bands.T
        decibels = 10 * np.log10(power_nFM + 1e-12)
        peak = np.maximum(decibels.max(axis=(1, 2), keepdims=True), _QUIETEST_PEAK_DB)
        steps = np.rint((decibels - peak - _FLOOR_DB) * (_STEPS / -_FLOOR_DB))
        return np.clip(steps, 0, _STEPS).astype(np.uint8).reshape(n * self.tokens_per_item, -1)

    def encode(self, items: NDArray[Any]) -> NDArray[np.int64]:
        """Recordings float [n, S] to codes int64 [n, T]; of two equal distances the lower code wins."""
        blocks = self.features(items).astype(np.float64)
        book = self.codebook_KD.astype(np.float64)
        norm = (book**2).sum(axis=1)
        found = [np.argmin(norm - 2 * (blocks[at : at + 4096] @ book.T), axis=1) for at in range(0, len(blocks), 4096)]
        return np.concatenate(found).astype(np.int64).reshape(len(items), self.tokens_per_item)

    def decode(self, codes_nT: NDArray[np.integer]) -> NDArray[np.float32]:
        """Codes int [n, T] to recordings float32 [n, S], -1..1: Griffin and Lim 1984, from a phase of zero."""
        steps = self.codebook_KD[np.asarray(codes_nT)].reshape(len(codes_nT), -1, self.settings.bands)
        power = 10 ** ((steps.astype(np.float64) * (-_FLOOR_DB / _STEPS) + _FLOOR_DB) / 10)
        power[steps == 0] = 0.0
        magnitude = np.sqrt(np.maximum(power @ np.linalg.pinv(self._bands).T, 0.0))
        waves = waves_of(magnitude, self.window, self.hop)
        for _ in range(_ROUNDS):
            phase = np.exp(1j * np.angle(spectra(waves, self.window, self.hop)))
            waves = waves_of(magnitude * phase, self.window, self.hop)
        loudest = np.abs(waves).max(axis=1, keepdims=True)
        found: NDArray[np.float32] = (0.9 * waves / np.maximum(loudest, 1e-9)).astype(np.float32)
        return found

    def fingerprint(self) -> str:
        """Hash of the settings and the codebook."""
        content = json.dumps([self.kind, _of_codes(self.settings)]).encode() + self.codebook_KD.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the settings and the codebook."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _SETTINGS).write_text(json.dumps({"kind": self.kind, **asdict(self.settings)}, indent=1) + "\n")
        content = io.BytesIO()
        np.save(content, self.codebook_KD)
        (folder / _CODEBOOK).write_bytes(content.getvalue())


class AudioModality:
    """Recordings of one length; settings are `AudioSettings`."""

    name: ClassVar[str] = "audio"
    plural: ClassVar[str] = "recordings"
    suffixes: ClassVar[tuple[str, ...]] = ("wav",)
    written: ClassVar[str] = ".wav"
    files: ClassVar[tuple[str, ...]] = (_SETTINGS, _CODEBOOK)
    shipped: ClassVar[bool] = True

    @staticmethod
    def check(settings: Any, prepare: Any, codes: int) -> None:
        """Refuse settings that `fit` would refuse, without recordings.

        Raises:
            ValueError: a setting is unknown or does not fit.
        """
        _settings(settings)

    @staticmethod
    def fit(settings: Any, items: Any, codes: int, report: Any) -> AudioCodec | None:
        """A codebook of the frames of training recordings.

        Args:
            settings: as in `AudioSettings`.
            items: a `Sample`.
            codes: entries at most.
            report: a `Report`.

        Raises:
            ValueError: a setting is unknown or does not fit.
        """
        own = _settings(settings)
        blank = AudioCodec(own, np.zeros((1, own.frames * own.bands), np.uint8))
        report.on_progress("reading recordings")
        read = list(items.values("train", own.fit_items, lambda source: AudioModality.read(source, blank)))
        if not read:
            return None
        blocks = np.concatenate([blank.features(one[None]) for one in read])
        return AudioCodec(own, items.codebook(blocks, codes, report))

    @staticmethod
    def load(folder: Path) -> AudioCodec:
        """Read a tokenizer that `AudioCodec.save` wrote.

        Raises:
            ValueError: the folder has a tokenizer of another kind.
        """
        held = json.loads((folder / _SETTINGS).read_text())  # noqa: TID251  the table has looked at it
        if held.pop("kind") != AudioCodec.kind:
            raise ValueError(f"{folder / _SETTINGS} is of another kind")
        return AudioCodec(AudioSettings(**held), np.load(folder / _CODEBOOK, allow_pickle=False))

    @staticmethod
    def read(source: Any, codec: AudioCodec) -> NDArray[np.float32]:
        """Samples float32 [S], -1..1, of a WAV file, its bytes, or samples at the codec's rate.

        Channels are averaged, silence at the beginning is cut off, and the loudest sample becomes 0.9.
        """
        return AudioModality.read_counted(source, codec, {})

    @staticmethod
    def read_counted(source: Any, codec: AudioCodec, tally: dict[str, float]) -> NDArray[np.float32]:
        """As `read`; adds to a tally how many recordings are longer than an item, and the share that they lose.

        Args:
            source: as for `read`.
            codec: gives the rate and the number of samples.
            tally: counts by name, changed in place.

        Raises:
            ValueError: the recording cannot be read, or has samples that are not finite.
        """
        if isinstance(source, np.ndarray):
            samples = source.astype(np.float64).reshape(-1)
        else:
            samples = _resampled(*_read_wav(source), codec.rate)
        if not np.isfinite(samples).all():
            raise ValueError("it has samples that are no numbers")
        peak = float(np.abs(samples).max(initial=0.0))
        if peak:
            heard = np.flatnonzero(np.abs(samples) >= _LOUD * peak)
            samples = samples[heard[0] :] * (0.9 / peak)
        lost = max(0.0, 1.0 - codec.samples / max(1, len(samples)))
        for key, amount in ((_RECORDINGS, 1.0), (_LONGER, float(lost > 0.0)), (_LOST, lost)):
            tally[key] = tally.get(key, 0.0) + amount
        found = np.zeros(codec.samples, np.float32)
        found[: min(len(samples), codec.samples)] = samples[: codec.samples]
        return found

    @staticmethod
    def remarks(tally: Mapping[str, float], codec: AudioCodec) -> list[str]:
        """A sentence about recordings that were longer than the setting."""
        longer = int(tally.get(_LONGER, 0))
        if not longer:
            return []
        return [
            f"{longer:,} of {int(tally[_RECORDINGS]):,} recordings {'is' if longer == 1 else 'are'} longer than "
            f"{codec.settings.seconds:g} s: the end is cut off, {tally[_LOST] / longer:.0%} of their length on average "
            "(data.prepare.modalities.audio.seconds)"
        ]

    @staticmethod
    def write(values: NDArray[Any], file: Path, codec: AudioCodec) -> None:
        """Write samples as a WAV file of 16 bits."""
        content = io.BytesIO()
        with wave.open(content, "wb") as opened:
            opened.setnchannels(1)
            opened.setsampwidth(2)
            opened.setframerate(codec.rate)
            opened.writeframes(np.rint(np.clip(values, -1, 1) * 32767).astype("<i2").tobytes())
        Path(file).write_bytes(content.getvalue())

    @staticmethod
    def picture(values: NDArray[Any], codec: AudioCodec) -> NDArray[np.uint8]:
        """The levels of its bands over time, low bands at the bottom, uint8 [bands, frames, 1]."""
        frames = codec.features(np.asarray(values)[None]).reshape(-1, codec.settings.bands)
        return np.ascontiguousarray(frames.T[::-1, :, None])

    @staticmethod
    def quality(codec: AudioCodec, items: NDArray[Any]) -> dict[str, Any]:
        """Root mean square error of the bands [dB], and the number of codes in use."""
        codes = codec.encode(items)
        lost = codec.features(items).astype(np.float64) - codec.codebook_KD[codes.reshape(-1)]
        error = round(float(np.sqrt(np.mean(lost**2)) * (-_FLOOR_DB / _STEPS)), 3)
        used = len(np.unique(codes))
        return {"recordings": len(items), "codes_used": used, "error_db": error, "said": f"error {error} dB"}


def _settings(given: Mapping[str, Any]) -> AudioSettings:
    """The settings; raises ValueError if one is unknown or does not fit."""
    known = [field.name for field in fields(AudioSettings)]
    for name in given:
        if name not in known:
            raise ValueError(f"there is no setting {name!r}, only {', '.join(known)}")
    return AudioSettings(**given)


def _of_codes(settings: AudioSettings) -> dict[str, Any]:
    """The settings that affect codes."""
    return {name: value for name, value in asdict(settings).items() if name != "fit_items"}


def mel_bands(rate: int, window: int, bands: int) -> NDArray[np.float64]:
    """Weights [bands, window // 2 + 1] of triangles of equal width on the mel scale (O'Shaughnessy 1987)."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(window, 1 / rate)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    weights: NDArray[np.float64] = np.maximum(0, np.minimum(rising, falling))
    # A low band may lie between two bins of the transform; it gets the nearest bin.
    for band in np.flatnonzero(weights.sum(axis=1) == 0):
        weights[band, np.abs(bins - edges[band + 1]).argmin()] = 1.0
    return weights


def spectra(waves_nS: NDArray[Any], window: int, hop: int) -> NDArray[np.complex128]:
    """Short-time Fourier transform [n, S // hop, window // 2 + 1]; frame f is centred on the hop f."""
    left = (window - hop) // 2
    padded = np.pad(waves_nS.astype(np.float64), ((0, 0), (left, window)))
    starts = np.arange(waves_nS.shape[1] // hop) * hop
    frames = padded[:, starts[:, None] + np.arange(window)]
    return np.fft.rfft(frames * _hann(window), axis=-1)


def waves_of(spectra_nFB: NDArray[Any], window: int, hop: int) -> NDArray[np.float64]:
    """Waves [n, frames * hop] with the least squared distance to given spectra."""
    n, count = spectra_nFB.shape[:2]
    frames = np.fft.irfft(spectra_nFB, n=window, axis=-1) * _hann(window)
    total = np.zeros((n, count * hop + window))
    weight = np.zeros(count * hop + window)
    for frame in range(count):
        total[:, frame * hop : frame * hop + window] += frames[:, frame]
        weight[frame * hop : frame * hop + window] += _hann(window) ** 2
    left = (window - hop) // 2
    found: NDArray[np.float64] = (total / np.maximum(weight, 1e-3))[:, left : left + count * hop]
    return found


def _hann(window: int) -> NDArray[np.float64]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)


def _read_wav(source: Path | bytes) -> tuple[NDArray[np.float64], int]:
    """Samples -1..1, averaged over channels, and their rate [Hz]."""
    try:
        with wave.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), "rb") as opened:
            rate, count, channels, width = (
                opened.getframerate(),
                opened.getnframes(),
                opened.getnchannels(),
                opened.getsampwidth(),
            )
            if not 1 <= rate <= 400_000 or count > MOST_SECONDS * rate or not 1 <= channels <= 64:
                raise ValueError(f"it has {count} samples at {rate} Hz in {channels} channels: too many")
            content = opened.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"it is no WAV file of whole numbers: {error or 'it ends early'}") from error
    if width == 1:
        samples = (np.frombuffer(content, np.uint8).astype(np.float64) - 128) / 128
    elif width in (2, 3, 4):
        raw = np.frombuffer(content[: len(content) // width * width], np.uint8).reshape(-1, width)
        wide = np.zeros((len(raw), 4), np.uint8)
        wide[:, 4 - width :] = raw  # fill the high bytes of little-endian integers
        samples = wide.view("<i4")[:, 0] / 2.0**31
    else:
        raise ValueError(f"it has samples of {width} bytes")
    whole = samples[: len(samples) // channels * channels].reshape(-1, channels)
    return whole.mean(axis=1), rate


def _resampled(samples: NDArray[np.float64], rate: int, wanted: int) -> NDArray[np.float64]:
    """The same sound at another rate, through its Fourier transform."""
    if rate == wanted or not len(samples):
        return samples
    count = max(1, round(len(samples) * wanted / rate))
    bins = np.fft.rfft(samples)[: count // 2 + 1]
    found: NDArray[np.float64] = np.fft.irfft(bins, n=count) * (count / len(samples))
    return found


__all__ = ["AudioCodec", "AudioModality", "AudioSettings"]
