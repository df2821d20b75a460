"""The errors that the command line reports in one line, without a traceback."""


class InputError(ValueError):
    """User input (configuration, data or checkpoint) cannot be used; the message says what is allowed."""


class DivergedError(RuntimeError):
    """The loss or a weight is NaN or infinite; the message names the step or weight, and the last good checkpoint."""


def one_line(error: Exception) -> str:
    """What an error says, in one line; its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def compile_failed(error: Exception) -> InputError:
    """The error to raise if ``torch.compile`` failed, with the first paragraph of its long message."""
    said = " ".join(str(error).partition("\n\n")[0].split())
    return InputError(f"compile: {said}; to do without it, set compile to false")
