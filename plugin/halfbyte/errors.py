"""The one exception type that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in what the user wrote or launched.

    The message says what is wrong, where (``file.yaml:line`` for YAML), and what to do, in at most ten
    lines. The command line prints it without a traceback and exits with status 2.
    """
