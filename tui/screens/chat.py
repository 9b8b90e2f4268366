"""The chat's main screen: its keys, and the commands about chats and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from textual import on
from textual.binding import Binding, BindingType

from tui import commands
from tui.chat_settings import model_name, raw_model
from tui.config import Preset
from tui.conversation import Conversation
from tui.front_end import Done
from tui.gauges import counted
from tui.keys import COMMANDS
from tui.messages import Entitled, ModelChoice
from tui.screens.chats import ChatsScreen, Chosen
from tui.screens.editor import EditorCommands
from tui.screens.models import ModelsScreen
from tui.screens.other_model import GO_ON, LOAD, OtherModelScreen
from tui.screens.real_models import RealModelsScreen
from tui.screens.settings import SettingsScreen
from tui.screens.text import HelpScreen, PreviewScreen
from tui.screens.tree import TreeScreen
from tui.store import StoreError, chats
from tui.themes import CYCLE
from tui.transfer import export_talk
from tui.widgets.entry import Entry
from tui.widgets.turn import TurnView
from tui.widgets.welcome import Welcome

IN_FOOTER = ("stop", "new", "chats", "model", "settings", "help", "quit")


class ChatScreen(EditorCommands):
    """The keys, and the commands about chats and settings; settings hold from the next answer on."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            c.key,
            f"command('{c.name}')",
            c.label or c.name,
            show=c.name in IN_FOOTER,
            id=c.name,
            priority=c.name in ("quit", "suspend"),
        )
        for c in commands.COMMANDS
        if c.key and c.name != "interrupt"  # which is the application's, on every screen
    ]
    _deleted: str | None = None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Dim the stop key while no answer runs; hide the keys of branches if there are none."""
        if action == "command" and parameters == ("stop",) and self.answer is None:
            return None
        if action == "command" and parameters[0] in ("next", "previous") and isinstance(self.focused, TurnView):
            return self.focused.branch[1] > 1
        return True

    async def action_command(self, name: str) -> None:
        await self.carry_out(commands.NAMED[name], "")

    async def carry_out(self, command: commands.Command, argument: str) -> None:
        await self.attempt(lambda: self.method_of(command)(argument))

    @on(Entry.Commanded)
    async def commanded(self, message: Entry.Commanded) -> None:
        """Carry out a slash command, or say that it does not exist."""
        found = commands.split(message.text)
        if found is None:
            self.say(f"There is no command {message.text.split()[0]}; /help lists them.", "warning")
            self.entry.prompt.replace_text(message.text)
        else:
            await self.carry_out(*found)

    @on(Entitled)
    def title_made(self, message: Entitled) -> None:
        self.entitled(message)

    def do_chats(self, words: str) -> None:
        self.keeper.flush()

        def chosen(found: Chosen | None) -> None:
            self.run_worker(self.attempt(lambda: self._after_list(found)), group=COMMANDS)

        self.app.push_screen(ChatsScreen(self.keeper.db, words, self.talk.chat.id, self._export_of), chosen)

    async def _after_list(self, found: Chosen | None) -> None:
        """Apply changes of the list to the chat in view; open the chosen chat."""
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
        if chat_id == self.talk.chat.id:
            await self._open_again(turn_id)
        elif (talk := self.keeper.open(chat_id)) is None:
            self.say("That chat is gone.")
        else:
            if turn_id is not None:
                talk.reveal(turn_id)
            await self.open_chat(talk, at=turn_id)

    async def _open_again(self, turn_id: str | None) -> None:
        """Show the chat in view with turns that other windows have added; they are gone to if they follow those in view."""
        new, leaf = self.catch_up(), self.talk.chat.leaf
        after = next((t.id for t in reversed(new) if t.parent == leaf), None)
        if self.answer is not None:
            if turn_id in {t.id for t in self.talk.path()}:
                await self.turns.go(str(turn_id))
            elif turn_id is not None:
                assert self.is_busy  # says so
            return
        if (wanted := turn_id or after) is not None:
            self.talk.reveal(wanted)
        await self.refresh_turns(focus=turn_id)
        if new and after is None:
            self.say(f"Another window has added {counted(len(new), 'turn')} on other branches; /tree shows them.")

    @on(Welcome.Chosen)
    async def started(self, message: Welcome.Chosen) -> None:
        """Begin as the first screen offers."""
        if message.kind == "ask":
            await self.asked(Entry.Asked(message.value, []))
        elif message.kind == "open":
            await self.attempt(lambda: self._open(message.value, None))
        else:
            self.app.push_screen(RealModelsScreen())

    @on(Welcome.Typed)
    def typed_beside(self, message: Welcome.Typed) -> None:
        """Have the prompt take what was typed where nothing can be written."""
        self.entry.prompt.focus()
        self.entry.prompt.post_message(message.event)

    def _export_of(self, chat_id: str) -> str:
        try:
            talk = self.keeper.open(chat_id)
        except StoreError as e:
            return str(e)
        return export_talk(talk, "") if talk else "That chat is gone."

    def do_tree(self, _: str) -> None:
        def chosen(turn_id: str | None) -> None:
            if turn_id is not None:
                self.run_worker(self.attempt(lambda: self._open_again(turn_id)), group=COMMANDS)

        self.catch_up()
        if self.talk.turns:
            turn = self.chosen()
            self.app.push_screen(TreeScreen(self.talk, turn.id if turn else None), chosen)
        else:
            self.say("There are no turns yet.")

    def do_pin(self, _: str) -> None:
        if not self.talk.turns:
            self.say("There is nothing to pin yet; ask something first.")
            return
        self.keeper.pin(self.talk, not self.talk.chat.pinned)
        self.say("Pinned." if self.talk.chat.pinned else "Unpinned.")

    async def do_delete(self, _: str) -> None:
        if not self.talk.turns:
            self.say("There is no chat yet.")
            return
        chat_id = self.talk.chat.id
        await self.open_chat(Conversation())
        self.keeper.db.write(chats.deleting(chat_id))
        self._deleted = chat_id
        self.welcome()  # which had it among the recent chats
        self.say("Deleted; /restore brings it back.")

    async def do_restore(self, _: str) -> None:
        if self._deleted is None:
            self.say("No chat was deleted here.")
            return
        self.keeper.db.write(chats.restoring(self._deleted))
        chat_id, self._deleted = self._deleted, None
        await self._open(chat_id, None)

    def do_attach(self, path: str) -> None:
        self.entry.attach(path)

    def do_attached(self, argument: str) -> None:
        chips = self.entry.attachments.chips
        number = int(argument[:9]) if argument.isdecimal() else 1
        if not 1 <= number <= len(chips):
            self.say(
                f"There are attachments 1 to {len(chips)}." if chips else "Nothing is attached; @path attaches a file."
            )
            return
        chip = chips[number - 1]

        def read(is_unwanted: bool | None) -> None:
            if is_unwanted:
                chip.take_away()

        self.app.push_screen(PreviewScreen(chip.text, chip.attachment.text), read)

    def do_model(self, name: str) -> None:
        def chosen(choice: ModelChoice | None) -> None:
            if choice is not None:
                self.use_model(choice)

        if name:
            super().do_model(name)
        else:
            self.app.push_screen(ModelsScreen(self.model.name, self.config.model_folders), chosen)

    def use_model(self, choice: ModelChoice) -> None:
        self.status.show("loading the model")
        self.switch_model(choice)

    def offer_model(self, action: Callable[[], Done]) -> None:
        own, coming = self.own.model, self.coming
        assert own is not None
        assert coming is not None

        async def declined() -> None:
            self.decline()
            await self.refresh_turns()
            self.entry.prompt.focus()

        def chosen(way: str | None) -> None:
            if way == LOAD:
                self.switch_model(own, for_new=False)
            elif way == GO_ON:
                self.change({"model": raw_model(coming)})
            self.run_worker(self.attempt(action if way else declined), group=COMMANDS)

        self.app.push_screen(OtherModelScreen(model_name(own), model_name(coming)), chosen)

    def do_settings(self, _: str) -> None:
        shown = self.own

        def chosen(preset: Preset | None) -> None:
            if preset is None:
                return
            self.use(preset, shown)
            if screen.are_defaults:
                self.save_defaults()
            else:
                self.say("The settings hold in this chat, from the next answer on.")

        def delete(name: str) -> None:
            self.save_config(self.config.without(name))

        now, default = (
            Preset(shown.sampling, shown.system_prompt),
            Preset(self.config.sampling, self.config.system_prompt),
        )
        screen = SettingsScreen(now, self.config.presets, delete, self.model.sampling, default)
        self.write_in(screen, chosen)

    def do_theme(self, name: str) -> None:
        if name and name not in self.app.available_themes:
            self.say(f"There is no theme {name}; the palette lists them.", "warning")
            return
        at = CYCLE.index(self.app.theme) if self.app.theme in CYCLE else -1
        self.app.theme = name or CYCLE[(at + 1) % len(CYCLE)]

    def keep_theme(self, name: str) -> None:
        if name != self.config.theme:
            self.save_config(replace(self.config, theme=name))

    def do_help(self, _: str) -> None:
        self.app.push_screen(HelpScreen(self.config.keys))

    def do_interrupt(self, _: str) -> None:
        """Stop the answer, or else clear the prompt."""
        if self.answer is not None:
            self.engine.stop()
            said = "Stopped."
        else:
            said = "Cleared; Up brings it back." if self.entry.prompt.put_away() else ""
        self.say(f"{said} Once more quits.".lstrip())

    def do_suspend(self, _: str) -> None:
        self.app.action_suspend_process()

    def do_quit(self, _: str) -> None:
        self.stop_now()
        self.keep_draft()
        self.app.exit()
