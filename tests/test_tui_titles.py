"""Titles: made by the model when it is idle, taken if they are any good, never in the place of the user's."""

from __future__ import annotations

import io
import queue
import sys

import pytest

from tests.tui_pilot import FIGURES, FakeEngine, chat
from tui import config
from tui.answering import Engine
from tui.config import Config
from tui.conversation import Conversation
from tui.keeper import Keeper
from tui.messages import Ended, Entitled, Loaded, Piece, Question, Sampling
from tui.plain import Plain
from tui.store import Chat, Database, chats
from tui.title_text import title_from

EXCHANGE = "What is 27 + 35?\nThe sum is 62."


class Naming(FakeEngine):
    """Also records which titles are wished for."""

    def __init__(self):
        super().__init__()
        self.wished = []

    def entitle(self, *wish):
        self.wished.append(wish)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(d, chat_id):
    return chats.load(d.chat.keeper.db, chat_id).title


def test_a_title_is_wished_for_after_the_first_exchange_and_taken(home):
    engine = Naming()

    async def script(d):
        await d.exchange("What is 27 + 35?", "The sum is 62.")
        first = d.chat.talk.chat.id
        assert engine.wished == [(first, "What is 27 + 35?", "The sum is 62.")]
        assert stored(d, first) == "What is 27 + 35?"
        await d.exchange("And 1 + 1?", "2")
        assert engine.wished[1] == engine.wished[0], "the first was ended by the question"
        await d.press("ctrl+n")
        await d.post(Entitled(first, " Title: **Sum of 27 and 35.**\n"))
        assert stored(d, first) == "Sum of 27 and 35"
        await d.exchange("What is 27 + 35?", "The sum is 62.")
        second = d.chat.talk.chat.id
        await d.post(Entitled(second, "Sum of 27 and 35"), Entitled(second, "The other sum"), Entitled("x", "The sum"))
        assert d.chat.talk.chat.title == stored(d, second) == "Sum of 27 and 35 (2)"
        await d.exchange("more", "b")
        assert len(engine.wished) == 3, "it has its title"
        await d.chat.open_chat(d.chat.keeper.open(first))
        await d.exchange("more", "b")
        assert len(engine.wished) == 3

    chat(script, engine=engine, path=home / "chats.db")


def test_the_users_title_stays_whoever_gives_it_and_wherever(home):
    engine, path = Naming(), home / "chats.db"

    async def script(d):
        await d.exchange("What is 27 + 35?", "The sum is 62.")
        await d.command("/title What is 27 + 35?")
        await d.post(Entitled(d.chat.talk.chat.id, "Sum of 27 and 35"))
        assert stored(d, d.chat.talk.chat.id) == "What is 27 + 35?"
        await d.exchange("more", "b")
        assert len(engine.wished) == 1
        await d.press("ctrl+n")
        await d.exchange("What is 27 + 35?", "The sum is 62.")
        assert d.chat.talk.chat.title == "What is 27 + 35? (2)"
        other = Database(path)
        other.write(chats.renaming(d.chat.talk.chat.id, "Named there"))
        other.close()
        await d.post(Entitled(d.chat.talk.chat.id, "Sum of 27 and 35"))
        assert d.chat.talk.chat.title == stored(d, d.chat.talk.chat.id) == "Named there"

    chat(script, engine=engine, path=path)


def test_three_chats_of_one_question_have_three_titles():
    async def script(d):
        for n in range(3):
            await d.exchange("What is 27 + 35?", "The sum is 62.")
            await d.post(Entitled(d.chat.talk.chat.id, "I cannot help with that, because I am only a toy model."))
            assert d.chat.talk.chat.title == ("What is 27 + 35?" if n == 0 else f"What is 27 + 35? ({n + 1})")
            await d.press("ctrl+n")

    chat(script, engine=Naming())


def test_false_turns_titles_off(home):
    engine = Naming()

    async def script(d):
        await d.exchange("What is 27 + 35?", "The sum is 62.")
        assert engine.wished == []

    (home / "config.toml").write_text("titles = false\n")
    found, wrong = config.load(home / "config.toml")
    assert wrong == ""
    chat(script, engine=engine, config=found)
    (home / "config.toml").write_text("titles = 'no'\n")
    assert "titles is not true or false" in config.load(home / "config.toml")[1]
    config.save(home / "new.toml", Config(titles=False))
    assert config.load(home / "new.toml") == (Config(titles=False), "")


