"""What is pasted is text, whatever bytes it holds: Textual's driver reads with our parser."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual import events
from textual.drivers import linux_driver

from ring_mlx import harmless
from tests.tui_pilot import FakeEngine
from tests.tui_pty import Pty, chat_command, draft, until
from tui import paste
from tui.app import RingChat
from tui.keeper import Keeper
from tui.paste import END, START, PasteParser
from tui.store import Database, chats

EVIL = [
    "build \x1b[31merror\x1b[0m\n/delete\n",
    "\x1b",
    "\x1b\x1b[A\x1bOP\x1b[<0;1;1M",
    "\x11\x03\x04\x1a\r\x7f\x00",
    START,
    START[:4],
    f"a{END[:5]}",
    f"a{END}/delete\r{END}\x11",
    "]0;title\x07\x1b]52;c;eA==\x1b\\\x9b2J\u202e",
]


@pytest.fixture(scope="module")
def clock():
    """The parsers' clock, which a test turns on."""
    found = [1000.0]
    with pytest.MonkeyPatch.context() as m:
        for module in ("tui.paste.monotonic", "textual._parser.get_time"):
            m.setattr(module, lambda: found[0])
        yield found


def read(clock, *pieces):
    """What a parser makes of pieces of input, each after the seconds beside it, with a tick every 50 ms."""
    parser, found = PasteParser(), []
    for wait_s, piece in [*pieces, (2.0, "")]:
        for _ in range(round(wait_s / 0.05)):
            clock[0] += 0.05
            found += parser.tick()
        if piece:
            found += [*parser.feed(piece), *parser.tick()]
    return found


def keys(found):
    return [e.key for e in found if isinstance(e, events.Key)]


def pastes(found):
    return [e.text for e in found if isinstance(e, events.Paste)]


def clean(text):
    return harmless(text.replace("\r\n", "\n").replace("\r", "\n"))


@pytest.mark.parametrize("text", EVIL)
def test_nothing_in_a_paste_is_a_key(clock, text):
    found = read(clock, (0, f"a{START}{text}{END}"), (0.2, "b"))
    assert keys(found) == ["a", "b"]
    assert pastes(found) == [clean(text)]


@given(
    st.lists(st.sampled_from([*EVIL, *"ab\x1b[~\r", START[:3], END[:4]]), max_size=8).map("".join),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_nor_where_it_comes_in_pieces(clock, text, cuts):
    data = f"{START}{text}{END}"
    ends = sorted({0, len(data), *(c for c in cuts if c < len(data))})
    found = read(clock, *((0.0, data[a:b]) for a, b in pairwise(ends)))
    assert keys(found) == []
    assert "".join(pastes(found)) == clean(text.replace(END + START, ""))  # two pastes


@pytest.mark.parametrize("marker", [START, END])
@pytest.mark.parametrize("at", range(1, 6))
def test_a_marker_split_by_a_pause(clock, marker, at):
    data = f"{START}/delete\r{END}"
    cut = data.index(marker) + at
    found = read(clock, (0, data[:cut]), (0.3, data[cut:]), (0.2, "b"))
    # What is a key by itself, Esc and Alt+[, is one after 0.1 s; nothing else of a marker is.
    alone = {1: ["escape"], 2: ["left_square_bracket"]}.get(at, []) if marker == START else []
    assert keys(found) == [*alone, "b"]
    assert pastes(found) == ["/delete\n"]


def test_keys_are_read_as_before_and_escape_is_not_held_back(clock):
    sequences = [
        "\x1b[A",
        "\x1bOP",
        "\x1b[1;5C",
        "\x1bx",
        "\x1b\x1b",
        "é",
        "\x7f",
        "\r",
        "\x1b[13;2u",
        "\x1b[I",
        "[200~",
    ]
    for sequence in [*sequences, "".join(sequences[:5])]:
        theirs = paste.XTermParser()
        found = [*theirs.feed(sequence)]
        clock[0] += 0.2
        assert keys(read(clock, (0, sequence))) == keys([*found, *theirs.tick()]), sequence
    parser = PasteParser()
    assert keys(parser.feed("\x1b")) == []
    clock[0] += 0.11
    assert keys(parser.tick()) == ["escape"]
    assert keys(parser.feed("a")) == ["a"]


def test_the_end_of_the_input_is_passed_on():
    parser = PasteParser()
    assert [*parser.feed(f"{START}never ended")] == []
    assert [*parser.feed("")] == []
    assert parser.is_eof


def test_a_large_log_is_one_paste_and_quick(clock):
    text = "\x1b[31merror\x1b[0m: a line of a log\r\n" * 30_000  # 1 MB; Textual's parser made 8,631 keys of 192 KB
    data, started = f"{START}{text}{END}", time.process_time()
    found = read(clock, *((0, data[n : n + 4096]) for n in range(0, len(data), 4096)))
    assert [type(e) for e in found] == [events.Paste]
    assert found[0].text == clean(text)
    assert time.process_time() - started < 5


def test_the_chat_puts_it_in_the_place_of_textuals():
    """The names that are replaced must be those that Textual's driver uses."""
    assert {"XTermParser", "getincrementaldecoder"} <= set(linux_driver.LinuxDriver.run_input_thread.__code__.co_names)
    RingChat(FakeEngine(), Keeper(None, print))
    assert linux_driver.XTermParser is PasteParser
    assert linux_driver.getincrementaldecoder("utf-8")().decode(b"a\xffb") == "a\ufffdb"


@pytest.fixture
def terminal(tmp_path):
    """A chat of two turns in a pseudo-terminal: its store, what writes raw bytes to it, and the process."""
    path = tmp_path / "chats.db"
    found = Pty(chat_command(path), tmp_path, b"Ask something")
    yield path, found.write, found.process
    found.close()


def test_raw_bytes_through_a_pseudo_terminal(terminal):
    """What a log with colours did: delete the chat. It becomes text, and the keys after it are keys."""
    path, write, process = terminal
    log = b"build \x1b[31merror\x1b[0m\r/delete\r\x1b[A\x11\x1b\xff\x03\x1b[201~/delete\r"
    write(b"x\x1b[200~" + log + b"\x1b[201~")
    wanted = "xbuild \\x1b[31merror\\x1b[0m\n/delete\n\\x1b[A\\x11\\x1b\ufffd\\x03\\x1b[201~/delete\n"
    until(lambda: draft(path) == wanted)
    write(b"\x7fend")
    until(lambda: draft(path) == wanted[:-1] + "end")
    write(b"\x11")
    assert process.wait(20) == 0
    db = Database(path)
    assert [c.title for c in chats.listed(db)] == ["kept"]
    db.close()
