"""Errors that a user can cause and correct.

Every message starts with its origin in brackets, names the value seen and ends with the remedy, in one line:
``[config] rope_scaling type 'longrope' is not supported; use a checkpoint with 'yarn', 'linear' or none.``
Characters that could act on a terminal are made visible in it.
"""

from ring_mlx.system.terminal_text import harmless


class RingError(Exception):
    """A failure whose message is meant for the user: what happened, the value seen, and the remedy, in one line."""

    origin = "ring"

    def __init__(self, message: str) -> None:
        super().__init__(f"[{self.origin}] {' '.join(harmless(message).split())}")


class ConfigError(RingError):
    """config.json lacks a key, or holds a value that the model cannot honour."""

    origin = "config"


class WeightsError(RingError):
    """Tensors are missing, extra, misshapen or damaged."""

    origin = "weights"


class ModelError(RingError):
    """The model computes numbers that are not finite, so no token follows from them."""

    origin = "model"


class HubError(RingError):
    """A model folder or hub repository could not be found or fetched."""

    origin = "hub"


class TokenizerError(RingError):
    """The tokenizer or its chat template is missing or unreadable."""

    origin = "tokenizer"


class PromptError(RingError):
    """The prompt is empty or does not fit the context."""

    origin = "prompt"


class CacheFileError(RingError):
    """A saved cache is damaged, of another format or of another model."""

    origin = "cache"


class OptionError(RingError):
    """An option, or a combination of options, that cannot work."""

    origin = "option"


class ConvertError(RingError):
    """A conversion could not be written, resumed or verified."""

    origin = "convert"


class SessionError(RingError):
    """A session is closed, or its thread failed unexpectedly."""

    origin = "session"


class NoFitError(RingError):
    """The model does not fit into this machine's memory."""

    origin = "memory"
