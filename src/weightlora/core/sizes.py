"""Budgets as people write them: bytes, and shares of a step's time."""

from __future__ import annotations

import re

from weightlora.errors import ConfigError

_UNITS = {"": 1, "b": 1} | {
    letter + ending: base**power
    for power, letter in enumerate("kmgt", start=1)
    for ending, base in (("b", 1000), ("ib", 1024), ("", 1024))
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)x", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str | int) -> int:
    """A number of bytes from "16GiB", "12GB", "800 MiB" or an int; a bare K, M, G or T is a power of 1024.

    Raises:
        ConfigError: not such a size, or below 1.

    >>> parse_bytes("16GiB"), parse_bytes("1.5GB"), parse_bytes("4G"), parse_bytes(1024)
    (17179869184, 1500000000, 4294967296, 1024)
    """
    match = None if isinstance(text, bool) else _SIZE.fullmatch(str(text).strip())
    unit = "" if match is None else match[2].lower()
    size = 0 if match is None or unit not in _UNITS else int(float(match[1]) * _UNITS[unit])
    if size < 1:
        raise ConfigError(f"{text!r} is not a number of bytes; write for example 16GiB, 12GB or 800MiB")
    return size


def format_bytes(size: float) -> str:
    """A number of bytes for people.

    >>> format_bytes(512), format_bytes(1536), format_bytes(12 * 2**30)
    ('512 B', '1.5 KiB', '12.0 GiB')
    """
    if size < 1024:
        return f"{size:.0f} B"
    power = min(3, (int(size).bit_length() - 1) // 10)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def parse_share(text: str) -> float:
    """A share of a step's time, from "0.6x".

    Raises:
        ConfigError: not such a share, 0, or above 1.

    >>> parse_share("0.6x")
    0.6
    """
    match = _SHARE.fullmatch(text.strip()) if isinstance(text, str) else None
    share = 0.0 if match is None else float(match[1])
    if not 0 < share <= 1:
        raise ConfigError(f"{text!r} is not a share; write for example 0.6x, above 0x and at most 1x")
    return share
