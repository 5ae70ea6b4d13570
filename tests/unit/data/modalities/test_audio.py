# mmscale/data/modalities/audio.py: WAV files of every kind, codes, the way back; the file ships with exports as it is.
"""Tests of the audio modality."""

from __future__ import annotations

import ast
import io
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmscale.data.documents.schema import Item
from mmscale.data.modalities import audio
from mmscale.data.modalities.audio import AudioCodec, AudioModality, AudioSettings
from mmscale.data.modalities.modality import Report, Sample
from mmscale.data.modalities.table import load_codec, read_item, remarks
from mmscale.errors import DataError

SETTINGS = AudioSettings(rate=8000, seconds=0.4, bands=16, frames=2)


def tone(frequency: float, *, rate: int = 8000, seconds: float = 0.4) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def wav(samples: NDArray[Any], *, rate: int = 8000, width: int = 2, channels: int = 1) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(width)
        opened.setframerate(rate)
        numbers = np.repeat(np.rint(samples * (2 ** (8 * width - 1) - 1)).astype("<i8"), channels)
        raw = (numbers + 128 if width == 1 else numbers).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
        opened.writeframes(raw.tobytes())
    return content.getvalue()


def codec() -> AudioCodec:
    """Fitted to three tones."""
    blank = AudioCodec(SETTINGS, np.zeros((1, 32), np.uint8))
    items = np.stack([AudioModality.read(tone(frequency), blank) for frequency in (300.0, 900.0, 2500.0)])
    return AudioCodec(SETTINGS, Sample.codebook(blank.features(items), 24, Report(print, print)))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("rate", "channels"), [(8000, 1), (22050, 1), (44100, 2)])
def test_files_of_every_width_and_rate(width: int, rate: int, channels: int) -> None:
    own = codec()
    want = AudioModality.read(tone(440.0), own)
    got = AudioModality.read(wav(tone(440.0, rate=rate), rate=rate, width=width, channels=channels), own)
    assert got.shape == want.shape == (3200,) and np.abs(want).max() == pytest.approx(0.9)
    assert np.corrcoef(got[200:2800], want[200:2800])[0, 1] > 0.95


def test_codes_and_back(tmp_path: Path) -> None:
    """Tones keep their pitch through codes and a file; the same samples have the same codes."""
    own = codec()
    assert own.tokens_per_item == 20 and own.vocab_size <= 24
    for frequency in (300.0, 900.0, 2500.0):
        codes = own.encode(AudioModality.read(tone(frequency), own)[None])
        assert codes.shape == (1, 20) and codes.dtype == np.int64
        made = own.decode(codes)[0]
        AudioModality.write(made, tmp_path / "made.wav", own)
        again = AudioModality.read(tmp_path / "made.wav", own)
        spectrum = np.abs(np.fft.rfft(again * np.hanning(len(again))))
        heard = np.fft.rfftfreq(len(again), 1 / 8000)[spectrum.argmax()]
        assert heard == pytest.approx(frequency, rel=0.15)
    assert AudioModality.picture(made, own).shape == (16, 40, 1)


def test_fit_and_load(tmp_path: Path) -> None:
    own = codec()
    own.save(tmp_path / "audio_tokenizer")
    loaded = load_codec("audio", tmp_path / "audio_tokenizer")
    assert loaded.fingerprint() == own.fingerprint()
    assert sorted(path.name for path in (tmp_path / "audio_tokenizer").iterdir()) == sorted(AudioModality.files)
    measured = AudioModality.quality(own, np.stack([AudioModality.read(tone(300.0), own)]))
    assert 0 <= measured["error_db"] < 3 and measured["codes_used"] >= 1
    for name in AudioModality.files:
        damaged = tmp_path / "audio_tokenizer" / name
        content = damaged.read_bytes()
        damaged.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"audio tokenizer: .* cannot be read"):
            load_codec("audio", tmp_path / "audio_tokenizer")
        damaged.write_bytes(content)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"RIFF", "no WAV file"),
        (b"", "no WAV file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "no WAV file"),
        (wav(tone(440.0))[:30], "no WAV file"),
        (np.array([0.0, np.nan]), "no numbers"),
    ],
)
def test_what_is_no_recording(source: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AudioModality.read(source, codec())


def test_a_header_that_claims_hours() -> None:
    content = bytearray(wav(tone(440.0)))
    content[40:44] = (0x7FFFFFFF).to_bytes(4, "little")  # bytes of samples
    with pytest.raises(ValueError, match="too many"):
        AudioModality.read(bytes(content), codec())


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((0.2, 0.4), None),
        ((0.5, 0.2), "1 of 2 recordings is longer than 0.4 s: the end is cut off, 20% of their length on average"),
        (
            (0.8, 1.6, 0.1),
            "2 of 3 recordings are longer than 0.4 s: the end is cut off, 62% of their length on average",
        ),
    ],
)
def test_what_is_cut_off_is_counted_and_said(seconds: tuple[float, ...], said: str | None) -> None:
    own, tally = codec(), dict[str, float]()
    for each in seconds:
        samples = np.sign(tone(300.0, seconds=each))
        read_item(Item(samples, modality="audio"), own, tally)
    assert remarks("audio", tally, own) == ([f"{said} (data.prepare.modalities.audio.seconds)"] if said else [])


def test_silence_is_a_recording() -> None:
    own = codec()
    assert own.encode(AudioModality.read(np.zeros(10), own)[None]).shape == (1, 20)
    assert not own.features(np.zeros((1, own.samples))).any(), "silence is not noise at full scale"


@pytest.mark.parametrize("wrong", [{"rate": 1}, {"bands": 2}, {"frames": 0}, {"seconds": 0.001}, {"rate": 8000.0}])
def test_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AudioSettings(**wrong)


def test_the_file_stands_alone() -> None:
    """`convert to-hf` copies it: it imports NumPy and the standard library only."""
    tree = ast.parse(Path(audio.__file__).read_text())
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])
    }
    assert names <= {"numpy", *sys.stdlib_module_names}
