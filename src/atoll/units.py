"""Bytes, floating-point operations and seconds as people write them ("2 GB", "100 Mbit/s", "20 ms")."""

from __future__ import annotations

import math
import re

_PREFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15,
           "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes from "2 GB" (10^9) or "2 GiB" (2^30).

    Raises: ValueError, with an example of what is understood.
    """
    number, unit = _split(text, "a size such as '2 GB' or '512 MiB'")
    prefix = unit.lower().removesuffix("b")
    if not unit.lower().endswith("b") or prefix not in _PREFIX:
        raise ValueError(f"{text!r} is not a size such as '2 GB' or '512 MiB'")
    return round(number * _PREFIX[prefix])


def parse_rate_bits(text: str) -> float:
    """Bits per second from "100 Mbit/s" or "10 MB/s".

    Raises: ValueError, with an example of what is understood.
    """
    example = "a rate such as '100 Mbit/s' or '10 MB/s'"
    number, unit = _split(text, example)
    low = unit.lower().removesuffix("/s").removesuffix("ps")
    for ending, bits in (("bit", 1), ("b", 8)):
        if low.endswith(ending) and low.removesuffix(ending) in _PREFIX:
            return number * bits * _PREFIX[low.removesuffix(ending)]
    raise ValueError(f"{text!r} is not {example}")


def parse_flops(text: str) -> float:
    """Floating-point operations per second from "500 GFLOP/s".

    Raises: ValueError, with an example of what is understood.
    """
    example = "a speed such as '500 GFLOP/s'"
    number, unit = _split(text, example)
    low = unit.lower().removesuffix("/s").removesuffix("s").removesuffix("p").removesuffix("flo")
    if "flop" not in unit.lower() or low not in _PREFIX:
        raise ValueError(f"{text!r} is not {example}")
    return number * _PREFIX[low]


def parse_seconds(text: str) -> float:
    """Seconds from "20 ms", "60 s", "5 min" or "1 h".

    Raises: ValueError, with an example of what is understood.
    """
    example = "a time such as '20 ms', '60 s' or '1 h'"
    number, unit = _split(text, example)
    if unit not in _SECONDS:
        raise ValueError(f"{text!r} is not {example}")
    return number * _SECONDS[unit]


def format_bytes(num_bytes: float) -> str:
    """Bytes for people: three significant digits, decimal prefixes."""
    return _scaled(num_bytes, "B")


def format_flops(num_flops: float) -> str:
    """Floating-point operations for people: three significant digits, decimal prefixes."""
    return _scaled(num_flops, "FLOP")


def counted(number: float, noun: str, form: str = "") -> str:
    """So many of something for people: 1 step, 2 steps; 1 class, 2 classes. `form` is the number's."""
    shown, ending = f"{number:{form}}", "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}{ending}"


def format_seconds(seconds: float) -> str:
    """A duration for people: 850 ms, 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_wait(seconds: float) -> str:
    """How long to wait, for people, rounded up, so that whoever waits so long is not too early: 12 s, 59 min 58 s, 2 h 10 min."""
    whole = max(1, math.ceil(seconds))
    if whole < 60:
        return f"{whole} s"
    return format_seconds(whole if whole < 3600 else 60 * math.ceil(whole / 60))


def _split(text: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {example}")
    return float(match[1]), match[2]


def _scaled(number: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"
