"""The two errors that the command line reports as one line, without a traceback."""


class InputError(ValueError):
    """Something the user gave (configuration, data, checkpoint) cannot be used; the message says what is allowed."""


class DivergedError(RuntimeError):
    """The loss is no longer a number; the message names the first step and the last good checkpoint."""


def compile_failed(error: Exception) -> InputError:
    """What to raise where ``torch.compile`` has failed: the first paragraph of its many."""
    said = " ".join(str(error).partition("\n\n")[0].split())
    return InputError(f"compile: {said}. Without it: compile false")
