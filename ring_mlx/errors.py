"""Errors that a user can cause and correct.

Every message starts with its origin in brackets, names the value seen and ends with the remedy, in one line:
``[config] rope_scaling type 'longrope' is not supported; use a checkpoint with 'yarn', 'linear' or none.``
Characters that could act on a terminal are made visible in it.
"""

from ring_mlx.system.terminal_text import harmless


class RingError(Exception):
    """A failure whose message is meant for the user: what happened, the value seen, and the remedy, in one line."""

    origin = "ring"

    def __init_subclass__(cls, origin: str = "") -> None:
        """Without ``origin``, the parent's serves."""
        cls.origin = origin or cls.origin

    def __init__(self, message: str) -> None:
        super().__init__(f"[{self.origin}] {' '.join(harmless(message).split())}")


class ConfigError(RingError, origin="config"):
    """config.json lacks a key, or holds a value that the model cannot honour."""


class WeightsError(RingError, origin="weights"):
    """Tensors are missing, extra, misshapen or damaged."""


class ModelError(RingError, origin="model"):
    """The model computes numbers that are not finite, so no token follows from them."""


class HubError(RingError, origin="hub"):
    """A model folder or hub repository could not be found or fetched."""


class TokenizerError(RingError, origin="tokenizer"):
    """The tokenizer or its chat template is missing or unreadable."""


class PromptError(RingError, origin="prompt"):
    """The prompt is empty or does not fit the context."""


class CacheFileError(RingError, origin="cache"):
    """A saved cache is damaged, of another format or of another model."""


class OptionError(RingError, origin="option"):
    """An option, or a combination of options, that cannot work."""


class GrammarError(OptionError, origin="grammar"):
    """A form that answers cannot be held to; ``param`` is what it was given as."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConvertError(RingError, origin="convert"):
    """A conversion could not be written, resumed or verified."""


class SessionError(RingError, origin="session"):
    """A session is closed, or its thread failed unexpectedly."""


class NoFitError(RingError, origin="memory"):
    """The model does not fit into this machine's memory."""
