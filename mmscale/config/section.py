"""What settings are made of: the base class of sections, documented fields, and types of single values.

No setting lives here. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from mmscale.config.values import parse_integer, parse_number, parse_seconds

Count = Annotated[PositiveInt, BeforeValidator(parse_integer)]
Index = Annotated[NonNegativeInt, BeforeValidator(parse_integer)]
Port = Annotated[int, BeforeValidator(parse_integer), Field(ge=1, le=65535)]
Rate = Annotated[NonNegativeFloat, BeforeValidator(parse_number)]
Positive = Annotated[PositiveFloat, BeforeValidator(parse_number)]
Seconds = Annotated[PositiveFloat, BeforeValidator(parse_seconds)]
Fraction = Annotated[float, BeforeValidator(parse_number), Field(gt=0.0, le=1.0)]
Share = Annotated[float, BeforeValidator(parse_number), Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


def setting(meaning: str, default: Any = ..., *, unit: str = "", source: str = "") -> Any:
    """A documented field. Without `default` the setting must be given.

    Args:
        meaning: one sentence for `mmscale config explain`.
        default: the value used when the setting is left out.
        unit: what the number counts, e.g. "tokens".
        source: paper section or mcore file the setting comes from.
    """
    return Field(default, description=meaning, json_schema_extra={"unit": unit, "source": source})


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())
