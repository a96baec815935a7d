"""Checked reading of a checkpoint's JSON files: a value of the wrong type or out of range names its file and field.

The files come from strangers. Nothing here trusts a size, a type or a nesting depth, and nothing is executed.
"""

import json
import math
from pathlib import Path
from typing import Any, TypeGuard

from leanserve.contracts.errors import CheckpointError

__all__ = ["JsonFile"]

MAX_FILE_BYTES = 64 << 20
"""An index of a thousand shards is under 1 MB; a config.json is a few kB."""


class JsonFile:
    """A JSON object with its path. Getters return checked values; `default` stands in for an absent field.

    Args:
        path: named in every error.
        values: the object. `JsonFile.read` gets it from disk.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path) -> "JsonFile":
        """Read a JSON object.

        Raises:
            CheckpointError: no such file, too large, not JSON, or not an object.
        """
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise CheckpointError(f"{path}: {size} bytes; at most {MAX_FILE_BYTES} are read as JSON")
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        except RecursionError as error:
            raise CheckpointError(f"{path}: nested too deep to be a checkpoint's JSON") from error
        except ValueError as error:  # malformed JSON, bytes that are not UTF-8, an integer of thousands of digits
            raise CheckpointError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: holds a JSON {type(values).__name__}; it must be an object")
        return cls(path, values)

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The raw value, None when absent."""
        return self.values.get(name)

    def integer(self, name: str, *, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. An absent or null field gives `default`; without one it is an error."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(name, f"it must be an integer from {low} to {high}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(name, f"it must be an integer from {low} to {high}")
        return value

    def number(self, name: str, *, low: float, high: float = 1e18, default: float | None = None) -> float:
        """A finite number in [low, high], as a float. Absent or null as for `integer`."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not _is_finite(value) or not low <= value <= high:
            raise self.error(name, f"it must be a finite number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, *, low: float, high: float = 1e18) -> float | None:
        """A finite number in [low, high], or None when absent or null."""
        return self.number(name, low=low, high=high) if name in self else None

    def numbers(self, name: str, *, length: int, low: float, high: float = 1e18) -> tuple[float, ...]:
        """A list of `length` finite numbers in [low, high]."""
        value = self.values.get(name)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(_is_finite(v) and low <= v <= high for v in value)
        ):
            raise self.error(name, f"it must be a list of {length} finite numbers from {low:g} to {high:g}")
        return tuple(float(v) for v in value)

    def flag(self, name: str, *, default: bool) -> bool:
        """A boolean; absent or null gives `default`."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "it must be true or false")
        return value

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string; absent or null gives `default`; without one it is an error."""
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(name, "it must be a string")
        return value

    def table(self, name: str) -> "JsonFile | None":
        """A nested object under its own name, or None when absent, null or empty."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "it must be an object or null")
        return JsonFile(self.path / name, value) if value else None

    def error(self, name: str, allowed: str) -> CheckpointError:
        """The error for a field, saying what was seen and what is allowed."""
        if name not in self.values:
            return CheckpointError(f"{self.path}: {name} is missing; {allowed}")
        return CheckpointError(f"{self.path}: {name} is {shown(self.values[name])}; {allowed}")


def shown(value: object) -> str:
    """A value as an error message shows it: its JSON, cut after 80 characters."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or deep nesting
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _is_finite(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
