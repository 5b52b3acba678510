"""Units of rates and times: numbers from what people write, such as "10 Mbit/s" and "40 ms"."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["parse_rate", "parse_seconds"]

_RATES = {
    **{f"{prefix}bit/s": 1000.0**power for power, prefix in enumerate(("", "k", "M", "G"))},
    **{f"{prefix}B/s": 8 * 1000.0**power for power, prefix in enumerate(("", "k", "M", "G"))},
    **{f"{prefix}B/s": 8 * 1024.0**power for power, prefix in enumerate(("Ki", "Mi", "Gi"), 1)},
}
_OTHER_RATES = {"Kbit/s": "kbit/s", "bps": "bit/s", "kbps": "kbit/s", "Kbps": "kbit/s", "Mbps": "Mbit/s"}
_OTHER_RATES |= {"Gbps": "Gbit/s", "KB/s": "kB/s"}
_TIMES = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf)\s*(\S.*?)?\s*")


def parse_rate(what: str, value: Any) -> float:
    """Return a rate in bits a second.

    Args:
        what: The argument, as errors name it.
        value: A number of bits a second, or text with a unit: bit/s, kbit/s, Mbit/s, Gbit/s (also bps and so on), B/s,
            kB/s, MB/s, GB/s (thousands), KiB/s, MiB/s, GiB/s (1024). ``math.inf`` takes no time.

    Raises:
        TypeError: If it is neither a number nor text.
        ValueError: If it is not positive, or the text has no unit that is known.

    Examples:
        >>> parse_rate("uplink", "10 Mbit/s"), parse_rate("uplink", "1.2 MB/s"), parse_rate("uplink", 56000)
        (10000000.0, 9600000.0, 56000.0)
    """
    known = {**_RATES, **{name: _RATES[unit] for name, unit in _OTHER_RATES.items()}}
    hint = "'10 Mbit/s' or '1.2 MB/s' (bits have a small b: Mbit/s or Mbps; bytes a large B: MB/s), or bits a second"
    rate = _parse(what, value, known, hint)
    if not rate > 0:
        raise ValueError(f"{what} must be a positive rate, such as {hint}; got {value!r}.")
    return rate


def parse_seconds(what: str, value: Any) -> float:
    """Return a time in seconds.

    Args:
        what: The argument, as errors name it.
        value: A number of seconds, or text with a unit: us, ms, s, min, h.

    Raises:
        TypeError: If it is neither a number nor text.
        ValueError: If it is negative or not finite, or the text has no unit that is known.

    Examples:
        >>> parse_seconds("latency", "40 ms"), parse_seconds("latency", 1.5), parse_seconds("deadline", "2 min")
        (0.04, 1.5, 120.0)
    """
    hint = "'40 ms', '30 s', '2 min' or '1 h', or a number of seconds"
    seconds = _parse(what, value, _TIMES, hint)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{what} must be a time of at least 0, such as {hint}; got {value!r}.")
    return seconds


def _parse(what: str, value: Any, units: dict[str, float], hint: str) -> float:
    if isinstance(value, str):
        found = _QUANTITY.fullmatch(value)
        if found is None or (found[2] is not None and found[2] not in units):
            raise ValueError(f"{what} must be {hint}; got {value!r}.")
        return float(found[1]) * (1.0 if found[2] is None else units[found[2]])
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{what} must be {hint}; got {value!r}.")
    return float(value)
