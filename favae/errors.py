"""The base of every error that a user can mend."""


class FavaeError(RuntimeError):
    """Its message is one line that names what is wrong and what helps; the commands print it and exit with 1."""
