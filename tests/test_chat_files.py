"""The chat's files: private, brought to the disk, bounded when they are read, and one line where they cannot be had."""

from __future__ import annotations

import io
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ring_mlx import RingError
from tui import config, files
from tui.config import Config
from tui.conversation import Conversation
from tui.store import Chat, Database, StoreError, Turn, chats, search, turns
from tui.transfer import export_talk, import_talk

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may be another user")


def mode(path):
    return oct(stat.S_IMODE(path.stat().st_mode))


def talk_of(*said):
    talk = Conversation(Chat("a chat"))
    for n, text in enumerate(said):
        talk.add("assistant" if n % 2 else "user", text)
    return talk


def save(db, talk):
    db.write(chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values()))


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_a_store_is_the_users_alone_whatever_the_umask(tmp_path, umask):
    folder = tmp_path / "data" / "ring-mlx"
    db = Database(folder / "chats.db")
    save(db, talk_of("secret"))
    assert mode(folder) == "0o700"
    found = {path.name: mode(path) for path in folder.iterdir()}
    assert found == dict.fromkeys(("chats.db", "chats.db-wal", "chats.db-shm", "chats.db.lock"), "0o600")
    db.close()


def test_an_older_store_that_others_may_read_is_tightened(tmp_path):
    path = tmp_path / "data" / "chats.db"
    db = Database(path)
    save(db, talk_of("secret"))
    for name, bits in ((path.parent, 0o755), (path, 0o644), (f"{path}-wal", 0o666), (f"{path}-shm", 0o644)):
        os.chmod(name, bits)
    again = Database(path)
    assert again.notes == []
    assert mode(path.parent) == "0o700"
    assert {mode(p) for p in path.parent.iterdir()} == {"0o600"}
    again.close()
    db.close()


def test_a_rescued_store_and_the_damaged_one_are_private_too(tmp_path, umask):
    path = tmp_path / "data" / "chats.db"
    path.parent.mkdir()
    path.write_bytes(b"x" * 5000)
    path.chmod(0o644)
    Database(path).close()
    assert {p.name: mode(p) for p in path.parent.iterdir() if "lock" not in p.name} == {
        "chats.db": "0o600",
        "chats.db.damaged-1": "0o600",
    }


