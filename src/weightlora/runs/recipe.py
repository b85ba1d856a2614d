"""Recipes: YAML files of settings, under the names that the command line has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightlora.errors import ConfigError

REPRODUCE = "reproduce"
"""A recipe's section for the command of that name alone; see docs/reproduce.md."""


def read_recipe(path: str | Path) -> tuple[dict[str, object], dict[str, Any]]:
    """Read a mapping of settings, and what it says to `reproduce` alone.

    Raises:
        ConfigError: no such file, no YAML, or no mapping.
    """
    import yaml

    from weightlora.tasks.spec import OWN_TABLE

    if Path(path).is_file() and Path(path).suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(
            f"{path} is no recipe, which ends in .yaml; rows of yours go with --task {OWN_TABLE} --train-file FILE"
        )
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the recipe {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"the recipe {path} must map flags to values, such as `task: sst2`")
    section = data.pop(REPRODUCE, {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"the recipe {path} must have a mapping under `{REPRODUCE}:`; see docs/reproduce.md")
    given = {str(name).replace("-", "_"): value for name, value in data.items() if value is not None}
    return given, dict(section)
