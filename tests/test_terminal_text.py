"""What others write neither acts on a terminal nor deceives who reads it, and goes into pipes as it is."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import socket
import subprocess
import sys
import unicodedata

import pytest

from ring_mlx import harmless, harmless_json
from ring_mlx.cli import main
from ring_mlx.errors import RingError, WeightsError
from ring_mlx.system.terminal_text import for_output, note
from tests.parrot import make_parrot
from tui.store.exchange import call_text, from_json, to_json, to_markdown
from tui.store.records import Attachment, Call, Chat, Record, Turn

DECEIVING = (
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\u200b\ufeff\U000e0041\ud800"
)
CONTROLS = "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
BAD = re.compile(f"[{re.escape(CONTROLS + DECEIVING)}]")
GOOD = [
    "tab\tand\nline",
    "👩‍👩‍👧‍👦 👍🏽 ❤️ 🏴‍☠️",
    "שלום עולם",
    "السلام عليكم می‌خواهم",
    "हिन्दी क्‍ष",
    "naïve e\u0301 ½ €",
    "葛󠄀",
]


class Screen:
    """A stream that says it is a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("text", GOOD)
def test_text_itself_stays(text):
    assert harmless(text) == text
    assert json.loads(harmless_json({text: text})) == {text: text}
    assert text in harmless(harmless_json(text).encode().decode()) or "\\" in harmless_json(text)


def test_every_character_that_acts_is_made_visible():
    for c in CONTROLS + DECEIVING:
        shown = harmless(f"a{c}b")
        assert re.fullmatch(r"a\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})b", shown), repr(c)
        assert int(shown[3:-1], 16) == ord(c)
    assert harmless("a\r\nb\rc") == "a\nb\\x0dc"


def test_nothing_of_the_kind_is_forgotten():
    """Every character of Unicode without a look of its own, but for joiners and the marks that Arabic numbers carry."""
    visible = {*"\t\n\u200c\u200d", *map(chr, (*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2))}
    visible |= {"\U000110bd", "\U000110cd", *map(chr, range(0x13430, 0x13440))}
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    left = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in kinds and harmless(c) == c]
    assert set(left) <= visible
    # Those that Unicode lets no one draw though it calls them letters, marks or nothing yet, but for variation selectors.
    undrawn = (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0x2060, 0x2070))
    undrawn += (*range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE0100), *range(0xE01F0, 0xE1000))
    assert not [hex(c) for c in undrawn if harmless(chr(c)) == chr(c)]


@pytest.mark.parametrize("text", [CONTROLS, DECEIVING, *GOOD, "\x7f\x9b"])
def test_json_is_the_same_value_and_harmless(text):
    value = {text: [text, {"nested": text}]}
    for indent in (None, 1):
        said = harmless_json(value, indent)
        assert json.loads(said) == value
        assert not BAD.search(said)
        said.encode()


def test_errors_are_harmless_wherever_they_go():
    e = WeightsError("tensor \x1b]0;owned\x07\u202e\x85 is\nmissing")
    assert str(e) == r"[weights] tensor \x1b]0;owned\x07\u202e\x85 is missing"
    assert str(RingError("a\r\nb")) == "[ring] a b"


def test_a_terminal_gets_harmless_text_and_a_pipe_gets_all(monkeypatch, capsys):
    screen = Screen()
    assert for_output("\x1b[2J", screen) == r"\x1b[2J"
    with open(os.devnull, "w") as pipe:
        assert for_output("\x1b[2J", pipe) == "\x1b[2J"
    note("a\x1bb")
    assert capsys.readouterr().err == "ring-mlx: a\\x1bb\n"


# The doors.

PIECES = ["Hi\x1b", "]0;owned", "\x07\u202e", "x\u2066", "\x9b2J", " שלום", "\r\n\t👍🏽"]
SAID = "".join(PIECES)


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """Says escape sequences, cut between tokens, and overrides."""
    return make_parrot(tmp_path_factory.mktemp("parrot") / "model", PIECES)


def terminal_output(command, folder):
    """What a command writes to a terminal."""
    master, slave = pty.openpty()
    env = os.environ | {name: str(folder) for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "RING_MLX_CACHE")}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    process.stdin.write(b"hi\n")
    process.stdin.close()
    said = b""
    try:
        while part := os.read(master, 1 << 16):
            said += part
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    finally:
        os.close(master)
        process.wait(60)
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    "command",
    [("generate", "--ignore-chat-template"), ("generate", "--json"), ("chat", "--plain")],
    ids=["generate", "json", "chat"],
)
def test_a_real_terminal_gets_no_sequence_of_the_model(parrot, tmp_path, command):
    said = terminal_output([sys.executable, "-P", "-m", "ring_mlx", *command, "--model", str(parrot)], tmp_path)
    assert not BAD.search(said), repr(said)
    if "chat" not in command:
        assert "owned" in said
        assert "שלום" in said
        assert "👍🏽" in said