def test_a_folder_that_is_everybodys_keeps_its_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, bits in (("sticky", 0o1777), ("home", 0o755)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(bits)
        Database(tmp_path / name / "chats.db").close()
        assert mode(tmp_path / name) == oct(bits)
        assert mode(tmp_path / name / "chats.db") == "0o600"


@pytest.mark.parametrize("bits", [0o755, 0o775])
def test_a_folder_that_holds_other_things_keeps_its_mode(tmp_path, monkeypatch, bits):
    """Such as a project's, where somebody says RING_MLX_HOME=. ."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "main.c").write_text("")
    for name in (".", "sub"):
        (tmp_path / "project").chmod(bits if name == "." else 0o755)
        monkeypatch.chdir(tmp_path / "project")
        db = Database(Path(name, "chats.db"))
        save(db, talk_of("secret"))
        assert mode(tmp_path / "project") == (oct(bits) if name == "." else "0o755")
        assert {mode(file) for file in Path(name).glob("chats.db*")} == {"0o600"}
        db.close()
    assert mode(tmp_path / "project" / "sub") == "0o700"


def test_a_folder_of_ours_alone_is_tightened(tmp_path):
    (tmp_path / "data" / "snapshots").mkdir(parents=True)
    for name in ("config.toml", "history", "chats.db.damaged-1"):
        (tmp_path / "data" / name).write_text("")
    (tmp_path / "data").chmod(0o755)
    Database(tmp_path / "data" / "chats.db").close()
    assert mode(tmp_path / "data") == "0o700"


def test_a_folder_behind_a_link(tmp_path):
    (tmp_path / "real").mkdir(0o755)
    (tmp_path / "link").symlink_to("real")
    db = Database(tmp_path / "link" / "chats.db")
    save(db, talk_of("hi"))
    db.close()
    assert mode(tmp_path / "real") == "0o700"


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "lost link", "file as folder"])
def test_what_cannot_be_a_store_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "chats.db"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "lost link":
        path.symlink_to(tmp_path / "nowhere" / "chats.db")
    else:
        path.write_text("")
        path = path / "chats.db"
    with pytest.raises(StoreError, match=r"^\[store\] .* what is new stays in memory \([^\n]+\)\.$"):
        Database(path)


AS_ANOTHER = """
import os, sys
from pathlib import Path
from tui.keeper import Keeper
from tui.conversation import Conversation
os.setgroups([]); os.setgid(65534); os.setuid(65534)
keeper = Keeper(Path(sys.argv[1]), print)
talk = Conversation()
keeper.keep(talk, talk.add("user", "hello"))
print(keeper.close())
"""


@ROOT_ONLY
@pytest.mark.parametrize(("folder_mode", "said"), [(0o755, "cannot be opened or written"), (0o777, "others may read")])
def test_a_folder_of_another_user(tmp_path, folder_mode, said):
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(folder_mode)
    for above in (folder, *folder.parents):
        if above != folder and not above.stat().st_mode & stat.S_IXOTH:
            above.chmod(above.stat().st_mode | stat.S_IXOTH)
    command = [sys.executable, "-c", AS_ANOTHER, str(folder / "chats.db")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    assert lines[0].startswith("[store] ")
    assert said in lines[0]
    assert lines[1] == str(folder_mode == 0o777)


def test_what_is_said_to_be_written_outlives_a_power_cut(tmp_path):
    db = Database(tmp_path / "chats.db")
    values = {name: db.read(f"PRAGMA {name}")[0][0] for name in ("synchronous", "fullfsync", "checkpoint_fullfsync")}
    assert values == {"synchronous": 2, "fullfsync": 1, "checkpoint_fullfsync": 1}
    assert db.read("PRAGMA journal_mode")[0][0] == "wal"
    assert db.read("PRAGMA foreign_keys")[0][0] == 1
    db.close()


def test_what_is_removed_is_gone_from_the_file(tmp_path):
    """Else a rescue would bring back what was deleted, and older versions of a turn."""
    db = Database(tmp_path / "chats.db")
    talk = talk_of("kept", "the old words " * 500)
    save(db, talk)
    talk.leaf.content = "new"
    db.write(turns.saving(talk.chat.id, talk.leaf))
    db.close()
    assert b"the old words" not in (tmp_path / "chats.db").read_bytes()


def test_exports_and_settings_are_private_unless_they_are_there_already(tmp_path, umask):
    talk = talk_of("q", "a")
    (tmp_path / "shared.md").write_text("")
    (tmp_path / "shared.md").chmod(0o644)
    for name in ("new.md", "new.json", "shared.md"):
        assert export_talk(talk, str(tmp_path / name)) == f"Written to {tmp_path / name}."
    config.save(tmp_path / "config" / "config.toml", Config(system_prompt="private"))
    assert [mode(tmp_path / name) for name in ("new.md", "new.json", "shared.md")] == ["0o600", "0o600", "0o644"]
    assert mode(tmp_path / "config" / "config.toml") == "0o600"


def test_settings_behind_a_link_stay_there(tmp_path):
    (tmp_path / "config.toml").symlink_to(tmp_path / "dotfiles.toml")
    (tmp_path / "dotfiles.toml").write_text("# mine\n")
    config.save(tmp_path / "config.toml", Config(theme="x"))
    assert (tmp_path / "config.toml").is_symlink()
    assert (tmp_path / "dotfiles.toml").read_text().startswith("# mine\n")


def test_a_file_over_the_limit_is_not_attached(tmp_path):
    file = tmp_path / "big.txt"
    file.write_bytes(b"x" * files.MOST_BYTES)
    assert len(files.read_attachment(str(file)).text) == 4_000_000
    file.write_bytes(b"x" * (files.MOST_BYTES + 1))
    with pytest.raises(files.AttachError, match=r"^\[attach\] .* has more than 4 MB"):
        files.read_attachment(str(file))
    file.write_bytes(b"")
    os.truncate(file, 1 << 40)
    with pytest.raises(files.AttachError, match="has more than 4 MB"):
        files.read_attachment(str(file))


@pytest.mark.parametrize(
    "name", ["pipe", "folder", "/dev/zero", "/dev/null", "nowhere", "~nobody-of-that-name/x", "a\0b"]
)
def test_what_is_no_file_is_neither_attached_nor_imported_nor_exported_to(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    path = name if name[0] in "/~" else str(tmp_path / name)
    for read in (files.read_attachment, import_talk):
        with pytest.raises(RingError, match=r"^\[(attach|store)\] [^\n]*$"):
            read(path)
    if name != "nowhere":
        assert export_talk(talk_of("q"), f"md {path}").startswith("[export] ")
    no_folder = tmp_path / "mistyped" / "chat.md"
    assert export_talk(talk_of("q"), f"md {no_folder}") == (
        f"[export] there is no folder {no_folder.parent}; make it, or give another path."
    )
    assert not no_folder.parent.exists()
    _, wrong = config.load(tmp_path / "pipe")
    assert "cannot be read" in wrong


def test_bytes_that_no_text_has_are_not_attached(tmp_path):
    (tmp_path / "a").write_bytes(b"a\0b")
    with pytest.raises(files.AttachError, match="is not text"):
        files.read_attachment(str(tmp_path / "a"))


def test_a_file_that_would_wait_is_not_attached(tmp_path, monkeypatch):
    """As the kernel's log in /proc, which a pipe's mode does not show."""

    class Waits(io.FileIO):
        def read(self, size=-1):
            return None

    (tmp_path / "log").touch()
    monkeypatch.setattr("ring_mlx.system.files.open", Waits, raising=False)
    with pytest.raises(files.AttachError, match="is not a file"):
        files.read_attachment(str(tmp_path / "log"))


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 20_000, "a = 1\n" * 300_000, "\0", "\udcff", "[sampling]\ntop_k = inf"]
)
def test_settings_that_cannot_be_read_are_said_in_one_line(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    found, wrong = config.load(path)
    assert wrong.startswith("[config] ")
    assert "\n" not in wrong
    assert found == Config()


def test_a_deleted_chat_is_found_by_no_search(tmp_path):
    db = Database(tmp_path / "chats.db")
    talk = talk_of("什么是线性注意力", "about linear attention")
    save(db, talk)
    for words in ("线性", "linear"):
        assert search.find(db, words)
        db.write(chats.deleting(talk.chat.id))
        assert not search.find(db, words)
        db.write(chats.restoring(talk.chat.id))
        assert search.find(db, words)
    db.close()


def test_turns_saved_together_keep_their_order(tmp_path):
    db = Database(tmp_path / "chats.db")
    talk = talk_of(*map(str, range(20)))
    save(db, talk)
    db.write(turns.saving(talk.chat.id, Turn("user", "last", talk.leaf.id)))
    assert [t.content for t in turns.load(db, talk.chat.id)] == [*map(str, range(20)), "last"]
    db.close()
