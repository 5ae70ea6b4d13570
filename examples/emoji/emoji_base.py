"""Finds the base emoji of a variant: skin tones, genders, hair and families do not make another emoji.

Used only for the split of write_documents.py. If in doubt it merges: a wrong merge costs a little data, but a wrong
separation would put near-copies of a training picture into the held-out split.
"""

from __future__ import annotations

_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_JOINER, _PICTURE = "\u200d", "\ufe0f"
_GENDERS = frozenset("♀♂")
_HAIR = frozenset("🦰🦱🦳🦲")
_PERSON, _CHILD, _HEART = "🧑", "🧒", "❤"
# Maps man, woman and person of the same meaning to one of them.
_SAME = str.maketrans(
    {"👨": "🧑", "👩": "🧑", "👦": "🧒", "👧": "🧒", "👴": "🧓", "👵": "🧓", "🤴": "🫅", "👸": "🫅"}
    | {"🎅": "🤶", "🕺": "💃", "👬": "👫", "👭": "👫", "🫃": "🤰", "🫄": "🤰"}
)
# Maps a sequence, after the mapping above, to the single-character emoji of the same meaning.
_SEQUENCES = {
    (_PERSON, "🤝", _PERSON): "👫",
    (_PERSON, _HEART, _PERSON): "💑",
    (_PERSON, _HEART, "💋", _PERSON): "💏",
    (_PERSON, "🎄"): "🤶",
    ("🫱", "🫲"): "🤝",
}


def has_skin_tone(text: str) -> bool:
    """Whether an emoji is a variant in a skin tone; the five tone characters themselves are not."""
    return len(text) > 1 and any(point in _TONES for point in text)


def base_of(text: str) -> str:
    """The base of an emoji; of a base, itself."""
    if len(text) == 1:
        return text.translate(_SAME)
    plain = "".join(point for point in text if point not in _TONES and point != _PICTURE).translate(_SAME)
    parts = tuple(part for part in plain.split(_JOINER) if part not in _GENDERS)
    parts = (*parts[:1], *(part for part in parts[1:] if part not in _HAIR))
    if parts in _SEQUENCES:
        return _SEQUENCES[parts]
    if len(parts) > 1 and set(parts) <= {_PERSON, _CHILD}:
        return "👪"
    return _JOINER.join(parts) or text
