"""Commands about settings: model, sampling, system prompt, presets, theme; what is changed is kept in the configuration."""

from __future__ import annotations

from dataclasses import replace

from tui import paths
from tui.config import Config, ConfigError, Preset, save
from tui.config.schema import with_setting, without_preset
from tui.messages import ModelChoice
from tui.models import TOY_NAME
from tui.screens.chat_commands import ChatCommands
from tui.screens.models import ModelsScreen
from tui.screens.settings import SettingsScreen
from tui.themes import CYCLE


class SettingCommands(ChatCommands):
    """Each holds from the next answer on."""

    def do_model(self, name: str) -> None:
        """Choose another model, or use the one named."""

        def chosen(choice: ModelChoice | None) -> None:
            if choice is not None:
                self._use_model(choice)

        if name:
            chosen(ModelChoice(None if name == TOY_NAME else name))
        else:
            self.app.push_screen(ModelsScreen(self.model.name), chosen)

    def _use_model(self, choice: ModelChoice) -> None:
        self.status.show("loading the model")
        self.engine.switch(choice)
        self._save(replace(self.config, model=choice.path or ""))

    def do_settings(self, _: str) -> None:
        """Open the panel."""

        def chosen(preset: Preset | None) -> None:
            if preset is not None:
                self.use(preset)
                self.say("The settings hold from the next answer on.")

        now = Preset(self.sampling, self.system_prompt)
        panel = SettingsScreen(now, self.config.presets, self._delete_preset, self.model.sampling)
        self.app.push_screen(panel, chosen)

    def _delete_preset(self, name: str) -> None:
        self._save(without_preset(self.config, name))

    def use(self, preset: Preset) -> None:
        """Use settings, and keep them for the next start."""
        self.sampling, self.system_prompt = preset.sampling, preset.system_prompt
        self._save(replace(self.config, sampling=preset.sampling, system_prompt=preset.system_prompt))

    def do_set(self, argument: str) -> None:
        """Change one value."""
        name, _, value = argument.partition(" ")
        try:
            self.use(Preset(with_setting(self.sampling, name, value.strip()), self.system_prompt))
        except ValueError as e:
            self.say(f"{e}.", "warning")
            return
        self.say(f"{name} is now {value.strip() or 'the default'}.")

    def do_system(self, text: str) -> None:
        """Change the system prompt."""
        self.use(Preset(self.sampling, text))
        self.say("The system prompt is changed." if text else "There is no system prompt now.")

    def do_budget(self, argument: str) -> None:
        """Change the thinking budget."""
        self.do_set(f"thinking_budget {argument}")

    def do_preset(self, argument: str) -> None:
        """Use a preset, save one or delete one."""
        word, _, name = argument.partition(" ")
        if word == "save" and name:
            now = Preset(self.sampling, self.system_prompt)
            self._save(replace(self.config, presets={**self.config.presets, name: now}))
            self.say(f"Saved as {name}.")
        elif word == "delete" and name in self.config.presets:
            self._delete_preset(name)
            self.say(f"Deleted {name}; the settings in force stay.")
        elif argument in self.config.presets:
            self.use(self.config.presets[argument])
            self.say(f"Using {argument}.")
        else:
            self.say(f"There are {', '.join(self.config.presets) or 'no presets'}; /preset save NAME makes one.")

    def do_theme(self, name: str) -> None:
        """Use the next theme, or the one named."""
        if name and name not in self.app.available_themes:
            self.say(f"There is no theme {name}; the palette lists them.", "warning")
            return
        at = CYCLE.index(self.app.theme) if self.app.theme in CYCLE else -1
        self.app.theme = name or CYCLE[(at + 1) % len(CYCLE)]

    def keep_theme(self, name: str) -> None:
        """Have the theme at the next start."""
        if name != self.config.theme:
            self._save(replace(self.config, theme=name))

    def _save(self, config: Config) -> None:
        before, self.config = self.config, config
        try:
            save(paths.config_file(), config, before)
        except ConfigError as e:
            self.say(str(e), "warning")
