"""The start and end of every script: one-screen help, one clear line on error, fixed exit codes.

0 done; 1 failed; 2 a wrong flag, config key or value; 75 stopped after a checkpoint (EX_TEMPFAIL:
run the same command again); 130 stopped by a signal before there was anything to save. Anything
else that escapes is a bug and keeps its traceback.

A script imports at its top only what its flags need, and the rest inside `main`. So --help and the
message about a wrong flag come at once, without jax.
"""

import contextlib
import errno
import importlib.util
import itertools
import os
import re
import select
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection

from absl import app, flags, logging
from ml_collections import ConfigDict

from sa_jax.buckets import check_places
from sa_jax.config_files import keys_of, load_config, plain, unknown_setting
from sa_jax.errors import Preempted, UsageError, UserError, end_process
from sa_jax.text import names_flag, one_line

# Set before transformers is imported: it would advise to install PyTorch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED, EXIT_INTERRUPTED = 1, 2, 75, 130
# A place that cannot be: what people name, and no bug.
_OF_PLACES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EROFS)
_CLIENTS = ("aiohttp.", "gcsfs.", "google.auth.")  # of buckets: modules of their errors
EXIT_BROKEN_PIPE = 141  # what a shell says of a process that SIGPIPE ended


def run(
    main: Callable[[], None],
    doc: str,
    config_module: str | None = None,
    *,
    places: Collection[str] = (),
) -> None:
    """Parses the flags, calls `main()` and exits with the code of its outcome.

    Args:
      main: reads its flags from absl's holders.
      doc: the script's docstring: what it does and an example command, shown by --help.
      config_module: its file is the default of --config. (If it were the flag's own default, a
        wrong --config.key would raise before this function can catch it.)
      places: flags and settings that may be `gs://`, such as '--workdir' and 'config.data'; a
        bucket in any other is refused.
    """
    wants_help = any(word.lstrip("-") in ("help", "h", "helpshort") for word in sys.argv[1:])
    if config_module and not wants_help and not _given(sys.argv, "config"):
        spec = importlib.util.find_spec(config_module)
        assert spec is not None
        sys.argv.insert(1, f"--config={spec.origin}")
    try:
        if wants_help:
            _flushed(lambda: print(_help(doc)))
            sys.exit(0)
        app.run(lambda _: _flushed(main), flags_parser=lambda argv: _parse(argv, places))
    except Preempted as stopped:
        _exit(EXIT_PREEMPTED, f"stopped: {stopped}")
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os._exit(EXIT_BROKEN_PIPE)  # the reader of a pipe (`| head`) has seen enough
        raise
    except KeyboardInterrupt:
        _exit(EXIT_INTERRUPTED, "stopped: interrupted; run the same command again")
    except UserError as error:
        code = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        _exit(code, f"error: {one_line(error)}")
    # A bug, or a bucket's client. Python's own way out would wait for threads, and jax's for peers.
    except Exception as error:
        if f"{type(error).__module__}.".startswith(_CLIENTS):
            _exit(EXIT_FAILED, f"error: {one_line(error)}: the bucket failed; run it again")
        if isinstance(error, OSError) and error.errno in _OF_PLACES:
            _exit(EXIT_FAILED, f"error: {one_line(error)}; name another place")
        _exit(EXIT_FAILED, traceback.format_exc().rstrip())


def _flushed(main: Callable[[], None]) -> None:
    """Runs `main`, and flushes its output while a closed pipe can still be caught."""
    main()
    sys.stdout.flush()


def _given(argv: list[str], flag: str) -> list[tuple[str, str]]:
    """(name, value) of each flag in `argv` whose name matches `flag`; the value may be the next
    word."""
    given = []
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        match = re.fullmatch(f"--?(?P<name>{flag})(?:=(?P<value>.*))?", word, re.DOTALL)
        if match:
            given.append((match["name"], after if match["value"] is None else match["value"]))
    return given


def _parse(argv: list[str], places: Collection[str]) -> list[str]:
    """absl's parser; turns every error of a flag or --config into one line."""
    try:
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.is_locked  # a file that cannot be loaded raises at first use
    except UserError:
        raise
    except Exception as error:
        if problem := _problem_of_config(argv, error):
            raise UsageError(problem) from None
        if not isinstance(error, flags.Error):
            raise
        missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
        problem = f"--{missing[1]} is required" if missing else plain(error)
        raise UsageError(f"{problem}; --help lists the flags") from None
    if rest[1:]:
        raise UsageError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        if isinstance(flag.value, ConfigDict):
            check_places("config", flag.value.to_dict(), places)
        else:
            check_places(f"--{flag.name}", flag.value, places)
    logging.set_verbosity(logging.INFO)
    return rest


def _problem_of_config(argv: list[str], error: Exception) -> str:
    """What is wrong with a key of --config.KEY; '' if the error is of something else. UsageError
    for its file, which absl's error tells in many words and which is therefore read again."""
    given = _given(argv, "config")
    if not given or (isinstance(error, flags.Error) and "--config" not in str(error)):
        return ""
    config = load_config(given[-1][1])
    if isinstance(error, flags.Error):
        return ""
    if isinstance(error, AttributeError | KeyError) and isinstance(config, ConfigDict):
        if problem := _unknown_setting(argv, config):
            return problem
    known = (AttributeError, KeyError, OSError, ImportError, SyntaxError, TypeError, ValueError)
    return f"--config: {plain(error)}" if isinstance(error, known) else ""


def _unknown_setting(argv: list[str], config: ConfigDict) -> str:
    """The first --config.KEY that the config does not have, with the keys that may be meant."""
    known = keys_of(config)
    for flag, value in _given(argv, r"(?:no)?config\.[\w.]+"):
        key = flag.partition(".")[2]
        if key in known:
            continue
        if key.startswith("eval.names."):
            names = names_flag({**config.eval.names, key.removeprefix("eval.names."): value})
            return f"unknown setting config.{key}; an eval is added with {names}"
        return unknown_setting(config, key)
    return ""


def _help(doc: str) -> str:
    """The docstring and the flags that the script itself defines, without absl's own."""
    lines = [doc.strip(), "", "Flags:"]
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        required = any("other than None" in validator.message for validator in flag.validators)
        value = flag.default
        shown = ",".join(map(str, value)) if isinstance(value, list) else value
        default = "" if value in (None, "", False, []) else f" (default: {shown})"
        text = f"--{flag.name}{' (required)' * required}: {flag.help}{default}"
        first, *others = text.split("\n")
        lines += textwrap.wrap(first, 100, initial_indent="  ", subsequent_indent="      ") + others
    return "\n".join(lines)


def _exit(code: int, message: str) -> None:
    """Ends the process at once: threads of a failed run could keep it alive."""
    with contextlib.suppress(BrokenPipeError):
        logging.flush()
        sys.stdout.flush()
    end_process(code, message)