def test_no_title_is_wished_for_an_answer_that_is_not_there():
    engine = Naming()

    async def script(d):
        await d.say("q")
        await d.post(Ended(d.engine.number, "stopped"))
        assert engine.wished == []

    chat(script, engine=engine)


def test_plain_mode_finds_chats_by_their_titles(monkeypatch, capsys):
    keeper = Keeper(None, print)
    for title in ("Rings of Saturn", "Attention"):
        talk = Conversation(Chat(title))
        keeper.keep(talk, talk.add("user", "what goes around"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/chats saturn RING\n/chats 1\n/title\n/chats around\n"))
    assert Plain(FakeEngine(), keeper, Config(), None, []).run() == 0
    said = capsys.readouterr().err
    assert "  1 Rings of Saturn\n/chats N opens one.\n" in said
    assert "The title is 'Rings of Saturn'." in said
    assert "  2 " in said


@pytest.mark.parametrize("is_terminal", [True, False])
def test_plain_mode_has_titles_where_somebody_types(monkeypatch, is_terminal):
    class Answering(Naming):
        def ask(self, question):
            super().ask(question)
            self.post(Piece(question.number, "", "The sum is 62.", FIGURES))
            self.post(Ended(question.number, "stop", FIGURES))

        def entitle(self, chat_id, *exchange):
            super().entitle(chat_id, *exchange)
            self.post(Entitled(chat_id, "Sum of 27 and 35"))

    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 27 + 35?\n/title\n"))
    engine, keeper = Answering(), Keeper(None, print)
    plain = Plain(engine, keeper, Config(), None, [])
    plain._is_terminal = is_terminal
    assert plain.run() == 0
    assert len(engine.wished) == is_terminal
    assert plain.talk.chat.title == ("Sum of 27 and 35" if is_terminal else "What is 27 + 35?")


@pytest.mark.parametrize(
    ("said", "title"),
    [
        ("Sum of 27 and 35", "Sum of 27 and 35"),
        ("“Adding 27 and 35”", "Adding 27 and 35"),
        ("# Title: `27 + 35`.\n", "27 + 35"),
        ("Summing up", ""),
        ("", ""),
        ("  \n ", ""),
        ("<think>\n27</think>", ""),
        ("<b>27</b>", ""),
        ("<role>", ""),
        ("27\n35", ""),
        ("27\r35", ""),
        ("27\u202835", ""),
        ("27\t35", ""),
        ("27\x1b[31m", ""),
        ("27 \u202e35", ""),
        ("27\u200b", ""),
        ("27\x00", ""),
        ("?! + *", ""),
        ("27 " * 11, ""),
        ("27" * 40, ""),
        ("I cannot help with that, because I am only a toy model.", ""),
        ("What is that", ""),
        ("\ud800 27", ""),
    ],
)
def test_a_silly_title_is_not_taken(said, title):
    assert title_from(said, EXCHANGE) == title


def test_a_title_in_a_script_without_spaces():
    assert title_from("标题:线性注意力", "什么是线性注意力?\n它是") == "线性注意力"
    assert title_from("天气", "什么是线性?") == ""


def test_the_toy_makes_none_delays_nothing_and_changes_no_record():
    """The packaged model through the real engine: the second question ends the title, and reads as much as without it."""
    heard = queue.Queue()

    def until(kind):
        while not isinstance(message := heard.get(timeout=60), kind):
            pass
        return message

    def second(engine, wishes):
        talk = [{"role": "user", "content": "What is 27 + 35?"}]
        engine.ask(Question(1, talk, Sampling(temp=0, max_tokens=200)))
        assert until(Ended).reason == "stop"
        for _ in range(wishes):
            engine.entitle("c", "What is 27 + 35?", "The sum is 62.")
        talk += [{"role": "assistant", "content": "The sum is 62."}, {"role": "user", "content": "What is 1 + 1?"}]
        engine.ask(Question(2, talk, Sampling(temp=0, max_tokens=200)))
        return until(Ended).figures

    engine = Engine()
    engine.start(heard.put)
    until(Loaded)
    plain = second(engine, 0)
    assert second(engine, 3).prompt_tokens == plain.prompt_tokens
    assert not any(isinstance(heard.get(), Entitled) for _ in range(heard.qsize()))
    engine.entitle("c", "What is 27 + 35?", "The sum is 62.")
    said = until(Entitled)
    assert said.chat_id == "c"
    assert said.text
    assert title_from(said.text, EXCHANGE) == "", said.text
    assert engine.close(60)
