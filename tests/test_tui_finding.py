"""Finding one's way in the chat: fuzzy matching, the first screen, the lists of commands, models and chats."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from textual import events
from textual.widgets import Input, OptionList

from ring_mlx import AnswerText, Sampling, Session
from ring_mlx.bench.shapes import FLASH, MINI
from ring_mlx.cli import build_parser
from tests.test_tui_harmless import BAD
from tests.tui_pilot import FakeEngine, chat
from tui import commands, files, fuzzy
from tui.config import Config, load
from tui.conversation import Conversation
from tui.gauges import counted
from tui.messages import Loaded, ModelChoice
from tui.models import PLACES, Found, found_models
from tui.screens.real_models import RealModelsScreen
from tui.store import Chat, Record, chats, turns
from tui.widgets.welcome import EXAMPLES

HARD = "aabb" * 140 + "xc"  # Textual's own search tries more ways than there are atoms


def marks(content):
    """The marked letters of a text."""
    return "".join(content.plain[s.start : s.end] for s in content.spans if s.style == fuzzy.HIT)


def names(query, *texts):
    return [item for item, _ in fuzzy.best(query, texts, str)]


def test_one_is_not_many():
    assert [counted(n, "turn") for n in (0, 1, 2, 1000)] == ["0 turns", "1 turn", "2 turns", "1,000 turns"]

    async def script(d):
        talk = Conversation(Chat("begun"))
        turn = talk.add("user", "only asked")
        d.chat.keeper.db.write(chats.saving(talk.chat), turns.saving(talk.chat.id, turn))
        await d.press("ctrl+o")
        assert any("begun  1 turn  just now" in line for line in d.screen_text)

    chat(script)


def test_the_best_comes_first_and_equals_stay_in_order():
    assert names("", "b", "a") == ["b", "a"]
    assert names("rml", "formal", "ring-mini-linear", "none") == ["ring-mini-linear", "formal"]
    assert names("one", "stone", "one", "not here", "number one") == ["one", "number one", "stone"]
    assert names("x", "x1", "x2", "x3") == ["x1", "x2", "x3"]
    assert names("linear RING", "ring-mini-linear", "linear") == ["ring-mini-linear"]


@pytest.mark.parametrize("text", [HARD, HARD + "\n[b]", "İ" * 400 + HARD])
def test_no_text_takes_long(text):
    started = time.process_time()
    assert fuzzy.best("ab" * 100 + "c", [text], str) != []
    assert fuzzy.best("ab" * 100 + "d", [text], str) == []
    assert time.process_time() - started < 2


def test_a_letter_that_is_two_in_lower_case_moves_no_mark():
    assert [marks(shown) for _, shown in fuzzy.best("x", ["İİx"], str)] == ["x"]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=12), st.lists(st.text(max_size=40), max_size=4))
def test_marked_letters_are_those_of_the_query(query, texts):
    for text, shown in fuzzy.best(query, texts, str):
        assert shown.plain == fuzzy.harmless(text, is_name=True)
        words = sorted(set("".join(query.split()).lower()))
        found = marks(shown)
        assert {c.lower() for c in found} <= set(words)
        assert len(found) >= max(map(len, query.split()), default=0)


def columns(d):
    """The rows of the completion."""
    completion = d.chat.entry.completion
    assert completion.display
    region = completion.region
    return [row[region.x : region.right].rstrip() for row in d.screen_text[region.y : region.bottom]]


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (120, 40)])
def test_the_list_of_commands_is_in_columns(size):
    async def script(d):
        await d.type("/")
        rows = columns(d)
        assert len(rows) > 3
        ends = {row.index(help) for row in rows for c in commands.COMMANDS if (help := c.help[:12]) in row}
        keys = {row.index(key) for row in rows for key in ("Esc", "f2", "^o", "^l", "^s", "^r") if f" {key} " in row}
        assert len(ends) == len(keys) == 1
        assert any("/new " in row and " f2 " in row for row in rows)
        assert all(len(row) < size[0] for row in rows)
        assert d.screen_text[d.chat.status.region.y].strip()  # nothing is pushed out of the screen
        assert not d.chat.show_vertical_scrollbar
        assert ("[WORDS]" in "".join(rows)) == (size[0] >= 100)
        await d.type("xprt")
        assert [row.split()[0] for row in columns(d)] == ["/export"]
        assert marks(d.chat.entry.completion.options[0].prompt) == "xprt"

    chat(script, size, config=Config(keys={"new": "f2"}))


def test_a_command_of_no_such_name_offers_nothing():
    async def script(d):
        await d.type("/zzz")
        assert not d.chat.entry.completion.display

    chat(script)


def test_files_are_completed_by_some_of_their_letters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("notes.txt", "src/chat_view.py", "src/chat.py", "src/conversation.py", "src/.hidden"):
        (tmp_path / name).write_text("text")
    assert [path for path, _ in files.completions("src/cvpy")] == ["src/chat_view.py", "src/conversation.py"]
    assert [path for path, _ in files.completions("")] == ["src/", "notes.txt"]
    (tmp_path / "src/deep/est").mkdir(parents=True)
    (tmp_path / "src/deep/est/view.py").touch()
    (tmp_path / "src/node_modules/view").mkdir(parents=True)
    (tmp_path / "src/deep/loop").symlink_to(tmp_path)
    for start in ("s/d/v", "src/d/e/vw", "src/deep/est/vw", "src/deep/est/view.p", "deep/est/"):
        path, shown = files.completions(start)[-1]
        assert (path, shown.plain) == ("src/deep/est/view.py", path)
    assert [path for path, _ in files.completions("no/such")] == []
    assert [path for path, _ in files.completions(f"{tmp_path}/s/d/v")] == [f"{tmp_path}/src/deep/est/view.py"]

    async def script(d):
        await d.type("@src/cvw")
        assert marks(d.chat.entry.completion.options[0].prompt) == "cvw"
        await d.press("tab")
        assert d.chat.entry.prompt.text == "@src/chat_view.py "
        await d.press("backspace", "enter")  # nothing is missing
        assert [a.name for a in d.chat.talk.path()[0].attachments] == ["chat_view.py"]

    chat(script)


def made(folder, config=None, **extra):
    """A folder with a config.json and weights of a size, none of which is there."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**MINI, **extra}) if config is None else config)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(9_200_000_000)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home without models, on a machine that gives 24 GB."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("ring_mlx.model.memory.budget_bytes", lambda: 24_000_000_000)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_models_are_found_where_other_programs_keep_them(home, tmp_path):
    made(home / "models" / "mini", a_key_of_another_version=1)  # of which nothing warns here
    made(home / "models" / "owner" / "four", quantization={"bits": 4, "group_size": 64})
    made(home / ".lmstudio" / "models" / "a" / "one", dtype="bfloat16")
    made(home / ".cache" / "lm-studio" / "models" / "b" / "two" / "deeper")
    made(home / ".cache" / "lm-studio" / "models" / "b" / "three")
    made(tmp_path / "disk" / "c" / "four", **FLASH)
    made(tmp_path / "disk" / "gptq", quantization_config={"quant_method": "gptq"})
    made(tmp_path / "here" / "sub" / "too deep")
    (home / "models" / "again").symlink_to(home / "models" / "mini")
    with (tmp_path / "disk" / "c" / "four" / "model.safetensors").open("r+b") as file:
        file.truncate(58_600_000_000)
    found = list(found_models((*PLACES, str(tmp_path / "disk"))))
    assert [(f.name, f.remark, f.fit) for f in found[1:]] == [
        ("mini", "9.2 GB", "fits, 131k tokens"),
        ("owner/four", "4-bit, 9.2 GB", "fits, 131k tokens"),
        ("a/one", "16-bit, 9.2 GB", "fits, 131k tokens"),
        ("b/three", "9.2 GB", "fits, 131k tokens"),
        ("c/four", "58.6 GB", "does not fit"),
        ("gptq", "9.2 GB", "gptq: convert it first"),
    ]
    assert found[5].detail == "It needs 59.3 GB, this machine gives 24.0 GB."
    assert "with 131,072 tokens of context" in found[1].detail


