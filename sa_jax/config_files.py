"""Config files: Python with a function `get_config`, which FILE:NAME calls with the name."""

import difflib
import functools
import inspect
import os
import re
import runpy
import traceback
from typing import Any

from ml_collections import ConfigDict

from sa_jax.errors import UsageError, UserError


def load_config(path: str) -> ConfigDict:
    """`get_config()` of a config file, or `get_config(name)` for FILE:NAME; UsageError, with the
    line in the file where it has one, if that cannot be."""
    file, _, name = path.partition(":")
    names = [name] if name else []
    try:
        get_config = _get_config(file)
        try:
            inspect.signature(get_config).bind(*names)
        except TypeError:
            if name:
                raise UsageError(f"--config={path}: {file} takes no name after a colon") from None
            raise UsageError(f"{file} needs a name after a colon, {file}:NAME") from None
        config = get_config(*names)
        if not isinstance(config, ConfigDict):
            found = type(config).__name__
            raise UsageError(f"{path}: get_config() returns {found}, not a ConfigDict")
        return config
    except UserError:
        raise
    except Exception as error:  # whatever a user's own file raises
        text = "".join(traceback.format_exception(error))
        lines = re.findall(rf'File "{re.escape(file)}", line (\d+)', text)
        place = f"{file}, line {lines[-1]}" if lines else path
        raise UsageError(f"{place}: {type(error).__name__}: {plain(error)}") from None


@functools.cache
def _get_config(file: str) -> Any:
    if not os.path.isfile(file):
        what = "a folder" if os.path.isdir(file) else f"no such file (seen from {os.getcwd()})"
        raise UsageError(f"--config={file}: {what}")
    get_config = runpy.run_path(file).get("get_config")
    if not callable(get_config):
        raise UsageError(f"{file} defines no get_config()")
    return get_config


def plain(error: BaseException) -> str:
    """An error's text on one line, or its type if it has none."""
    while error.args and isinstance(error.args[0], BaseException):  # as ml_collections raises it
        error = error.args[0]
    # A KeyError shows its argument quoted, with \n for the line breaks that are in it.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


# Sections whose keys are the user's own.
_OPEN = ("optimizer.kwargs", "architecture", "eval.names")


def unknown_setting(config: ConfigDict, key: str, prefix: str = "config.") -> str:
    """A line about a dotted key that the config does not have, with the keys that may be meant;
    `prefix` stands before each."""
    section, _, last = key.rpartition(".")
    if section in _OPEN:
        together = f"give the keys of {prefix}{section} together, as {{{last!r}: VALUE}}"
        return f"unknown setting {prefix}{key}; {together}"
    known = keys_of(config)
    # In another section, or abbreviated: `lr` for `optimizer.learning_rate`.
    meant = [name for name in known if last in _short_names(name)]
    meant = meant or difflib.get_close_matches(key, known, 3, 0.75)
    hint = f"; did you mean {' or '.join(f'{prefix}{name}' for name in meant)}?" if meant else ""
    return f"unknown setting {prefix}{key}{hint}"


def _short_names(key: str) -> tuple[str, ...]:
    """'learning_rate' and 'lr' of 'optimizer.learning_rate'."""
    name = key.rpartition(".")[2]
    words = name.split("_")
    return (name, "".join(word[:1] for word in words)) if len(words) > 1 else (name,)


def keys_of(config: ConfigDict, prefix: str = "") -> list[str]:
    """All dotted keys, also those of sections."""
    keys = []
    for name, value in config.items():
        keys.append(prefix + name)
        if isinstance(value, ConfigDict):
            keys += keys_of(value, f"{prefix}{name}.")
    return keys
