"""What can go wrong, said once and with the mend. The command line turns these into `Error:` and `Hint:`."""

from __future__ import annotations


class MLXLoRAError(Exception):
    """An expected failure: what is wrong, and what to do about it.

    Args:
        message: everything that is wrong, one fault a line.
        hint: the mend, in the imperative. Never empty: an error that nobody can act on is not an expected one.
    """

    def __init__(self, message: str, hint: str):
        assert hint.strip(), f"an expected error without its mend: {message}"
        super().__init__(message, hint)  # both, so that it can be copied and pickled
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}"


class ConfigError(MLXLoRAError):
    """An option, or a set of options, that cannot be honoured."""


class DataError(MLXLoRAError):
    """A data set that is missing, empty or malformed."""


class ModelError(MLXLoRAError):
    """A base model that is missing, damaged or of an unknown kind."""


class AdapterError(MLXLoRAError):
    """An adapter that does not fit the model, or holds values it must not."""


class FormatError(MLXLoRAError):
    """A file that is not what it claims to be, or that the asked-for format cannot express."""


class HubError(MLXLoRAError):
    """The Hugging Face Hub refuses, or cannot be reached."""


class TrainingError(MLXLoRAError):
    """A run that cannot go on: non-finite gradients, nothing to train, a checkpoint of another run."""
