"""What belongs to a chat: its settings in the chat, in the record, in the store and in its header."""

from __future__ import annotations

import json

import pytest
from textual.color import Color
from textual.widgets import Input, TextArea

from tests.test_tui_screens import LEAST_CONTRAST, contrast
from tests.tui_pilot import SIZES, FakeEngine, chat
from tui import config, paths
from tui.chat_settings import Settings, differences
from tui.config import Config
from tui.conversation import Conversation
from tui.messages import Loaded, ModelChoice, Sampling
from tui.store import Chat, Database, chats, settings, turns
from tui.themes import CYCLE
from tui.transfer import export_talk, import_talk


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def header(d):
    return d.chat.header.render().plain.strip() if d.chat.header.display else ""


async def reopened(d, chat_id):
    await d.chat.open_chat(d.chat.keeper.open(chat_id))
    await d.settle()


def test_settings_belong_to_the_chat_and_not_to_the_next(home):
    async def script(d):
        assert header(d) == ""
        await d.command("/system Talk like a pirate, and never of anything else")
        await d.command("/set temp 0.25")
        assert "“Talk like a pirate, and…” · temp 0.25" in header(d)
        await d.exchange("q", "a")
        first = d.chat.talk.chat.id
        await d.press("ctrl+n")
        assert header(d) == ""
        await d.exchange("q", "a")
        assert d.engine.asked == [["Talk like a pirate, and never of anything else", "q"], ["q"]]
        assert [q.sampling.temp for q in d.engine.questions] == [0.25, None]
        await reopened(d, first)
        assert header(d).startswith("q: a")
        await d.command("/regenerate")
        assert d.engine.asked[-1] == d.engine.asked[0]
        record = chats.load(d.chat.keeper.db, first), d.chat.talk.path()[0]
        assert record[0].settings["temp"] == 0.25
        await d.post(d.text("b"), d.end())
        record = d.chat.talk.leaf.record
        assert (record.system_prompt[:4], record.sampling["temp"], record.model) == ("Talk", 0.25, "fake")

    chat(script, path=home / "chats.db")
    assert not paths.config_file().exists()


def test_a_chat_goes_on_as_it_was_when_the_defaults_change(home):
    async def script(d):
        await d.exchange("q", "a")
        d.chat.config = Config(system_prompt="New.", sampling=Sampling(temp=0.5, thinking_budget=9))
        await d.say("more")
        assert d.engine.asked[-1] == ["q", "a", "more"]
        assert d.engine.questions[-1].sampling == Sampling()
        await d.post(d.text("b"), d.end())
        d.chat.show_header()  # as a timer does
        await d.settle()
        assert "no system prompt · the model's temp · no thinking budget" in header(d)
        await d.command("/defaults")
        assert header(d) == ""
        await d.say("more")
        assert d.engine.asked[-1][0] == "New."
        assert d.engine.questions[-1].sampling == Sampling(temp=0.5, thinking_budget=9)

    chat(script, SIZES[1], path=home / "chats.db")


def test_the_panel_changes_what_was_changed_and_knows_the_defaults(home):
    path = home / "chats.db"

    async def script(d):
        await d.exchange("q", "a")
        await d.press("ctrl+s")
        outside = Database(path)
        outside.write(settings.changing(d.chat.talk.chat.id, {"system_prompt": "From there."}))
        outside.close()
        d.app.screen.query_one("#temp", Input).value = "0.75"
        await d.press("ctrl+s")
        await d.say("more")
        assert d.engine.asked[-1][0] == "From there."
        assert d.engine.questions[-1].sampling.temp == 0.75
        await d.press("ctrl+s", "f3")
        assert d.app.screen.query_one("#temp", Input).value == "0.5"
        d.app.screen.query_one("#system", TextArea).text = "Mine."
        await d.press("f2")
        found = config.load(home / "config.toml")[0]
        assert (found.system_prompt, found.sampling.temp) == ("Mine.", 0.5)
        assert d.chat.config.system_prompt == "Mine."
        assert header(d) == ""

    chat(script, SIZES[1], path=path, config=Config(sampling=Sampling(temp=0.5)))


