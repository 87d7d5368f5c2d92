"""The one exception class of the package."""


class ReplibError(ValueError):
    """Something the user can repair: the message names the thing, the reason and the repair."""
