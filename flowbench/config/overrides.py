"""``key=value`` overrides from the command line."""

from __future__ import annotations

import re
from typing import Any

from flowbench.config.earlier_names import with_present_names
from flowbench.config.errors import ConfigError
from flowbench.config.merge import split_key
from flowbench.config.text import check_text, read_yaml

__all__ = ["parse_override"]

_KEY = re.compile(r"[^.\[\]\s=]+(\.[^.\[\]\s=]+|\[\d+\])*")
_BREAK = re.compile("[\n\r\x85\u2028\u2029]")


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``key=value`` (or ``--key=value``) and read the value as YAML, as it is read in a file.

    Args:
        text: e.g. ``trainer.max_steps=500``, ``model.init_args.network.init_args.depth=2``, ``blocks[0].width=64``,
            ``sweep=[1, 2]``.

    Returns:
        The key by its present name, and a number, bool, None, string, list or dict; an interpolation stays unresolved
        text.

    Raises:
        ConfigError: no ``=``, no valid key, or a value that is not YAML.
    """
    check_text(text, f"override {text!a}")
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals:
        raise ConfigError(f"override '{text}' has no value; write key=value")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"override '{text}': '{key}' is not a key; write e.g. trainer.max_steps=500")
    split_key(key)
    if _BREAK.search(value):
        return key, value
    try:
        found = read_yaml(f"value: {value}", "value")["value"]
    except ConfigError as error:
        reason = str(error).partition("not valid YAML: ")[2] or str(error).partition("value: ")[2]
        raise ConfigError(f"override '{text}': '{value}' is not a YAML value: {reason}") from error
    ((key, found),) = with_present_names({key: found}).items()
    return key, found