def test_a_context_that_is_cut_by_memory_is_said(home, monkeypatch):
    monkeypatch.setattr("ring_mlx.model.memory.budget_bytes", lambda: 10_000_000_000)
    made(home / "models" / "mini")
    tokens = int(found_models_of(home)[0].fit.split()[1].removesuffix("k"))
    assert 8 <= tokens < 131
    monkeypatch.setattr("ring_mlx.model.memory.budget_bytes", lambda: 9_780_000_000)  # for some 3,000 tokens
    assert found_models_of(home)[0].fit == "does not fit"


def test_a_folder_that_may_not_be_read_is_left_out(home, monkeypatch):
    made(home / "models" / "mini")
    assert len(found_models_of(home)) == 1

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ring_mlx.checkpoint.summary.os", SimpleNamespace(scandir=refuse))
    assert found_models_of(home) == []


def found_models_of(home):
    return list(found_models((str(home / "models"),)))[1:]


def test_hostile_folders_are_left_out_or_said_to_be_damaged(home, tmp_path):
    """FIFOs, links in circles, folders that may not be read, files too long or too deep, shards that are missing."""
    models = home / "models"
    for name, text in (("deep", "[" * 100_000), ("list", "[]"), ("long", " " * 5_000_000 + "{}"), ("empty", "")):
        made(models / name, text)
    made(models / "layers", num_hidden_layers=10**12)
    made(models / "part")
    (models / "part" / "model.safetensors").rename(models / "part" / "model-1.safetensors")
    (models / "part" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    made(models / "index")
    (models / "index" / "model.safetensors.index.json").write_text("[" * 100_000)
    (models / "fifo").mkdir()
    os.mkfifo(models / "fifo" / "config.json")
    os.mkfifo(models / "pipe")
    made(models / "weights")
    (models / "weights" / "model.safetensors").unlink()
    os.mkfifo(models / "weights" / "model.safetensors")
    (models / "self").symlink_to(models / "self")
    (models / "up").symlink_to(models)
    (models / "a").symlink_to(models / "b")
    (models / "b").symlink_to(models / "a")
    (models / "closed").mkdir(mode=0)
    (tmp_path / "hub").write_text("not a folder")
    (models / os.fsdecode(b"\xff")).mkdir()
    found = {f.name: f.fit for f in found_models((*PLACES, "\0", "a" * 5000, "~nobody", "/dev"))}
    assert found == {"toy": "", "layers": "damaged", "part": "1 file missing", "index": "damaged"}


def test_thousands_of_folders_are_shown_as_they_are_found(home):
    for n in range(3_000):
        (home / "models" / f"m{n}").mkdir(parents=True)
    made(home / "models" / "z last")

    async def script(d):
        await d.pilot.press("ctrl+l")
        await d.pilot.pause(0.2)
        assert d.app.screen.query_one(OptionList).option_count >= 1
        await d.type("last")
        assert d.app.screen.query_one(OptionList).option_count == 1
        await d.press("enter")
        assert d.engine.choices == [ModelChoice(str(home / "models" / "z last"))]

    chat(script)


def test_a_folder_that_never_answers_does_not_hold_the_list(home, monkeypatch):
    """What was found before is shown and can be chosen, and the application ends."""
    never = threading.Event()

    def place(folders=()):
        yield Found("toy", None, "packaged")
        yield Found("one", "/one", "4-bit")
        never.wait(60)

    monkeypatch.setattr("tui.screens.models.found_models", place)
    started = time.monotonic()

    async def script(d):
        await d.pilot.press("ctrl+l")
        while d.app.screen.query_one(OptionList).option_count < 2:
            await d.pilot.pause(0.05)
        assert "Looking for more" in "\n".join(d.screen_text)
        await d.pilot.press("down", "enter")
        await d.settle()
        assert d.engine.choices == [ModelChoice("/one")]

    chat(script)
    assert time.monotonic() - started < 40
    never.set()


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (120, 40)])
def test_the_picker_filters_and_shows_its_keys(home, size):
    for name in ("alpha", "ring-mini-4bit", "owner/a-very-long-name-of-a-model-that-ends-in-8bit"):
        made(home / "models" / name)

    async def script(d):
        await d.press("ctrl+l")
        text = "\n".join(d.screen_text)
        assert "↑↓ Choose" in text
        assert "Use" in text
        assert "ends-in-8bit" in text or size[0] == 40
        assert ("fits, 131k tokens" in text) == (size[0] > 40)  # all of it, though the toy's remark is longer
        await d.type("rm4")
        options = d.app.screen.query_one(OptionList)
        assert [f.name for f in options.keys] == ["ring-mini-4bit"]
        assert marks(options.options[0].prompt) == "rm4"
        assert "It fits into 24.0 GB" in "\n".join(d.screen_text)
        await d.press("ctrl+u")
        await d.press("down", "down")
        chosen = options.chosen
        assert chosen.name.startswith("owner/")
        await d.type("8")
        assert options.chosen == chosen
        await d.press("ctrl+u")
        await d.type("owner/a")  # fits a name, but is one itself
        assert options.chosen.path == "owner/a"
        await d.press("enter")
        assert d.engine.choices == [ModelChoice("owner/a")]

    chat(script, size)


