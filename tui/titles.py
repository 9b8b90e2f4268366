"""Titles that the model makes of a chat's first exchange."""

from __future__ import annotations

from tui.conversation import Conversation
from tui.messages import Answering, Entitled
from tui.settings_commands import SettingsCommands
from tui.store.records import ASSISTANT
from tui.title_text import title_from


class Titles(SettingsCommands):
    """Until there is one, and where it is no good, the title is the first words."""

    engine: Answering
    _untitled: dict[str, Conversation]  # chats begun here whose title is their first words

    def begin_title(self) -> None:
        """Call the chat by its first words, if it has no title."""
        if not self.talk.chat.title:
            self.talk.entitle()
            self.talk.chat.title = self.keeper.distinct_title(self.talk)
            self._untitled[self.talk.chat.id] = self.talk

    def wish_title(self) -> None:
        """Have the model make a title, if the chat has none yet."""
        entitle = getattr(self.engine, "entitle", None)
        if entitle is not None and self.config.titles and self.talk.chat.id in self._untitled:
            entitle(self.talk.chat.id, *exchange_of(self.talk))

    def entitled(self, message: Entitled) -> None:
        """Take a title, unless it is no good or the user has given one."""
        talk = self._untitled.pop(message.chat_id, None)
        title = title_from(message.text, "\n".join(exchange_of(talk))) if talk else ""
        if talk is not None and title:
            self.keeper.entitle(talk, title)
            self.show_header()


def exchange_of(talk: Conversation) -> tuple[str, str]:
    """The first question and its answer."""
    path = talk.path()
    asked = path[0].content or ", ".join(a.name for a in path[0].attachments) if path else ""
    return asked, next((t.content for t in path if t.role == ASSISTANT and t.content), "")
