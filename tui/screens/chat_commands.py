"""Commands about whole chats: new, open, rename, pin, delete, export, import, attach."""

from __future__ import annotations

from ring_mlx import RingError
from tui.conversation import Conversation
from tui.screens.chats import ChatsScreen, Chosen
from tui.screens.help import HelpScreen
from tui.screens.turn_commands import TurnCommands
from tui.store import StoreError, chats, drafts
from tui.transfer import export_talk, import_talk


class ChatCommands(TurnCommands):
    """Each about the chat in view."""

    _deleted: str | None = None

    async def do_new(self, _: str) -> None:
        """Begin a new chat; a running answer ends and is kept."""
        await self.open_chat(Conversation())

    def do_chats(self, words: str) -> None:
        """List and search all chats."""
        self.keeper.flush()

        def chosen(found: Chosen | None) -> None:
            self.run_worker(self._after_list(found))

        self.app.push_screen(ChatsScreen(self.keeper.db, words, self.talk.chat.id, self._export_of), chosen)

    async def _after_list(self, found: Chosen | None) -> None:
        """Take over what was done to the chat in view; open the one that was chosen."""
        try:
            now = chats.load(self.keeper.db, self.talk.chat.id)
        except StoreError:
            now = None
        if now is not None and now.deleted is not None:
            self._deleted = now.id
            await self.open_chat(Conversation())
        elif now is not None:
            self.talk.chat.title, self.talk.chat.pinned = now.title, now.pinned
        if found is not None:
            await self._open(*found)

    async def _open(self, chat_id: str, turn_id: str | None) -> None:
        try:
            talk = self.talk if chat_id == self.talk.chat.id else self.keeper.open(chat_id)
        except StoreError as e:
            self.trouble(str(e))
            return
        if talk is None:
            self.say("That chat is gone.")
            return
        if turn_id in talk.turns and turn_id not in {t.id for t in talk.path()}:
            talk.mark()
            talk.show(turn_id)
        if talk is not self.talk:
            await self.open_chat(talk, at=turn_id)
        elif self.answer is None:
            await self.refresh_turns(focus=turn_id)

    async def open_chat(self, talk: Conversation, at: str | None = None) -> None:
        """Show another chat."""
        self.stop_now()
        self.keep_draft()
        await self.show_chat(talk, at)

    async def show_chat(self, talk: Conversation, at: str | None = None) -> None:
        """Show a chat with its draft."""
        self.talk = talk
        await self.turns.show(talk.path())
        try:
            draft = drafts.load(self.keeper.db, talk.chat.id)
        except StoreError:
            draft = ""
        self.entry.prompt.replace_text(draft)
        self.entry.attachments.set([])
        self.status.show("ready" if self.model.context else self.status.state)
        self.entry.prompt.focus()
        if at is not None:
            await self.turns.go(at)
        self.refresh_bindings()

    def keep_draft(self) -> None:
        """Keep what is typed and not sent; that of a chat without turns is not worth it."""
        if self.talk.turns:
            self.keeper.keep_draft(self.talk.chat.id, self.entry.prompt.text)

    def do_title(self, title: str) -> None:
        """Rename the chat."""
        if not title or not self.talk.turns:
            self.say(f"The title is {self.talk.chat.title!r}." if self.talk.turns else "There is no chat yet.")
            return
        self.keeper.rename(self.talk, title)
        self.say(f"Renamed to {title}.")

    def do_pin(self, _: str) -> None:
        """Keep the chat at the top of the list, or no longer."""
        self.keeper.pin(self.talk, not self.talk.chat.pinned)
        self.say("Pinned." if self.talk.chat.pinned else "Unpinned.")

    async def do_delete(self, _: str) -> None:
        """Delete the chat and begin a new one."""
        if not self.talk.turns:
            self.say("There is no chat yet.")
            return
        chat_id = self.talk.chat.id
        await self.open_chat(Conversation())
        try:
            chats.delete(self.keeper.db, chat_id)
            self._deleted = chat_id
            self.say("Deleted; /restore brings it back.")
        except StoreError as e:
            self.trouble(str(e))

    async def do_restore(self, _: str) -> None:
        """Bring the chat deleted last back."""
        chat_id, self._deleted = self._deleted, None
        if chat_id is None:
            self.say("No chat was deleted here.")
            return
        try:
            chats.restore(self.keeper.db, chat_id)
        except StoreError as e:
            self._deleted = chat_id
            self.trouble(str(e))
            return
        await self._open(chat_id, None)

    def do_export(self, argument: str) -> None:
        """Write the chat to a file."""
        self.say(export_talk(self.talk, argument))

    def _export_of(self, chat_id: str) -> str:
        try:
            talk = self.keeper.open(chat_id)
        except StoreError as e:
            return str(e)
        return export_talk(talk, "") if talk else "That chat is gone."

    async def do_import(self, path: str) -> None:
        """Read a chat from a file and open it."""
        try:
            talk = import_talk(path)
        except RingError as e:
            self.trouble(str(e))
            return
        self.keeper.keep(talk, *talk.turns.values())
        await self.open_chat(talk)

    def do_attach(self, path: str) -> None:
        """Attach a file to the question being written."""
        self.entry.attach(path)

    def do_help(self, _: str) -> None:
        """Show commands and keys."""
        self.app.push_screen(HelpScreen(self.config.keys))

    def do_quit(self, _: str) -> None:
        """Leave."""
        self.stop_now()
        self.keep_draft()
        self.app.exit()