def test_configured_folders_are_looked_into(home, tmp_path):
    made(tmp_path / "disk" / "owner" / "mine")
    (tmp_path / "c.toml").write_text(f"model_folders = ['{tmp_path / 'disk'}']\n")
    found, wrong = load(tmp_path / "c.toml")
    assert not wrong

    async def script(d):
        await d.press("ctrl+l")
        assert [f.name for f in d.app.screen.query_one(OptionList).keys] == ["toy", "owner/mine"]

    chat(script, config=found)
    (tmp_path / "c.toml").write_text("model_folders = 'x'\n")
    assert "model_folders is not a list of texts" in load(tmp_path / "c.toml")[1]


def keep(d, *titles, question="ask", answer="said", **fields):
    """Store chats of one exchange, each older than the one before; returns their ids, or the only one."""
    ids, changes = [], []
    for n, title in enumerate(titles):
        talk = Conversation(Chat(title, **{"changed": 1e9 - n, **fields}))
        talk.add("user", question)
        talk.add("assistant", answer).record = Record(model="ring-mini-q4")
        changes += [chats.saving(talk.chat), *(turns.saving(talk.chat.id, t) for t in talk.turns.values())]
        ids.append(talk.chat.id)
    d.chat.keeper.db.write(*changes)
    return ids if len(ids) > 1 else ids[0]


