"""Attachments: lines of a file, the names in a folder, and files that are something else or change."""

from __future__ import annotations

import os

import pytest

from tests.tui_pilot import chat
from tui import files, parts
from tui.files import AttachError, mentioned, read_attachment


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("".join(f"line {n}\n" for n in range(1, 51)))
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "first", "last"), [("20-45", 20, 45), ("20", 20, 20), ("1", 1, 1), ("1-50", 1, 50), ("007-8", 7, 8)]
)
def test_lines(wanted, first, last):
    found = read_attachment(f"notes.txt#{wanted}")
    assert found.name == f"notes.txt#{wanted}"
    assert found.text == "".join(f"line {n}\n" for n in range(first, last + 1))


@pytest.mark.parametrize("wanted", ["0", "51", "40-51", "9-8", "0-3", "999999999", "1-999999999"])
def test_lines_that_are_not_there(wanted):
    with pytest.raises(AttachError, match=r"names lines that are not there; give #1-50 or fewer\.$"):
        read_attachment(f"notes.txt#{wanted}")


@pytest.mark.parametrize("wanted", ["", "x", "-5", "5-", "1-2-3", "1,2", "٣", "1" * 10, "L3", "+1"])
def test_what_names_no_lines(wanted):
    with pytest.raises(AttachError, match=r"names no lines; give #20 or #20-45\.$"):
        read_attachment(f"notes.txt#{wanted}")


def test_lines_of_strange_files(here):
    (here / "a#2").write_text("own name\n")
    (here / "a").write_text("1\n2\n")
    (here / "a b#1.txt").write_text("x\ny")
    (here / "empty").write_text("")
    (here / "feeds").write_text("a\fb\u2028c\nd\r\ne")
    assert read_attachment("a#2").text == "own name\n"  # a file's own name comes first
    assert read_attachment("a#2#1").text == "own name\n"
    assert read_attachment("a b#1.txt#2").text == "y\n"
    assert read_attachment("feeds#1-2").text == "a\fb\u2028c\nd\n"
    with pytest.raises(AttachError, match="not there"):
        read_attachment("empty#1")


def test_mentions(here):
    (here / "a b").mkdir()
    (here / "a#2").write_text("x\n")
    assert mentioned("see @notes.txt#20-45, @notes.txt#3. and (not) @a#2; @./ @a b/ done") == [
        "notes.txt#20-45",
        "notes.txt#3",
        "a#2",
        "./",
        "a b/",
    ]
    assert mentioned("@notes.txt#todo") == ["notes.txt#todo"]  # it is refused, not left out
    assert mentioned("@nothing#3 @nothing/ @notes.txt/ a@notes.txt#3") == []


def test_a_part_of_a_file_that_is_too_large_to_be_attached(here, monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    with pytest.raises(AttachError, match="it has more than 0 MB"):
        read_attachment("notes.txt")
    assert read_attachment("notes.txt#40").text == "line 40\n"
    with pytest.raises(AttachError, match="attach fewer lines"):
        read_attachment("notes.txt#1-40")
    monkeypatch.setattr(files, "MOST_BYTES_OF_PARTS", 200)
    with pytest.raises(AttachError, match="cannot be read"):
        read_attachment("notes.txt#40")


def test_a_folder_is_listed(here):
    (here / "dir" / "Sub").mkdir(parents=True)
    (here / "dir" / "circle").symlink_to("../dir")
    (here / "dir" / "gone").symlink_to("nowhere")
    (here / "dir" / "b\u202e\x1b[2J\n.txt").write_text("x" * 1500)
    os.mkfifo(here / "dir" / "pipe")
    (here / "dir" / os.fsdecode(b"\xff.bin")).write_bytes(b"")
    found = read_attachment("dir/")
    assert found.name == "dir/"
    assert sorted(found.text.splitlines()) == sorted(
        ["Sub/", "b\\u202e\\x1b[2J\\n.txt  1.5 KB", "circle -> ../dir", "gone -> nowhere", "pipe", "\ufffd.bin  0 B"]
    )
    assert found.text.startswith("Sub/\n")
    assert read_attachment("dir/circle/").name == "circle/"
    assert read_attachment("./").name == f"{here.name}/"
    assert read_attachment("dir/Sub/").text == "(empty)\n"
    with pytest.raises(AttachError, match=r"^\[attach\] dir cannot be read"):
        read_attachment("dir")
    with pytest.raises(AttachError, match="cannot be read"):
        read_attachment("nowhere/")


def test_a_folder_of_very_many_files(here, monkeypatch):
    monkeypatch.setattr(parts, "LISTED", 10)
    for n in range(30):
        (here / f"f{n:02}").touch()
    assert read_attachment("./").text.splitlines()[9:] == ["f09  0 B", "… and 21 more"]
    monkeypatch.setattr(parts, "MOST_ENTRIES", 20)
    assert read_attachment("./").text.splitlines()[10:] == ["… and more than 10 more"]


def test_devices_and_pipes(here):
    os.mkfifo(here / "pipe")
    for path in ("pipe", "pipe#3", "/dev/zero", "/dev/zero#3", "/dev/null", "/proc/self/mem"):
        with pytest.raises(AttachError, match="cannot be read"):
            read_attachment(path)
    assert mentioned("@pipe @/dev/zero @pipe#3 @/dev/zero#1") == []


def test_a_question_stays_unsent_where_a_part_is_refused(here):
    async def script(d):
        await d.say("read @notes.txt#40-60 please")
        assert d.engine.questions == []
        assert d.chat.entry.prompt.text == "read @notes.txt#40-60 please"
        assert d.toasts == ["[attach] notes.txt#40-60 names lines that are not there; give #1-50 or fewer."]
        await d.command("read @notes.txt#49-50 please")
        assert d.engine.asked[-1][-1].endswith("notes.txt#49-50:\n```\nline 49\nline 50\n```")
        (here / "notes.txt").unlink()  # what was attached is kept
        assert d.chat.talk.path()[0].attachments[0].text == "line 49\nline 50\n"

    chat(script)