def test_a_prompt_with_control_characters_is_shown_harmless_and_stays_as_it_is(home):
    odd = "a\x1b[31m\u202eb [bold]c[/] \ud800" + "x" * 1_000_000

    async def script(d):
        await d.command("/set temp 0.5")
        d.chat.change({"system_prompt": odd})
        d.chat.show_header()
        await d.settle()
        assert r"“a\x1b[31m\u202eb [bold]" in header(d)
        await d.press("ctrl+s", "ctrl+s")
        assert d.chat.system_prompt == odd
        await d.exchange("q", "a")
        assert d.engine.asked[-1][0] == odd
        await d.command("/record")
        assert "1,000,0" in "".join(d.screen_text)
        await d.press("escape")
        await reopened(d, d.chat.talk.chat.id)
        assert d.chat.system_prompt == odd.replace("\ud800", "\ufffd")

    chat(script, path=home / "chats.db")


def test_settings_changed_in_mid_answer_are_not_in_its_record():
    async def script(d):
        await d.command("/system one")
        await d.say("q")
        await d.command("/system two")
        await d.command("/set temp 0.5")
        await d.post(d.text("a"), d.end())
        record = d.chat.talk.leaf.record
        assert (record.system_prompt, record.sampling.get("temp")) == ("one", None)
        await d.exchange("more", "b")
        record = d.chat.talk.leaf.record
        assert (record.system_prompt, record.sampling["temp"]) == ("two", 0.5)

    chat(script)


BAD = {
    "temp": ["hot", -1, float("nan"), [], True, 10**400],
    "top_k": [1.5, "x", {}],
    "max_tokens": [None, 0, "many"],
    "seed": [1 << 64, "s", 0.5],
    "system_prompt": [5, None, ["x"], {"a": 1}],
    "model": [5, "name", [], {}, {"path": 3}, {"path": "x", "more": 1}, {"path": None, "revision": []}],
}


def test_a_setting_of_another_kind_or_range_is_named_and_the_default_holds():
    """Each value in a chat of its own, which can be exported; with the first of each name it also goes on, is imported and reset."""
    default = Sampling(temp=0.5)

    async def script(d):
        for name, value in ((name, value) for name, values in BAD.items() for value in values):
            talk = Conversation(Chat(settings={name: value, "unknown": [1]}))
            d.chat.keeper.keep(talk, talk.add("user", "q"))
            await d.chat.open_chat(talk)
            await d.settle()
            assert any(name in line and "the defaults hold there" in line for line in d.toasts), (name, value)
            assert d.chat.sampling == default
            assert d.chat.own.model is None
            assert "Written" in export_talk(talk, "json x.json")
            assert import_talk("x.json").path()[-1].content == "q"
            if value is BAD[name][0]:
                await d.command("/regenerate")
                assert d.engine.asked.pop() == ["S", "q"]
                await d.post(d.text("a"), d.end())
                assert d.said == ["q", "a"]
                await d.command("/import x.json")
                assert d.chat.talk is not talk
                assert d.chat.sampling == default
                await d.command("/defaults")
                assert d.chat.sampling == default
            d.app.clear_notifications()

    chat(script, config=Config(sampling=default, system_prompt="S"))


def test_damaged_settings_are_said_until_the_user_has_looked_at_them(home):
    path = home / "chats.db"
    db = Database(path)
    talk = Conversation(Chat("t", id="c"))
    db.write(chats.saving(talk.chat), turns.saving("c", talk.add("user", "q")))
    db.write(settings.changing("c", {"temp": 0.25, "tamp": 3}))
    db.write(("UPDATE settings SET content = replace(content, '0.25', '0.75')", ()))
    db.close()

    async def script(d):
        for _ in range(2):
            await reopened(d, "c")
            assert sum("settings have changed on the disk" in line for line in d.toasts)
            d.app.clear_notifications()
            assert d.chat.sampling.temp == 0.75
            await d.command("/regenerate")
            await d.post(d.text("a"), d.end())
        await d.press("ctrl+s", "ctrl+s")
        await reopened(d, "c")
        assert not any("changed on the disk" in line for line in d.toasts)
        assert d.chat.sampling.temp == 0.75

    chat(script, path=path)


