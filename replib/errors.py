"""The exceptions of the package: one class, and the one case of it that a search goes on after."""


class ReplibError(ValueError):
    """Something the user can repair: the message names the thing, the reason and the repair."""


class Diverged(ReplibError):
    """Training ended in a loss that is not finite: these coefficients do not work, others may."""
