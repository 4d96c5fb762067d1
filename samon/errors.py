"""The one exception type for mistakes a user can mend."""


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and what to do; scripts print it and exit with 2."""
