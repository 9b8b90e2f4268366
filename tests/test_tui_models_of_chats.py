"""A chat's model: it answers, or the user says which one does."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from tests.tui_pilot import FIGURES, SIZES, FakeEngine, chat
from tui import config, paths
from tui.answering import Engine
from tui.chat import resume
from tui.chat_settings import choice_of, is_same_model, model_name, raw_model, settings_of
from tui.commands import SETTINGS
from tui.config import Config
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Failed, Loaded, ModelChoice, Piece
from tui.plain import Plain
from tui.screens.other_model import OtherModelScreen
from tui.store import Chat


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ready(name="toy", **more):
    return Loaded(name, 4096, choice=ModelChoice(None if name == "toy" else name, **more))


def of_other(d, model=None):
    """A chat that another model has answered."""
    talk = Conversation(Chat("theirs", settings={"model": model or {"path": "owner/ring"}}))
    talk.add("user", "q")
    talk.add("assistant", "a")
    d.chat.keeper.keep(talk, *talk.turns.values())
    return talk


def test_a_chat_keeps_the_model_that_answered_in_it(home):
    async def script(d):
        await d.post(ready())
        await d.exchange("q", "a")
        first = d.chat.talk.chat.id
        assert d.chat.keeper.open(first).chat.settings["model"] == {"path": None}
        await d.command("/model owner/x")
        await d.post(ready("owner/x"))
        assert d.chat.keeper.open(first).chat.settings["model"] == {"path": "owner/x"}
        assert config.load(paths.config_file())[0].model == "owner/x"
        await d.command("/model mistyped")
        await d.post(Failed("[hub] no such folder"), ready("owner/x"))
        await d.say("more")
        assert d.app.screen is d.chat
        assert d.engine.asked[-1] == ["q", "a", "more"]
        assert d.chat.own.model == ModelChoice("owner/x")
        await d.command("/model owner/x")  # is loaded
        assert [c.path for c in d.engine.choices] == ["owner/x", "mistyped"]

    chat(script, path=home / "chats.db")


def test_another_model_answers_only_where_the_user_says_so():
    async def script(d):
        await d.post(ready())
        await d.chat.open_chat(of_other(d))
        await d.settle()
        assert any("ring, but toy is loaded; your next question asks" in line for line in d.toasts)
        assert d.chat.header.render().plain.strip().startswith("theirs")
        assert d.chat.header.render().plain.endswith("  ring, but toy is loaded")
        for ask in ("more", "/regenerate", "/continue"):
            for way in (["escape"], ["down", "enter"], ["enter"]):
                talk = of_other(d)
                await d.chat.open_chat(talk)
                before, asked, loads = d.said, len(d.engine.questions), len(d.engine.choices)
                await (d.command(ask) if ask.startswith("/") else d.say(ask))
                assert isinstance(d.app.screen, OtherModelScreen), ask
                assert len(d.engine.questions) == asked
                assert "Load ring" in "\n".join(d.screen_text)
                await d.press(*way)
                assert d.app.screen is d.chat
                if way == ["escape"]:
                    assert d.said == before
                    assert len(d.engine.questions) == asked
                    assert d.chat.entry.prompt.text == ("more" if ask == "more" else "")
                    d.chat.entry.prompt.replace_text("")
                    assert d.chat.own.model == ModelChoice("owner/ring")
                    continue
                assert len(d.engine.questions) == asked + 1
                loaded = way == ["enter"]
                assert len(d.engine.choices) == loads + loaded
                if loaded:
                    await d.post(ready("owner/ring"))
                assert d.chat.own.model == ModelChoice("owner/ring" if loaded else None)
                await d.post(d.text("b"), d.end())
                assert d.chat.talk.leaf.record.model == ("owner/ring" if loaded else "toy")
                assert not d.chat.header.display or "but" not in d.chat.header.render().plain
                if loaded:
                    await d.post(ready())
        assert config.load(paths.config_file())[0].model == "", "a chat's own model does not become the default"

    chat(script, SIZES[1])


def test_a_model_that_is_gone_does_not_close_its_chat_or_lose_the_question():
    async def script(d):
        await d.post(ready())
        await d.chat.open_chat(of_other(d, {"path": "/gone/[bold]\x1b[31mring"}))
        assert d.said == ["q", "a"]
        await d.say("more")
        assert r"Load [bold]\x1b[31mring" in "\n".join(d.screen_text)
        await d.press("enter")
        stops = d.engine.stops
        await d.post(Failed("[hub] no such folder '/gone'"), ready())
        assert d.engine.stops > stops, "the old model answers nothing in its place"
        assert d.chat.entry.prompt.text == "more"
        assert d.said == ["q", "a"]
        await d.press("enter")
        assert isinstance(d.app.screen, OtherModelScreen)
        await d.press("down", "enter")
        assert d.engine.asked[-1] == ["q", "a", "more"]

    chat(script, SIZES[1])


def test_a_model_chosen_in_one_chat_does_not_answer_in_another():
    async def script(d):
        await d.post(ready())
        await d.exchange("q", "a")
        first = d.chat.talk
        await d.press("ctrl+n")
        await d.command("/model owner/x")
        second = d.chat.talk
        await d.chat.open_chat(first)
        await d.say("more")  # the other one is still being loaded
        assert isinstance(d.app.screen, OtherModelScreen)
        await d.press("escape")
        await d.post(ready("owner/x"))
        assert d.chat.own.model == ModelChoice()
        assert second.chat.settings == {"model": {"path": "owner/x"}}

    chat(script)


def test_a_model_with_an_adapter_or_of_another_revision_is_another_one(home):
    plain = ModelChoice("owner/x")
    for more in ({"revision": "r"}, {"adapter_path": "a"}, {"decay_layer_offset": -1}):
        other = ModelChoice("owner/x", **more)
        assert not is_same_model(plain, other)
        assert model_name(plain) != model_name(other)
        assert settings_of({"model": raw_model(other)}, Config())[0].model == other
    assert is_same_model(plain, ModelChoice("owner/x", expert_cache_bytes=5))
    (home / "mine").mkdir()
    assert raw_model(choice_of("mine")) == raw_model(choice_of(f"{home}/mine")) == {"path": "~/mine"}
    assert choice_of("toy") == choice_of("") == ModelChoice()
    assert choice_of("a\0b") == ModelChoice("a\0b")


class Named:
    """What answers as a model of its name; one whose name begins with "gone" cannot be loaded."""

    def __init__(self, choice, post):
        if (choice.path or "").startswith("gone"):
            raise OSError("no such folder")
        self.name = choice.path or "toy"
        post(Loaded(self.name, 4096, choice=choice))

    def answer(self, question, stopped, post):
        post(Piece(question.number, "", f"{self.name}'s", FIGURES))
        return Ended(question.number, "stop", FIGURES)

    def stop(self):
        pass

    close = stop


def plain(monkeypatch, capsys, keeper, talk, *lines, given=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    engine = Engine(choice_of(dict(given).get("model", "")), load=Named)
    args = dict.fromkeys((*SETTINGS, "model", "revision", "adapter_path", "decay_layer_offset", "system_prompt"))
    resume(talk, SimpleNamespace(**{**args, **dict(given)}), engine, keeper, Config())
    code = Plain(engine, keeper, Config(), talk, []).run()
    assert engine.close()
    return code, *capsys.readouterr()


def stored(path=None):
    keeper, talk = Keeper(None, print), Conversation(Chat(settings={"model": {"path": path}, "temp": 0.5}))
    keeper.keep(talk, talk.add("user", "q"), talk.add("assistant", "a"))
    return keeper, talk


def test_plain_mode_resumes_with_the_chats_model_and_settings(monkeypatch, capsys):
    keeper, talk = stored("owner/x")
    code, out, err = plain(monkeypatch, capsys, keeper, talk, "more")
    assert (code, out) == (0, "owner/x's\n")
    assert "[chat] This chat has x, temp 0.5." in err
    code, out, err = plain(monkeypatch, capsys, keeper, talk, "more", given={"temp": 0.25, "model": "owner/y"}.items())
    assert (code, out) == (0, "owner/y's\n")
    assert talk.chat.settings["temp"] == 0.25
    assert talk.chat.settings["model"] == {"path": "owner/y"}


def test_plain_mode_asks_no_other_model_than_the_user_names(monkeypatch, capsys):
    keeper, talk = stored("gone/x")
    lines = ["more", "/model gone/x", "more", "/model toy", "more"]
    code, out, err = plain(monkeypatch, capsys, keeper, talk, *lines)
    assert (code, out) == (2, "toy's\n")
    assert err.count("no such folder") == 2
    said = "[model] This chat's model is x, but toy is loaded; /model gone/x loads its own, /model toy goes on with the other."
    assert err.count(said) == 3
    assert [t.content for t in talk.path()] == ["q", "a", "more", "toy's"]


def test_an_older_chat_goes_on_with_the_loaded_model_and_says_whose_it_was():
    async def script(d):
        await d.exchange("q", "a")
        d.chat.talk.chat.settings.pop("model", None)
        await d.post(ready("other"))
        await d.say("more")
        assert d.engine.asked[-1] == ["q", "a", "more"]
        assert any("The last answer was fake's; other goes on" in line for line in d.toasts)

    chat(script, SIZES[1], engine=FakeEngine())
