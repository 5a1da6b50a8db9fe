"""How every binary starts and ends: one-screen help, one clear line on error, fixed exit codes.

0 done; 1 failed; 2 a wrong flag, config key or value; 75 stopped after a checkpoint (EX_TEMPFAIL:
run the same command again). Anything else that escapes is a bug and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from sa_jax.errors import Preempted, UsageError, UserError

EXIT_FAILED, EXIT_USAGE, EXIT_PREEMPTED = 1, 2, 75


def run(main: Callable[[], None], doc: str) -> None:
    """Parses the flags, calls `main()` and exits with the code its outcome stands for.

    Args:
      main: reads its flags from absl.flags.FLAGS.
      doc: the binary's docstring: what it does and an example command, shown by --help.
    """
    if any(argument in ("--help", "-h", "-help", "--helpshort") for argument in sys.argv[1:]):
        print(_help(doc))
        sys.exit(0)
    logging.set_verbosity(logging.INFO)
    try:
        app.run(lambda _: main(), flags_parser=_parse)
    except Preempted as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        _exit(EXIT_PREEMPTED)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(EXIT_USAGE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(EXIT_FAILED)


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with ml_collections' KeyError and TypeError for a bad --config as usage."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UsageError(f"{error}; --help lists the flags") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = str(error).strip("'\"").splitlines()[0]
        raise UsageError(f"config: {message}") from None
    except (OSError, ImportError) as error:
        raise UsageError(f"--config cannot be read: {error}") from None
    if rest[1:]:
        raise UsageError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest


def _help(doc: str) -> str:
    """The docstring and the flags defined by the binary itself, not absl's or jax's hundreds."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    own = [flag for flag in own if flag.name not in ("help", "helpfull", "helpshort", "helpxml")]
    lines = [doc.strip(), "", "flags:"]
    for flag in own:
        default = f" (default: {flag.default})" if flag.default not in (None, "", False) else ""
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)


def _exit(code: int) -> None:
    """Leaves without waiting for the threads that a failed run may have left behind."""
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
