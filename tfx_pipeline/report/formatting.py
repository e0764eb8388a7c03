"""Numbers, dates and names as people read them."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence

UNDEFINED = "undefined"
NO_BREAK = "\u00a0"
_MINUS = "\u2212"
_SCIENTIFIC_BELOW = 1e-4
_EXACT_BELOW = 1e15
_RIVALS = {"ials": "iALS", "item_knn": "item-kNN", "lightgbm": "LightGBM"}


def number(value: float | int | None) -> str:
    """A whole number with thousands separators, any other as `decimal`."""
    if value is not None and math.isfinite(value) and float(value).is_integer() and abs(value) < _EXACT_BELOW:
        return typeset(f"{int(value):,}")
    return decimal(value)


def decimal(value: float | None) -> str:
    """Four significant digits, four decimals below 1, thousands separators; `undefined` for None and NaN."""
    return column([value])[0]


def column(values: Sequence[float | None]) -> list[str]:
    """As `decimal`, with as many decimals for all as the largest one has, so that they line up."""
    largest = max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0)
    decimals = max(0, 4 - (len(f"{largest:.0f}") if largest >= 1 else 0))
    return [_with_decimals(value, decimals) for value in values]


def _with_decimals(value: float | None, decimals: int) -> str:
    if value is None or math.isnan(value):
        return UNDEFINED
    is_tiny = 0 < abs(value) < _SCIENTIFIC_BELOW
    return typeset(f"{value:.2e}" if is_tiny else f"{value:,.{decimals}f}")


def typeset(text: str) -> str:
    """The text with true minus signs before its numbers."""
    return re.sub(r"-(?=\d|inf)", _MINUS, text)


def difference(value: float | None) -> str:
    """A number with its sign; none for zero."""
    text = decimal(value)
    return f"+{text}" if value is not None and value > 0 else text


def share(value: float | None) -> str:
    """0.1234 as 12.3 %."""
    return UNDEFINED if value is None or math.isnan(value) else typeset(f"{100 * value:,.1f}{NO_BREAK}%")


def mebibytes(value: int) -> str:
    """Bytes as MiB, whole."""
    return f"{value / 2**20:,.0f}"


def moment(unix_s: int, utc_offset_hours: float) -> str:
    """Unix seconds as local date and time to the minute."""
    zone = datetime.timezone(datetime.timedelta(hours=utc_offset_hours))
    return datetime.datetime.fromtimestamp(unix_s, zone).strftime("%Y-%m-%d %H:%M")


def utc_offset(hours: float) -> str:
    """The name of the time zone that `moment` uses."""
    return "UTC" if not hours else typeset(f"UTC{hours:+g}")


def conditions(values: Mapping[str, str]) -> str:
    """`surface = home` of a slice; `all` without a condition."""
    return ", ".join(f"{name} = {value}" for name, value in values.items()) or "all"


def rival(name: str) -> str:
    """The name of a baseline, or `last blessed`, as people write it."""
    return _RIVALS.get(name, words(name))


def words(name: str) -> str:
    """`recent_popularity` as `recent popularity`."""
    return name.replace("_", " ")
