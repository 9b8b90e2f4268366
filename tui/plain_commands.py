"""The commands of plain mode, those of the one table that make sense there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ring_mlx import RingError
from tui import commands, files, paths
from tui.config import Config, ConfigError, Preset, save
from tui.config.schema import with_setting, without_preset
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Figures, Loaded, ModelChoice, Sampling
from tui.models import TOY_NAME
from tui.records import record_lines, sampling_of
from tui.store import Attachment, chats, search
from tui.transfer import export_talk, import_talk

SHOWN = 20


class PlainCommands:
    """A conversation, its settings and what can be done with them.

    Args:
        keeper: Keeps what is said.
        config: Settings at the start.
        talk: The chat to begin with.
    """

    def __init__(self, keeper: Keeper, config: Config, talk: Conversation) -> None:
        self.keeper, self.config, self.talk = keeper, config, talk
        self.model, self.figures, self.number = Loaded("", 0), Figures(), 0
        self.attachments: list[Attachment] = []
        self.is_over = self.wants_answer = self.continues = False
        self.repeated: Sampling | None = None
        self._listed: list[str] = []

    def tell(self, text: str) -> None:
        """Show one line."""
        raise NotImplementedError

    def use_model(self, name: str) -> None:
        """Load another model."""
        raise NotImplementedError

    def command(self, line: str) -> None:
        """Carry out a slash command."""
        found = commands.split(line)
        if found is None or not found[0].plain:
            self.tell(f"There is no command {line.split()[0]} in plain mode; /help lists them.")
            return
        method: Callable[[str], None] = getattr(self, f"do_{found[0].name}")
        try:
            method(found[1])
        except RingError as e:
            self.tell(str(e))

    def take_attachments(self) -> list[Attachment]:
        """What goes with the next question."""
        found, self.attachments = self.attachments, []
        return found

    def choice_of(self, name: str) -> ModelChoice:
        """The model of a name."""
        return ModelChoice(None if name == TOY_NAME else name)

    def do_new(self, _: str) -> None:
        """Begin a new chat."""
        self.talk = Conversation()

    def do_chats(self, words: str) -> None:
        """List chats, search them, or open the one of a number just listed."""
        if words.isdigit() and 1 <= int(words) <= len(self._listed):
            self.talk = self.keeper.open(self._listed[int(words) - 1]) or self.talk
            self.tell(f"Opened {self.talk.chat.title!r}, {len(self.talk.path())} turns.")
            return
        if words:
            hits = search.find(self.keeper.db, words, SHOWN)
            rows = [
                (h.chat, f"{h.title}: {h.snippet.replace(search.OPEN, '[').replace(search.CLOSE, ']')}") for h in hits
            ]
        else:
            rows = [(c.id, c.title or "untitled") for c in chats.listed(self.keeper.db, SHOWN)]
        self._listed = [chat_id for chat_id, _ in rows]
        for n, (_, line) in enumerate(rows, 1):
            self.tell(f"{n:3} {line}")
        self.tell("/chats N opens one." if rows else "There are none.")

    def do_model(self, name: str) -> None:
        """Load another model."""
        if name:
            self.use_model(name)
        else:
            self.tell(f"The model is {self.model.name}; /model NAME loads another one.")

    def do_regenerate(self, _: str) -> None:
        """Answer the last question again."""
        path = self.talk.path()
        question = next((t for t in reversed(path) if t.role == "user"), None)
        if question is not None:
            self.talk.cut_after(question)
            self.wants_answer = True

    def do_repeat(self, _: str) -> None:
        """Answer the last question again as the last answer's record says."""
        self.repeated = sampling_of(self.talk.leaf.record if self.talk.leaf else None)
        if self.repeated is None:
            self.tell("The answer's record names no seed; /regenerate answers with another one.")
        else:
            self.do_regenerate("")

    def do_continue(self, _: str) -> None:
        """Go on with the last answer."""
        leaf = self.talk.leaf
        if leaf is not None and leaf.role == "assistant" and leaf.content and not leaf.calls:
            self.talk.mark(leaf)
            self.wants_answer = self.continues = True

    def do_undo(self, _: str) -> None:
        """Go back before the last change."""
        self.tell(f"{len(self.talk.path())} turns now." if self.talk.undo() else "There is nothing to undo.")
        self.keeper.keep(self.talk)

    def do_record(self, _: str) -> None:
        """Show how the last answer came to be."""
        leaf = self.talk.leaf
        for line in record_lines(leaf.record) if leaf and leaf.record else ["There is no answer yet."]:
            self.tell(line)

    def do_attach(self, path: str) -> None:
        """Attach a file to the next question."""
        self.attachments.append(files.read_attachment(path))

    def do_title(self, title: str) -> None:
        """Rename the chat."""
        if title:
            self.keeper.rename(self.talk, title)

    def do_export(self, argument: str) -> None:
        """Write the chat to a file."""
        self.tell(export_talk(self.talk, argument))

    def do_import(self, path: str) -> None:
        """Read a chat from a file."""
        self.talk = import_talk(path)
        self.keeper.keep(self.talk, *self.talk.turns.values())

    def do_set(self, argument: str) -> None:
        """Change one value."""
        name, _, value = argument.partition(" ")
        try:
            self._use(Preset(with_setting(self.config.sampling, name, value.strip()), self.config.system_prompt))
        except ValueError as e:
            self.tell(f"{e}.")

    def do_system(self, text: str) -> None:
        """Change the system prompt."""
        self._use(Preset(self.config.sampling, text))

    def do_budget(self, argument: str) -> None:
        """Change the thinking budget."""
        self.do_set(f"thinking_budget {argument}")

    def do_preset(self, argument: str) -> None:
        """Use a preset, save one or delete one."""
        word, _, name = argument.partition(" ")
        if word == "save" and name:
            now = Preset(self.config.sampling, self.config.system_prompt)
            self._save(replace(self.config, presets={**self.config.presets, name: now}))
        elif word == "delete" and name in self.config.presets:
            self._save(without_preset(self.config, name))
        elif argument in self.config.presets:
            self._use(self.config.presets[argument])
        else:
            self.tell(f"There are {', '.join(self.config.presets) or 'no presets'}.")

    def do_help(self, _: str) -> None:
        """List the commands."""
        for name, _keys, text in commands.help_rows({}, plain=True):
            self.tell(f"{name:32} {text}")

    def do_quit(self, _: str) -> None:
        """Leave."""
        self.is_over = True

    def _use(self, preset: Preset) -> None:
        self._save(replace(self.config, sampling=preset.sampling, system_prompt=preset.system_prompt))

    def _save(self, config: Config) -> None:
        before, self.config = self.config, config
        try:
            save(paths.config_file(), config, before)
        except ConfigError as e:
            self.tell(str(e))
