"""Errors that a user can cause and correct.

    RingError
    |-- ConfigError       config.json lacks a key or holds a value that the model cannot honour
    |-- WeightsError      missing, extra, misshapen or damaged tensors
    |-- ModelError        what the model computes is not finite
    |-- HubError          a repository or file that could not be fetched
    |-- TokenizerError    tokenizer files missing or unreadable, no chat template
    |-- PromptError       an empty prompt, or one longer than the context
    |-- CacheFileError    a saved cache that is damaged, foreign or of another model
    |-- OptionError       an option or combination of options that cannot work
    |-- ConvertError      a conversion that could not be written, resumed or verified
    |-- SessionError      a session that is closed, or whose thread met something unforeseen
    `-- NoFitError        a model that this machine's memory cannot hold

Every message starts with its origin in brackets, names the value seen and ends with the remedy, in one line:
``[config] rope_scaling type 'longrope' is not supported; use a checkpoint with 'yarn', 'linear' or none.``
Characters that could act on a terminal are made visible in it.
"""

from ring_mlx.system.terminal_text import harmless


class RingError(Exception):
    """A failure whose message is meant for the user: one line, no traceback.

    Args:
        message: What happened, the value seen, and the remedy.
    """

    origin = "ring"

    def __init__(self, message: str) -> None:
        super().__init__(f"[{self.origin}] {' '.join(harmless(message).split())}")


class ConfigError(RingError):
    """config.json lacks what the model needs, or asks for what it cannot do."""

    origin = "config"


class WeightsError(RingError):
    """Tensors are missing, extra, misshapen or damaged."""

    origin = "weights"


class ModelError(RingError):
    """What the model computes is not finite, so that no token follows from it."""

    origin = "model"


class HubError(RingError):
    """A model folder or hub repository could not be had."""

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
    """A session is closed, or its thread met something unforeseen."""

    origin = "session"


class NoFitError(RingError):
    """The model does not fit into this machine's memory."""

    origin = "memory"
