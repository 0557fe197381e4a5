"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong, where, the value seen, and what to do.

    The entry points print it without a traceback and exit with code 2. Everything else that is raised is a bug of
    ours and keeps its traceback.
    """