def shown_preview(d):
    return d.app.screen.query_one("#preview").render().plain


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (120, 40), (200, 60)])
def test_a_chat_is_previewed_with_its_last_answer(size):
    async def script(d):
        now = time.time()
        keep(d, "older", question="What is\nolder?", answer="The last **answer** of it.", changed=now - 3 * 3600)
        keep(d, "newer", changed=now - 60)
        await d.press("ctrl+o", "down")
        assert d.app.screen.query_one(OptionList).option_count == 2
        assert shown_preview(d).splitlines() == [
            "older",
            "2 turns · 3 h ago · ring-mini-q4",
            "▌ What is",
            "older?",
            "The last **answer** of it.",
        ]
        on_screen = "The last **answer** of it." in "\n".join(d.screen_text)
        assert on_screen == (size[1] >= 18)
        assert any("older" in row and "3 h ago" in row for row in d.screen_text)
        await d.press("up")
        assert shown_preview(d).startswith("newer\n2 turns · 1 min ago")
        await d.press("ctrl+x")  # the other one is highlighted, though its place is the same
        assert shown_preview(d).startswith("older\n")
        await d.press("ctrl+x")
        assert shown_preview(d) == ""

    chat(script, size)


def test_a_hit_is_previewed_with_its_words_marked():
    async def script(d):
        keep(d, "long", answer="x " * 3000 + "the decay of a head" + " y" * 3000)
        await d.press("ctrl+o")
        await d.type("decay")
        text = shown_preview(d)
        assert "the decay of a head" in text
        assert len(text) < 5000
        assert marks(d.app.screen.query_one("#preview").render()) == "decay"

    chat(script)


