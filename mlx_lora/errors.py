"""The expected errors: what is wrong, and the fix. The command line prints them as ``Error:`` and ``Hint:``.

Warnings of this package have their own category; the command line prints them as ``Warning:``.
"""

from __future__ import annotations


class MLXLoRAError(Exception):
    """An expected failure.

    Args:
        message: everything that is wrong, one fault a line.
        hint: the fix, in the imperative. Never empty: an error without a fix is of no use to the person who sees it.
    """

    def __init__(self, message: str, hint: str):
        assert hint.strip(), f"an expected error without a hint: {message}"
        super().__init__(message, hint)  # both, so that the error can be copied and pickled
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}"


class MLXLoRAWarning(UserWarning):
    """The work continues, but differs from what the caller may expect. Issued with ``warnings.warn``."""


class ConfigError(MLXLoRAError):
    """An invalid option, or options that contradict each other."""


class DataError(MLXLoRAError):
    """A data set that is missing, empty or malformed."""


class ModelError(MLXLoRAError):
    """A base model that is missing, damaged or of an unsupported architecture."""


class AdapterError(MLXLoRAError):
    """An adapter that is damaged or does not match the model."""


class FormatError(MLXLoRAError):
    """A file that is not in its expected format, or an adapter that a format cannot express."""


class HubError(MLXLoRAError):
    """The Hugging Face Hub refused a request or cannot be reached."""


class TrainingError(MLXLoRAError):
    """Training that cannot start or continue: nothing to train, non-finite gradients, another run's checkpoint."""


class LostProcessError(TrainingError):
    """Another process of a distributed run has died, failed or hangs. ``rank`` is its number."""

    def __init__(self, message: str, hint: str, rank: int = -1):
        super().__init__(message, hint)
        self.rank = rank
