"""Argument checks shared by the formulas: one clear line for each wrong value."""

from __future__ import annotations

from weightlora.errors import ConfigError


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of the words in `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")


def check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise ConfigError unless `value` is a whole number (no bool) in low..high, ends included."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is not a whole number; use one from {low} on")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"one of {low}..{high}"
        raise ConfigError(f"{name}={value} is out of range; it must be {allowed}")
