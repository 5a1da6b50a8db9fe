"""The flag --serve of scripts/report.py, separate from the work, which takes seconds to import."""

from absl import flags

PORT = 8765


class PortParser(flags.ArgumentParser):
    """`--serve` for the default port, `--serve=PORT` for another."""

    syntactic_help = "a port, or nothing for the usual one"

    def parse(self, argument: str | int | bool) -> int | None:
        if argument in ("true", True):
            return PORT
        if argument in ("false", False):
            return None
        if isinstance(argument, str) and argument.isdecimal() and int(argument) < 65536:
            return int(argument)
        raise ValueError(f"{argument!r} is no port; use 0 (any) to 65535")


def serve_flag() -> flags.Flag:
    """`--serve[=PORT]`, for `flags.DEFINE_flag`."""
    help_text = f"[=PORT] Serve the report on localhost, and update it (port {PORT})."
    return flags.Flag(PortParser(), None, "serve", None, help_text, boolean=True)