def test_chats_are_found_by_titles_before_and_after_what_was_said():
    async def script(d):
        said = keep(d, "other", question="where is the decay?")
        named = keep(d, "On decay")
        loose = keep(d, "Dark city")
        await d.press("ctrl+o")
        await d.type("decay")
        found = d.app.screen.query_one(OptionList)
        assert [chat_id for chat_id, _ in found.keys] == [named, said]
        await d.press("ctrl+u")
        await d.type("dcy")
        assert [chat_id for chat_id, _ in found.keys] == [loose, named]
        assert [marks(o.prompt) for o in found.options] == ["Dcy", "dcy"]
        await d.press("enter")
        assert d.chat.talk.chat.id == loose

    chat(script)


def test_a_selection_stays_on_its_chat_while_the_filter_grows():
    async def script(d):
        ids = keep(d, *(f"note {n}" for n in range(6)))
        await d.press("ctrl+o", "down", "down", "down")
        found = d.app.screen.query_one(OptionList)
        for letter in "note":
            await d.type(letter)
            assert found.chosen == (ids[3], None)
        await d.press("ctrl+t")
        assert (found.chosen, found.keys[0]) == ((ids[3], None), (ids[3], None))
        await d.type("3")
        assert found.chosen == (ids[3], None)

    chat(script)


def test_more_chats_than_are_shown():
    """All are found by title, and each change keeps the selection."""

    async def script(d):
        ids = keep(d, *(f"chat of number {n}" for n in range(1500)))
        started = time.process_time()
        await d.press("ctrl+o")
        found = d.app.screen.query_one(OptionList)
        assert found.option_count == 1000
        assert "the latest 1,000" in "\n".join(d.screen_text)
        await d.type("n1432")
        assert [key for key in found.keys if key[0] == ids[1432]] == found.keys[:1]
        await d.press("ctrl+x", "ctrl+z", "enter")
        assert d.chat.talk.chat.id == ids[1432]
        assert time.process_time() - started < 20

    chat(script)


@pytest.mark.parametrize(
    "title", ["[b]x[/b] [@click=app.quit]y", "a\u202eb\x1b[2J", "n\nl\tt", "日本語 🎉👩‍👩‍👧 İ" * 9, "[" * 300]
)
def test_any_title_is_shown_as_text(title):
    async def script(d):
        keep(d, title, question=title, answer=title)
        await d.press("ctrl+o")
        for letter in ("", *(c for c in title[:2] if c == fuzzy.harmless(c))):
            d.app.screen.query_one(Input).value += letter
            await d.settle()
            assert d.app.screen.query_one(OptionList).option_count >= 1
            assert not BAD.search("\n".join(d.screen_text))
        assert d.app.screen.query_one(OptionList).size.height > 1

    chat(script)


def test_a_list_is_laid_out_again_in_another_size():
    async def script(d):
        keep(d, "a title that is rather long for a narrow terminal and is cut there", changed=time.time() - 7200)
        await d.press("ctrl+o")
        for columns, rows in ((40, 12), (200, 60), (20, 6), (80, 24)):
            await d.pilot.resize_terminal(columns, rows)
            await d.settle()
            row = next((line for line in d.screen_text if "a title" in line), "")
            assert ("2 h ago" in row) == (columns > 20)
            assert ("for a narrow" in row) == (columns > 40)

    chat(script)


