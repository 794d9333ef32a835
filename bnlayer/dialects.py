"""How each framework names, defaults and means things: a table, not code paths."""

from __future__ import annotations

from fractions import Fraction


def complement(value: float) -> float:
    """1 - value, so that the decimals people write come back: .1 and .9, .01 and .99, .001 and .999.

    Where the decimal complement of `repr(value)` leads back to `value` it is the answer, else 1.0 - value. For
    0.5 <= value <= 1, and for any decimal of up to 15 places, complement(complement(value)) == value. A value below
    0.5 with more digits than that may come back rounded, by at most 2**-53.
    """
    decimal = _decimal_complement(value)
    return decimal if _decimal_complement(decimal) == value else 1.0 - value


def _decimal_complement(value: float) -> float:
    return float(1 - Fraction(repr(float(value))))
