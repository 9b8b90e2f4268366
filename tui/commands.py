"""The one table of commands: slash commands, keys, palette and help all come from it.

The command ``new`` is carried out by the method ``do_new`` of the screen or of plain mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ON_SCREEN = ("temp", "top_p", "top_k", "min_p", "max_tokens", "thinking_budget", "seed")
SETTINGS = (*ON_SCREEN, "xtc_probability", "xtc_threshold")  # of answers, by /set


@dataclass(frozen=True)
class Command:
    """A command of the chat.

    Args:
        name: Typed after a slash, the name in the configuration's keys.
        help: One line.
        key: Keys anywhere in the chat, with commas between them.
        turn_key: Keys while a turn has the focus; it is then about that turn, else about the last one.
        argument: What may follow the name, for help.
        label: In the footer, where it is shown.
        plain: Whether ``chat --plain`` has it.
    """

    name: str
    help: str
    key: str = ""
    turn_key: str = ""
    argument: str = ""
    label: str = ""
    plain: bool = False


COMMANDS = (
    Command("stop", "end the running answer and keep what is written", "escape", label="Stop"),
    Command("interrupt", "end the answer, else clear the prompt; twice quits", "ctrl+c"),
    Command("new", "begin a new chat", "ctrl+n", label="New", plain=True),
    Command("chats", "list, search and open chats", "ctrl+o", argument="[WORDS]", label="Chats", plain=True),
    Command("model", "choose another model", "ctrl+l", argument="[FOLDER or OWNER/NAME]", label="Model", plain=True),
    Command("settings", "sampling, thinking budget, system prompt and presets", "ctrl+s", label="Settings"),
    Command("regenerate", "answer again, beside the present answer", "ctrl+r", "r", label="Again", plain=True),
    Command("repeat", "again with the same seed and sampling, beside the present answer", "", "s", plain=True),
    Command("edit", "change a question and ask again, or change an answer", "", "e", label="Edit"),
    Command("continue", "go on with an answer that was cut off", "ctrl+g", "g", plain=True),
    Command("branch", "go back to a turn; what you say next begins a branch", "", "b", label="Branch"),
    Command("next", "the next branch of a turn", "", "right_square_bracket", label="Next"),
    Command("previous", "the previous branch of a turn", "", "left_square_bracket", label="Prev"),
    Command("tree", "all branches as a tree; choose a turn to go there", "", "m"),
    Command("undo", "take the last question, edit, answer or branch back", "", "u", plain=True),
    Command("copy", "copy a turn without its thought", "", "c", label="Copy"),
    Command("code", "copy a code block of an answer, the last or the n-th", "", "y", "[N]"),
    Command("compact", "sum this chat up; a new one goes on from the summary"),
    Command("thought", "open or fold the thought", "", "t", label="Thought"),
    Command("record", "how an answer came to be: speed, tokens, sampling, seed", "", "i", label="Record", plain=True),
    Command("up", "go to the turn above", "alt+up,ctrl+up", "up,k"),
    Command("down", "go to the turn below", "alt+down,ctrl+down", "down,j"),
    Command("first", "go to the first turn", "", "home"),
    Command("last", "go to the last turn", "", "end"),
    Command("find", "search in this chat", "ctrl+f", argument="[TEXT]", plain=True),
    Command("go", "go to a turn by its number", argument="N"),
    Command("editor", "write the question in your editor (VISUAL, EDITOR)", "f4", plain=True),
    Command("attach", "attach a text file to the question", argument="PATH", plain=True),
    Command("attached", "read what is attached to the next question, or the n-th of it", argument="[N]"),
    Command("title", "rename this chat", argument="TEXT", plain=True),
    Command("pin", "keep this chat at the top of the list, or no longer"),
    Command("delete", "delete this chat; /restore brings it back"),
    Command("restore", "bring the chat deleted last back"),
    Command("export", "write this chat to a file", argument="[md|json] [PATH]", plain=True),
    Command("import", "read a chat from an exported JSON file", argument="PATH", plain=True),
    Command("set", "change one setting of this chat", argument="NAME VALUE", plain=True),
    Command("system", "change this chat's system prompt; without text, none", argument="[TEXT]", plain=True),
    Command("budget", "close a thought after so many tokens; without, near the limit", argument="[N]", plain=True),
    Command(
        "preset",
        "use a named preset, save the settings as one, or delete one",
        argument="[save|delete] NAME",
        plain=True,
    ),
    Command(
        "defaults", "go back to the default settings, or make this chat's the defaults", argument="[save]", plain=True
    ),
    Command("theme", "the next theme, or the one named", "ctrl+t", argument="[NAME]"),
    Command("help", "commands and keys", "f1", label="Help", plain=True),
    Command("suspend", "stop for the shell; fg comes back", "ctrl+z"),
    Command("quit", "leave; everything is kept", "ctrl+q", label="Quit", plain=True),
)
NAMED = {c.name: c for c in COMMANDS}
ALSO = {  # names that other chats have for them
    "clear": "new",
    "exit": "quit",
    "fork": "branch",
    "history": "chats",
    "q": "quit",
    "rename": "title",
    "retry": "regenerate",
    "save": "export",
    "sessions": "chats",
    "system-prompt": "system",
}


def split(text: str) -> tuple[Command, str] | None:
    """The command and its argument in a text that begins with a slash; None where it names no command.

    A unique beginning of a name is enough.
    """
    name, _, argument = text.removeprefix("/").partition(" ")
    if not text.startswith("/"):
        return None
    name = ALSO.get(name, name)
    found = [NAMED[name]] if name in NAMED else completions(f"/{name}")
    return (found[0], argument.strip()) if len(found) == 1 and name else None


def is_command(text: str) -> bool:
    """Whether a text is meant as a command: a slash and one word, not a path; only a system prompt may have several lines."""
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text.startswith("/") and "/" not in first[1:] and ("\n" not in text or text.startswith("/system "))


def completions(text: str) -> list[Command]:
    """The commands that a text with a slash may become."""
    name = text.removeprefix("/")
    return [c for c in COMMANDS if c.name.startswith(name)] if text.startswith("/") else []


def help_rows(keys: dict[str, str], plain: bool = False) -> list[tuple[str, str, str]]:
    """Command, keys and help of every command, with the keys in force; keys on a turn are in brackets.

    Args:
        keys: Remapped ones by name.
        plain: Only those of ``chat --plain``, without keys.
    """
    rows = []
    for c in COMMANDS:
        key, turn_key = keys.get(c.name, c.key), keys.get(f"turn_{c.name}", c.turn_key)
        shown = [*([shown_key(key)] if key else []), *([f"({shown_key(turn_key)})"] if turn_key else [])]
        if c.plain or not plain:
            rows.append((f"/{c.name} {c.argument}".rstrip(), "" if plain else " ".join(shown), c.help))
    return rows


def first_key(command: Command, keys: Mapping[str, str]) -> str:
    """A command's first key, or in brackets that on a turn, as shown to users.

    Args:
        command: Any.
        keys: Remapped ones by name.
    """
    key, turn_key = (
        keys.get(n, k).split(",")[0]
        for n, k in ((command.name, command.key), (f"turn_{command.name}", command.turn_key))
    )
    return shown_key(key) if key else f"({shown_key(turn_key)})" if turn_key else ""


def shown_key(keys: str) -> str:
    """Keys as shown to users."""
    names = {"left_square_bracket": "[", "right_square_bracket": "]", "escape": "Esc"}
    shown = [names.get(k, k.replace("ctrl+", "^").replace("alt+", "Alt+").replace("up", "↑")) for k in keys.split(",")]
    return " ".join(k.replace("down", "↓") for k in shown)
