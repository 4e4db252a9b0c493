"""Errors that are the user's to mend: the command line prints one line and exits with code 2."""


class UserError(Exception):
    """A mistake in the input. The message is one line that names the field or file, and what is accepted."""


class OutOfMemory(UserError):
    """A step does not fit the device's memory. The message names what would; unlike a mistake, it ends a run begun."""
