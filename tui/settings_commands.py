"""The commands about a chat's settings and the defaults, for the screens and plain mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tui import config as files
from tui import paths
from tui.chat_settings import Settings, default_settings, differences, settings_of
from tui.config import Config, ConfigError, Preset, checked
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Sampling

DAMAGED = (
    "[store] this chat's settings have changed on the disk; check them with /settings, using them there keeps them."
)


class SettingsCommands:
    """What belongs to a chat is changed in the chat; presets and defaults are in the configuration."""

    config: Config
    keeper: Keeper
    talk: Conversation
    say: Callable[..., None]
    remedy = "your next question asks which of them is to answer"

    @property
    def own(self) -> Settings:
        """The settings of the chat."""
        return settings_of(self.talk.chat.settings, self.config)[0]

    @property
    def sampling(self) -> Sampling:
        return self.own.sampling

    @property
    def system_prompt(self) -> str:
        return self.own.system_prompt

    @property
    def differences(self) -> list[str]:
        """What is otherwise in this chat than in new ones, in a few words each."""
        own = replace(self.own, model=None) if self.other_model else self.own  # that says it already
        return differences(own, default_settings(self.config))

    @property
    def other_model(self) -> str:
        """Words about the chat's model, if it is not the one that would answer."""
        return ""

    def tell_settings(self) -> None:
        """Say what is wrong with the settings of a chat that has been opened."""
        wrong = settings_of(self.talk.chat.settings, self.config)[1]
        if self.talk.chat.are_settings_damaged:
            self.say(DAMAGED, "warning")
        if wrong:
            self.say(f"[chat] {'; '.join(wrong)}; the defaults hold there.", "warning")
        if self.other_model:
            self.say(f"[model] This chat's model is {self.other_model}; {self.remedy}.", "warning")

    def show_header(self) -> None:
        """Show the title and what is otherwise in this chat, where there is a place for it."""

    def settle(self) -> None:
        """Let the chat keep the settings with which it goes on, as another window may have changed them."""
        kept = self.keeper.refresh_settings(self.talk)
        if missing := {name: value for name, value in self.own.as_raw().items() if name not in kept}:
            self.keeper.keep_settings(self.talk, missing)

    def change(self, changed: Mapping[str, Any]) -> None:
        """Change some settings of the chat, from the next answer on; others stay as another window may have set them."""
        self.keeper.keep_settings(self.talk, changed)
        self.keeper.refresh_settings(self.talk)
        self.show_header()

    def use(self, preset: Preset, shown: Settings | None = None) -> None:
        """Use settings in this chat; of those that differ from what was shown, if that is given."""
        new, old = Settings(preset.sampling, preset.system_prompt).as_raw(), shown.as_raw() if shown else {}
        if self.talk.chat.are_settings_damaged:
            new, old = {**dict.fromkeys(self.talk.chat.settings), **self.own.as_raw(), **new}, {}
        self.change({name: value for name, value in new.items() if not old or value != old[name]})

    def do_set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        try:
            self.change({name: checked(name, value.strip())})
            self.say(f"{name} is now {value.strip() or 'the default'}.")
        except ValueError as e:
            self.say(f"{e}.", "warning")

    def do_system(self, text: str) -> None:
        self.change({"system_prompt": text})
        self.say("The system prompt is changed." if text else "There is no system prompt now.")

    def do_budget(self, argument: str) -> None:
        self.do_set(f"thinking_budget {argument}")

    def do_preset(self, argument: str) -> None:
        word, _, name = argument.partition(" ")
        presets = self.config.presets
        if word == "save" and name:
            now = Preset(self.sampling, self.system_prompt)
            self.save_config(replace(self.config, presets={**presets, name: now}))
            self.say(f"Saved as {name}.")
        elif word == "delete" and name in presets:
            self.save_config(self.config.without(name))
            self.say(f"Deleted {name}; the settings in force stay.")
        elif argument in presets:
            self.use(presets[argument])
            self.say(f"Using {argument}.")
        else:
            self.say(f"There are {', '.join(presets) or 'no presets'}. /preset save NAME makes one.")

    def do_defaults(self, word: str) -> None:
        if word == "save":
            self.save_defaults()
        elif word:
            self.say("/defaults goes back to the defaults, /defaults save makes this chat's settings the defaults.")
        else:
            self.change(default_settings(self.config).as_raw())
            self.say("The defaults hold in this chat now.")

    def save_defaults(self) -> None:
        """Make the chat's settings those of new chats."""
        if self._write(self._with_own(files.load(paths.config_file())[0])):
            self.say("New chats have these settings now.")
        self.config = self._with_own(self.config)
        self.show_header()

    def _with_own(self, config: Config) -> Config:
        own = self.own
        config = replace(config, sampling=own.sampling, system_prompt=own.system_prompt)
        return config if own.model is None else replace(config, model=own.model.path or "")

    def save_config(self, config: Config) -> None:
        """Use a configuration and write what has changed in it."""
        before, self.config = self.config, config
        self._write(config, before)

    def _write(self, config: Config, before: Config | None = None) -> bool:
        try:
            files.save(paths.config_file(), config, before)
        except ConfigError as e:
            self.say(str(e), "warning")
            return False
        return True
