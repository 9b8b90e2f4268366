"""The chat's configuration: a commented TOML file; ``schema`` knows values, ``file`` the file."""

from tui.config.file import ConfigError, load, save
from tui.config.schema import Config, Preset

__all__ = ["Config", "ConfigError", "Preset", "load", "save"]
