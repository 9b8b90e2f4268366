"""The model of a chat: which one it is, what is loaded, and what to do where the two differ."""

from __future__ import annotations

from dataclasses import replace

from tui.chat_settings import choice_of, is_same_model, model_name, raw_model
from tui.conversation import Conversation
from tui.messages import Answering, Loaded, ModelChoice
from tui.settings_commands import SettingsCommands


class ChatModel(SettingsCommands):
    """A chat goes on with the model that has answered in it; another one is never used without a word."""

    engine: Answering
    model: Loaded
    _pending: list[
        tuple[Conversation, ModelChoice, bool]
    ]  # chosen in a chat, and whether for new ones too; not loaded yet

    def switch_model(self, choice: ModelChoice, for_new: bool = True) -> None:
        """Load a model for the chat; once it is loaded it is the chat's, and that of new chats if it is ``for_new``."""
        self._pending.append((self.talk, choice, for_new))
        self.engine.switch(choice)

    @property
    def coming(self) -> ModelChoice | None:
        """The model that would answer now, if that is known."""
        if self._pending:
            return self._pending[-1][1]
        return self.model.choice or getattr(self.engine, "choice", None)

    @property
    def is_other_model(self) -> bool:
        """Whether another model than the chat's would answer; not if it was chosen here and is being loaded."""
        own, coming = self.own.model, self.coming
        chosen_here = bool(self._pending) and self._pending[-1][0] is self.talk
        return not (own is None or coming is None or chosen_here or is_same_model(own, coming))

    @property
    def other_model(self) -> str:
        """Words about the chat's model, if it is not the one that would answer."""
        own, coming = self.own.model, self.coming
        if own is None or coming is None or not self.is_other_model:
            return ""
        return f"{model_name(own)}, but {model_name(coming)} is loaded"

    def loaded(self, message: Loaded) -> None:
        """Note what is loaded; what was chosen is its chat's model now."""
        self.model, heard = message, message.choice
        fits = [heard is None or is_same_model(choice, heard) for _, choice, _ in self._pending]
        if True in fits:
            talk, choice, for_new = self._pending[fits.index(True)]
            del self._pending[: fits.index(True) + 1]
            message.choice = heard or choice
            self.keeper.keep_settings(talk, {"model": raw_model(choice)})
            if for_new:
                self.save_config(replace(self.config, model=choice.path or ""))
        self.show_header()

    def not_loaded(self) -> None:
        """Note that the model which was chosen first cannot be loaded: a name that was mistyped is not stored."""
        del self._pending[:1]
        self.model = Loaded("", 0)

    def keep_model(self) -> None:
        """Let a chat without one have the model that would answer now."""
        if self.own.model is not None:
            return
        names = [t.record.model for t in self.talk.path() if t.record is not None and t.record.model]
        if names and self.model.name not in ("", names[-1]):
            self.say(f"The last answer was {names[-1]}'s; {self.model.name} goes on from here.", "warning")
        if (coming := self.coming) is not None:
            self.change({"model": raw_model(coming)})

    def use_model(self, choice: ModelChoice) -> None:
        """Load a model that the user has chosen."""
        raise NotImplementedError

    def do_model(self, name: str) -> None:
        choice = choice_of(name)
        if self.model.choice is None or self._pending or not is_same_model(self.model.choice, choice):
            self.use_model(choice)
        else:
            self.change({"model": raw_model(choice)})
            self.say(f"This chat goes on with {model_name(choice)}.")
