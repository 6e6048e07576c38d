"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Bad input. The message is one line: what was got, what was expected, how to fix it."""
