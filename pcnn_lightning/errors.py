"""The two errors that the command line reports as one line, without a traceback."""


class InputError(ValueError):
    """Something the user gave (configuration, data, checkpoint) cannot be used; the message says what is allowed."""


class DivergedError(RuntimeError):
    """The loss is no longer a number; the message names the first step and the last good checkpoint."""