def test_exports_say_what_the_chat_has_and_imports_take_it(home):
    async def script(d):
        await d.command("/system Be *brief*.")
        await d.command("/set temp 0.25")
        await d.exchange("q", "a")
        await d.command("/export md x.md")
        await d.command("/export json x.json")
        await d.press("ctrl+n")
        await d.command("/import x.json")
        assert d.chat.sampling.temp == 0.25
        assert d.chat.talk.leaf.record.system_prompt == "Be *brief*."
        await d.say("more")
        assert d.engine.asked[-1] == ["Be *brief*.", "q", "a", "more"]

    chat(script, path=home / "chats.db")
    raw = json.loads((home / "x.json").read_text())["chat"]["settings"]
    assert (raw["temp"], raw["system_prompt"], raw["seed"]) == (0.25, "Be *brief*.", None)
    text = (home / "x.md").read_text()
    assert text.startswith("# q: a\n\n*temp 0.25*\n\n## System\n\nBe *brief*.\n\n## You\n")


def test_differences_are_few_words():
    own = Settings(Sampling(temp=0.0, seed=7, max_tokens=10), "", ModelChoice("/x/[red]m", adapter_path="a/b"))
    default = Settings(Sampling(top_p=0.5, thinking_budget=3), "s", ModelChoice())
    assert differences(own, default) == [
        "[red]m + b",
        "no system prompt",
        "temp 0",
        "the model's top p",
        "max tokens 10",
        "no thinking budget",
        "seed 7",
    ]
    assert differences(own, own) == []


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (200, 60)])
def test_the_header_is_one_line_at_every_width(size):
    async def script(d):
        await d.exchange("What is the meaning of [bold]all[/] of this\x1b?", "a")
        for line in ("/system Be brief, and never say more than that.", "/set temp 0.2", "/set seed 7", "/budget 64"):
            await d.command(line)
        d.app.clear_notifications()
        await d.settle()
        (row,) = [line for line in d.screen_text if "What is" in line and "“Be" in line]
        assert row == d.screen_text[0]
        assert len(row) <= size[0]
        assert ("seed 7" in row) == (size[0] > 80)
        assert size[0] > 80 or row.rstrip().endswith(("+3", "+2"))
        await d.command("/defaults")
        assert header(d) == ""
        assert "What is" not in d.screen_text[0] or size[1] < 24

    chat(script, size, engine=FakeEngine())


def test_the_header_can_be_read_in_every_theme():
    async def script(d):
        await d.post(Loaded("toy", 9, choice=ModelChoice()))
        talk = Conversation(Chat("Title", settings={"model": {"path": "x/y"}, "temp": 0.2}))
        talk.add("user", "q")
        await d.chat.open_chat(talk)
        d.app.clear_notifications()
        for theme in CYCLE:
            d.app.theme = theme
            await d.settle()
            seen = [s for s in d.app.screen._compositor.render_strips()[0] if s.text.strip()]
            assert "y, but toy is loaded · temp 0.2" in "".join(s.text for s in seen)
            for segment in seen:
                front, back = (Color.from_rich_color(c) for c in (segment.style.color, segment.style.bgcolor))
                assert contrast(front, back) >= LEAST_CONTRAST[theme], (theme, segment.text)

    chat(script)


def test_the_configuration_of_an_unpinned_chat_is_followed():
    async def script(d):
        await d.post(Loaded("fake", 9))
        assert d.chat.sampling == Sampling(temp=0.5)
        d.chat.config = Config(sampling=Sampling(temp=0.25))
        assert d.chat.sampling == Sampling(temp=0.25)

    chat(script, config=Config(sampling=Sampling(temp=0.5)))
