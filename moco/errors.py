"""Errors that users can act on; commands print them in one line and exit with status 1."""


class DataError(ValueError):
    """The data on disk cannot be used; the message says what was found and what to do."""


class CheckpointError(ValueError):
    """A file is not what it should be; the message names the file and what was expected."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""