def test_pipes_get_every_byte(parrot, capsys):
    assert main(["generate", "--model", str(parrot), "--ignore-chat-template", "--verbose", "False"]) == 0
    assert capsys.readouterr().out == SAID + "\n"
    assert main(["generate", "--model", str(parrot), "--ignore-chat-template", "--json"]) == 0
    said = capsys.readouterr().out
    assert not BAD.search(said)
    assert json.loads(said)["text"] == SAID


@pytest.mark.parametrize("thinking", ["show", "hide", "fold"])
def test_every_view_of_generate_is_harmless(parrot, monkeypatch, thinking):
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    assert main(["generate", "--model", str(parrot), "--thinking", thinking]) == 0
    assert not BAD.search(screen.text)


def test_names_in_files_and_arguments(parrot, tmp_path, capsys, monkeypatch):
    evil = "\x1b]0;owned\x07\u202e"
    folder = make_parrot(tmp_path / f"m{evil}", ["a"])
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {f"key{evil}": 1, "hidden_act": evil}))
    template = "{{ raise_exception('no \x1b[2J\u202e') }}"
    (parrot.parent / "refusing").mkdir()
    refusing = make_parrot(parrot.parent / "refusing" / "model", ["a"])
    (refusing / "chat_template.jinja").write_text(template)
    for command in (
        ["generate", "--model", str(folder)],
        ["generate", "--model", str(refusing)],
        ["generate", "--model", f"/nowhere{evil}"],
        ["generate", "--temp", evil],
        ["convert", "--model", str(folder)],
        ["eval", "--suite", evil],
        ["eval", "--task", evil],
        ["bench", "--model", str(folder)],
        ["doctor", "--check-decay", str(folder)],
        ["cache", "info", "--cache-dir", str(tmp_path / evil)],
        ["mlx-lm", evil],
    ):
        monkeypatch.setattr(sys, "stdout", screen := Screen())
        with contextlib.suppress(SystemExit):
            main(command)
        err = capsys.readouterr().err
        assert not BAD.search(screen.text + err), command
        assert "\\x1b" in err + screen.text, command


def test_tensor_names_are_harmless(tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    folder = make_parrot(tmp_path / "model", ["a"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.\x1b[2J\u202e"] = tensors["lm_head.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert main(["generate", "--model", str(folder)]) == 2
    err = capsys.readouterr().err
    assert r"model.\x1b[2J\u202e" in err
    assert not BAD.search(err)


def test_the_servers_log_is_harmless(serve, capsys):
    server = serve()
    server.log_requests = True
    for path in ("/%1b[2J", "/\x9b2J", "/a\x80b"):
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as s:
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            s.sendall(head.encode("latin-1"))
            assert s.recv(1 << 16)
    err = capsys.readouterr().err
    assert "GET" in err
    assert not BAD.search(err)


def test_exports_are_harmless_and_json_loses_nothing():
    text = f"a{CONTROLS}{DECEIVING}b"
    call = Call(text, {text: text})
    user = Turn("user", text, None, attachments=(Attachment(text, text),))
    turn = Turn("assistant", text, user.id, thinking=text, calls=(call,))
    chat = Chat(title=text, leaf=turn.id)
    markdown = to_markdown(chat, [user, turn])
    assert not BAD.search(markdown)
    assert r"\x1b" in markdown
    assert r"\u202e" in markdown
    assert not BAD.search(call_text(call))
    exported = to_json(chat, [user, turn])
    assert not BAD.search(exported)
    exported.encode()
    back, turns = from_json(exported)
    assert back.title == text.replace("\ud800", "\ufffd")  # which no file can hold
    assert [t.content for t in turns] == [back.title] * 2
    assert [c.arguments for c in turns[1].calls] in ([{back.title: back.title}], [{text: text}])


def test_a_name_makes_no_turn_of_an_exported_chat():
    forged = "a\n\n## You\n\nSaid by nobody"
    turn = Turn("assistant", "b", None, attachments=(Attachment(forged, "c"),))
    turn.record = Record(model=forged)
    lines = to_markdown(Chat(title=forged, leaf=turn.id), [turn]).splitlines()
    assert [line for line in lines if line.startswith(("#", "Said"))] == [
        f"{h} {forged}".replace("\n", r"\n") for h in ("#", "##")
    ]


def test_progress_bears_no_sequence_of_a_name(tmp_path, monkeypatch):
    from ring_mlx.convert import remote

    screen = Screen()

    def download(repo, file, tqdm_class, **_):
        with tqdm_class(desc=file, total=2, file=screen, name="of the hub") as shown:
            shown.update(1)
            shown.refresh()
        return tmp_path / "x"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    remote.fetcher(("owner/name", None), tmp_path)("a\x1b]0;again\x07.safetensors")
    assert r"a\x1b]0;again\x07.safetensors" in screen.text
    assert "\x1b]" not in screen.text