def starts(d):
    """The rows of the first screen."""
    return d.app.query_one("#greeting Starts")


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (120, 40), (200, 60)])
def test_the_first_screen_has_examples_and_recent_chats(size):
    async def script(d):
        ids = keep(d, *(f"chat {n}" for n in range(9)))
        await d.command("/new")
        d.engine.post(Loaded("Ring-mini", 131072))
        await d.settle()
        rows = [o.prompt.plain for o in starts(d).options]
        assert [row[2:24] for row in rows[:3]] == [text[:22] for text in EXAMPLES[False]]
        shown = "\n".join(d.screen_text)
        assert all(row.rstrip()[:30] in shown for row in rows)  # all are in view
        assert ("131,072 tokens" in shown) == (size[0] > 40)
        assert len(rows) == (3 if size[1] == 12 else 8)
        if size[1] > 12:
            await d.press("tab", "5")
            assert d.chat.talk.chat.id == ids[1]
            assert not d.app.query_one("#greeting").display
            await d.command("/new")
        await d.press("tab", "down", "enter")
        assert d.engine.asked == [[EXAMPLES[False][1]]]

    chat(script, size)


def test_the_first_screen_of_the_toy_says_how_to_get_a_real_model(monkeypatch):
    monkeypatch.setattr("ring_mlx.model.memory.budget_bytes", lambda: 14_000_000_000)
    copied = []

    async def script(d):
        d.app.copy_to_clipboard = copied.append
        d.engine.post(Loaded("toy", 4096))
        await d.settle()
        assert "The packaged toy adds" in "\n".join(d.screen_text)
        await d.pilot.click("#greeting Starts", offset=(5, 3))
        await d.settle()
        text = "\n".join(d.screen_text)
        assert "Ring-mini-linear-2.0 fits at 6 bits" in text
        assert "   6 bits   13.3 GB  fits, 12k tokens" in text
        assert "   8 bits   17.4 GB  does not fit" in text
        await d.press("c")
        (command,) = copied
        build_parser().parse_args(shlex.split(command)[1:])
        await d.press("escape")
        assert d.app.screen is d.chat

    chat(script, (120, 40))


def test_a_machine_without_room_is_told_what_else_there_is(monkeypatch):
    monkeypatch.setattr("ring_mlx.model.memory.budget_bytes", lambda: 2_000_000_000)

    async def script(d):
        await d.app.push_screen(RealModelsScreen())
        await d.settle()
        assert "--expert-cache-bytes" in "\n".join(d.screen_text)
        await d.press("c", "escape")

    chat(script)


def test_a_draft_stays_while_an_example_is_asked():
    async def script(d):
        await d.type("mine")
        await d.press("tab", "1")
        assert d.engine.asked == [[EXAMPLES[False][0]]]
        assert d.chat.entry.prompt.text == "mine"
        await d.press("escape")

    chat(script)


def test_what_is_typed_beside_the_prompt_is_not_lost():
    async def script(d):
        await d.press("tab", *"x9yz", "space")
        assert d.chat.entry.prompt.text == "x9yz "
        await d.press("tab")
        d.app.post_message(events.Paste("pasted"))
        await d.press("a")
        assert d.chat.entry.prompt.text == "x9yz pasteda"
        assert d.engine.asked == []

    chat(script)


def test_without_a_model_there_are_no_examples():
    async def script(d):
        assert starts(d).option_count == 0
        await d.press("tab", "1")
        keep(d, "kept")
        await d.command("/new")
        assert [o.prompt.plain.split()[:2] for o in starts(d).options] == [["1", "kept"]]

    chat(script, engine=FakeEngine(loads=False))


def test_the_toy_answers_its_examples():
    """What the first screen offers must be answered right; loading the toy for that takes a second."""
    right = ("I add, subtract, multiply", "8635", '"nretnal"')
    session = Session()
    try:
        for question, answer in zip(EXAMPLES[True], right, strict=True):
            reply = session.send([{"role": "user", "content": question}], sampling=Sampling(temp=0.0))
            assert answer in "".join(e.text for e in reply if isinstance(e, AnswerText))
    finally:
        session.close()
