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

# No setting is larger, in whatever unit; float64 holds every whole number up to here.
LARGEST = 10**15
_YEAR = 366 * 86_400.0
_WHOLE = BeforeValidator(parse_integer)
_NUMBER = BeforeValidator(parse_number)

Count = Annotated[PositiveInt, _WHOLE, Field(le=LARGEST)]
Index = Annotated[NonNegativeInt, _WHOLE, Field(le=LARGEST)]
# torch and NumPy take 64 bits; megatron-core adds small numbers to it.
Seed = Annotated[NonNegativeInt, _WHOLE, Field(le=2**63 - 1)]
Port = Annotated[int, _WHOLE, Field(ge=1, le=65535)]
Rate = Annotated[NonNegativeFloat, _NUMBER, Field(le=LARGEST, allow_inf_nan=False)]
Positive = Annotated[PositiveFloat, _NUMBER, Field(le=LARGEST, allow_inf_nan=False)]
Seconds = Annotated[PositiveFloat, BeforeValidator(parse_seconds), Field(le=_YEAR, allow_inf_nan=False)]
Fraction = Annotated[float, _NUMBER, Field(gt=0.0, le=1.0)]
Share = Annotated[float, _NUMBER, Field(ge=0.0, le=1.0)]
AtLeastOne = Annotated[float, _NUMBER, Field(ge=1.0, le=LARGEST, allow_inf_nan=False)]
# Of a decay over tokens.
Exponent = Annotated[float, _NUMBER, Field(ge=-10.0, le=0.0)]
# In fp32 anything smaller is 0 beside a sum of squares.
Epsilon = Annotated[float, _NUMBER, Field(ge=1e-30, le=1.0)]
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
