"""The errors that a user can cause, each with one line that says what is wrong and what to do.

`sa_jax.cli.run` turns them into exit codes: `UserError` 1, `UsageError` 2, `Preempted` 75.
"""


class UserError(Exception):
    """Something outside the code is wrong (a file, a tensor, a disk); exit status 1."""


class UsageError(UserError):
    """A flag, a config key or a config value is wrong; exit status 2."""


class Preempted(Exception):
    """The run stopped on request after saving a checkpoint; exit status 75: run it again."""
