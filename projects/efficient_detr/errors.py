"""The one exception that the commands show to the user as a sentence instead of a traceback."""

import re

_WORKER_PREFIX = re.compile(r"^Caught \w+ in DataLoader worker process \d+\.\n", re.MULTILINE)


class UserError(Exception):
    """Something that the user can put right: a path, a config key, a file, a data set.

    The message is one sentence that names the culprit and says what to do. ``train_net.py`` and
    ``demo.py`` write it to stderr and leave with a non-zero exit status.

    Args:
        message: the sentence. PyTorch re-creates an exception of a data-loading worker from the
            text of its traceback; such a text is reduced to its last line, the original sentence.
    """

    def __init__(self, message: str) -> None:
        if _WORKER_PREFIX.match(message):
            message = message.strip().splitlines()[-1].split(": ", maxsplit=1)[-1]
        super().__init__(message)


class ConfigError(UserError, ValueError):
    """A part of the model got an argument that does not fit, alone or with another part."""


class NonFiniteLossError(UserError, FloatingPointError):
    """A loss became infinite or NaN during training."""
