"""One conversation with a fake engine: asking, streaming, stopping, thoughts, gauges, and what must never happen."""

from __future__ import annotations

import threading

import pytest
from textual import events
from textual.widgets._toast import Toast

from tests.tui_pilot import FIGURES, SIZES, FakeEngine, chat, pause
from tui.gauges import bar, gauges, loading_text, reading_text, seconds
from tui.messages import Ended, Figures, Loading, Piece, Reading
from tui.store import Attachment
from tui.widgets.answer import Answer
from tui.widgets.turn import AssistantTurn, Fold, TurnView, UserTurn


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    return tmp_path


def shown(markdown):
    """What a Markdown widget shows, block by block."""
    return [(type(b).__name__, str(getattr(b, "content", ""))) for b in markdown.query("MarkdownBlock")]


def fold(d):
    return str(d.app.query(".fold").last().render())


@pytest.mark.parametrize("size", SIZES)
def test_a_question_and_its_answer(size):
    async def script(d):
        await d.type("hi there")
        await d.press("enter")
        assert d.engine.asked == [["hi there"]]
        await d.post(Reading(d.engine.number, 1000, 2000, 500, 3.0))
        assert "1,000 of 2,000 tokens · 500 reused · 3.0 s left" in d.status
        await d.post(d.thought("hm", 20, 0.84))
        assert fold(d) == "▸ thinking 0.8 s, 20 tokens"
        await d.post(d.thought("m.", 34, 1.21), d.text("\n\nIt is "))
        assert fold(d) == "▸ thought 1.2 s, 34 tokens"
        assert shown(d.app.query_one(Answer)) == [("MarkdownParagraph", "It is")]
        await d.post(d.text("**4**."), d.end())
        assert shown(d.app.query_one(Answer)) == [("MarkdownParagraph", "It is 4.")]
        answer = d.chat.talk.leaf
        assert (answer.thinking, answer.content) == ("hmm.", "It is **4**.")
        assert (answer.record.model, answer.record.quantisation, answer.record.sampling["seed"]) == ("fake", "4-bit", 7)
        assert len(d.status) <= size[0] - 2
        memory = "1.5/16 GB" if size[0] < 96 else "memory 1.5 of 16 GB"
        for part in ("fake", "read 500", "write 99 tok/s", "first 0.12 s", "24/4", memory, "8 reused"):
            assert part in d.status
        await d.say("more")
        assert d.engine.asked[1] == ["hi there", "It is **4**.", "more"]
        assert d.engine.questions[1].messages[1]["reasoning_content"] == "hmm."

    chat(script, size)


def test_a_warning_of_another_thread_is_shown():
    async def script(d):
        thread = threading.Thread(
            target=d.app.show_warning, args=(UserWarning("[cache] too small."), UserWarning, "", 1)
        )
        thread.start()
        thread.join()
        await d.settle()
        assert d.toasts == ["[cache] too small."]

    chat(script)


@pytest.mark.parametrize("size", SIZES)
def test_everything_has_its_place(size):
    async def script(d):
        await d.exchange("hi", "line\n\n" * 60)
        turns, prompt, line = d.chat.turns.region, d.chat.entry.prompt.region, d.chat.status.region
        assert turns.bottom == prompt.y
        assert prompt.bottom == line.y == size[1] - 2
        assert turns.width == prompt.width == size[0]
        assert turns.height == size[1] - 5

    chat(script, size)


def test_the_end_stays_in_view_until_the_user_scrolls():
    async def script(d):
        await d.say("hi")
        await d.post(d.text("line\n\n" * 40))
        assert d.chat.turns.is_vertical_scroll_end
        await d.press("pageup")
        await d.post(d.text("line\n\n" * 40))
        assert not d.chat.turns.is_vertical_scroll_end
        await d.post(d.end())
        await d.say("more")
        await d.post(d.text("line\n\n" * 40))
        assert d.chat.turns.is_vertical_scroll_end

    chat(script)


def test_the_thought_opens_and_grows():
    async def script(d):
        await d.say("hi")
        await d.post(d.thought("first [b]", 2, 0.1))
        await d.pilot.click(".fold")
        await d.post(d.thought(" second", 3, 0.2))
        view = d.app.query_one(".thought")
        assert view.region.height == 1
        assert str(view.render()) == "first [b] second"
        await d.press("alt+up", "t")
        assert not view.display
        await d.press("space")
        assert view.display

    chat(script)


def test_without_a_thought_there_is_no_fold():
    async def script(d):
        await d.exchange("hi", "hello")
        assert not d.app.query_one(".fold").display

    chat(script)


def test_escape_stops_and_keeps():
    async def script(d):
        await d.say("hi")
        await d.post(d.text("half an ans"))
        await d.press("escape")
        assert d.engine.stops == 1
        await d.post(d.end("stopped"))
        assert shown(d.app.query_one(Answer)) == [("MarkdownParagraph", "half an ans")]
        assert str(d.app.query_one(".note").render()).startswith("stopped")
        await d.say("on")
        assert d.engine.asked[-1] == ["hi", "half an ans", "on"]

    chat(script)


def test_a_question_stopped_before_any_text_returns_to_the_prompt():
    async def script(d):
        await d.say("hi")
        await d.post(d.end("stopped"))
        assert d.chat.entry.prompt.text == "hi"
        assert not d.app.query(TurnView)
        assert d.said == []
        assert not d.chat.talk.turns

    chat(script)


def test_many_small_pieces_show_what_one_large_one_shows():
    text = "# Sum\n\nIt *is*:\n\n1. one\n2. `two`\n\n```python\nx = 1\n\ny = 2\n```\n\n> so\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
    text = text * 3 + "- end"

    async def script(d):
        await d.say("hi")
        await d.post(*(d.text(c) for c in text), d.end())
        streamed = d.app.query_one(Answer)
        whole = Answer(text)
        await d.chat.turns.mount(whole)
        await d.settle()
        assert streamed.source == text
        assert shown(streamed) == shown(whole)
        assert streamed.codes() == ["x = 1\n\ny = 2"] * 3

    chat(script)


def test_control_characters_do_not_reach_the_terminal():
    nasty = "a\x1b[2Jb\x9b2Jc\x07d\r\n\n```x\x1b[2J\n\x1b]0;title\x07\n```\n"

    async def script(d):
        d.chat.entry.post_message(d.chat.entry.Asked(nasty, [Attachment("n\x1b[2J", nasty)]))
        await d.settle()
        await d.post(d.thought(nasty, 3, 0.1), d.text(nasty), d.end())
        d.app.query_one(AssistantTurn).toggle()
        await pause(0.1)
        text = "".join(d.screen_text)
        assert text.count("[2J") >= 4
        assert text.isprintable()
        assert d.said[-1] == nasty
        await d.command("/title \x1b[2Jred")
        await d.command("/chats")
        assert "".join(d.screen_text).isprintable()
        await d.press("escape", "alt+up", "e")
        assert "".join(d.screen_text).isprintable()

    chat(script, SIZES[1])


def test_enter_sends_and_other_keys_start_a_line():
    async def script(d):
        await d.press("a", "ctrl+j", "b", "shift+enter", "c")
        assert d.chat.entry.prompt.size.height == 3
        await d.press("enter")
        assert d.engine.asked == [["a\nb\nc"]]
        assert d.chat.entry.prompt.text == ""

    chat(script)


def test_a_burst_of_keys_is_taken_in_order():
    async def script(d):
        for c in "hi\rmore\nlines\r":
            d.app.post_message(events.Key({"\r": "enter", "\n": "ctrl+j"}.get(c, c), c))
        await pause(0.1)
        await d.settle()
        assert d.engine.asked == [["hi"]]
        assert [w.text for w in d.chat.entry.queued.found] == ["more\nlines"]

    chat(script)


def test_nothing_is_sent_while_an_answer_runs_or_without_text():
    async def script(d):
        await d.say(" ")
        assert d.engine.asked == []
        await d.say("one")
        await d.say("two")
        assert d.engine.asked == [["one"]]
        assert [w.text for w in d.chat.entry.queued.found] == ["two"]
        for command in ("regenerate", "edit", "continue", "branch", "undo", "next"):
            await d.command(f"/{command}")
        assert len(d.engine.questions) == 1

    chat(script)


def test_up_and_down_recall_what_was_sent():
    async def script(d):
        await d.exchange("first", "a")
        await d.exchange("second\nline", "b")
        await d.press("d", "up")
        assert d.chat.entry.prompt.text == "second\nline"
        await d.press("up", "up")
        assert d.chat.entry.prompt.text == "first"
        await d.press("up")
        assert d.chat.entry.prompt.text == "first"
        await d.press("down", "down", "down")
        assert d.chat.entry.prompt.text == "d"

    chat(script)


def test_a_new_chat_is_empty():
    async def script(d):
        await d.exchange("hi", "hello")
        await d.press("ctrl+n")
        assert not d.app.query(TurnView)
        assert d.app.query_one("#greeting").display
        await d.say("again")
        assert d.engine.asked[-1] == ["again"]

    chat(script)


def test_an_abandoned_answer_does_not_reach_the_next_chat():
    async def script(d):
        await d.say("old")
        await d.post(d.text("old answer"))
        late = [d.text(" goes on"), d.end("stopped")]
        first = d.chat.talk
        await d.press("ctrl+n")
        assert d.engine.stops == 1
        await d.post(*late)
        await d.say("new")
        await d.post(*late)
        assert d.said == ["new", ""]
        await d.post(d.text("fresh"), d.end())
        assert d.said == ["new", "fresh"]
        assert [t.content for t in first.path()] == ["old", "old answer"]
        assert first.leaf.record.finish_reason == "stopped"

    chat(script)


def test_a_failure_is_shown_and_the_question_returns_to_the_prompt():
    async def script(d):
        from tui.messages import Failed

        await d.say("hi")
        await d.post(Failed("[prompt] too long [really]", d.engine.number))
        assert "[prompt] too long [really]" in str(d.app.query_one(Toast).render())
        assert d.app.query_one(Toast).region.bottom <= d.chat.entry.region.y
        assert d.chat.entry.prompt.text == "hi"
        await d.press("enter")
        assert d.engine.asked == [["hi"], ["hi"]]
        await d.post(d.text("half"), Failed("[engine] no", d.engine.number))
        assert d.said == ["hi", "half"]

    chat(script)


def test_without_a_model_questions_wait_for_one():
    async def script(d):
        from tui.messages import Failed, Loaded

        assert "loading the model" in d.status
        await d.post(Loading("big", 3, 6))
        assert "big" in d.status
        assert bar(3, 6) in d.status
        await d.post(Failed("[hub] no such folder"))
        assert "no model; /model chooses one" in d.status
        await d.command("/model /some/folder")
        assert d.engine.choices[0].path == "/some/folder"
        await d.post(Loaded("folder", 100))
        assert "ready" in d.status

    chat(script, engine=FakeEngine(loads=False))


def test_quit_while_an_answer_runs():
    async def script(d):
        await d.say("hi")
        await d.post(d.text("half"))
        await d.press("ctrl+q")
        assert not d.app.is_running

    engine = FakeEngine()
    app = chat(script, engine=engine)
    assert app.return_code == 0
    assert engine.stops >= 1
    assert app.all_saved


def test_typing_goes_on_while_text_streams():
    async def script(d):
        await d.say("hi")
        for n in range(20):
            d.chat.post_message(d.text(f"**word{n}** `code` "))
            await d.pilot.press("x")
        assert d.chat.entry.prompt.text == "x" * 20
        await d.post(d.end())
        assert d.said[-1].count("word") == 20

    chat(script)


@pytest.mark.parametrize("room", range(20, 130, 7))
def test_gauges_fit(room):
    f = Figures(
        prompt_tokens=131_072,
        reused_tokens=99_999,
        prompt_tps=9999.0,
        generation_tps=999.0,
        time_to_first_token_s=99.9,
        peak_memory_bytes=int(99e9),
        cache_bytes=int(9e9),
    )
    text = gauges(f, 131_072, int(128e9), room)
    assert len(text) <= room
    assert "131" in text
    assert (room < 96) or "write 999 tok/s" in text
    words = [w for w in ("memory 99.0 of 128 GB, snapshots 9.0", "memory 99.0 of 128 GB", "99.0/128 GB") if w in text]
    assert words[:1] == ["memory 99.0 of 128 GB, snapshots 9.0"] or room < 118
    assert words or room < 66
    assert gauges(f, 131_072, int(128e9), 200).endswith("memory 99.0 of 128 GB, snapshots 9.0")


@pytest.mark.parametrize("size", [(40, 12), (60, 20), (80, 24)])
def test_the_last_line_is_never_cut_within_a_word(size):
    async def script(d):
        d.chat.status.model = "Ring-mini-linear-2.0-4bit"
        await d.say("hi")
        for message in (Reading(d.engine.number, 5000, 20_000, 1000, 12.5), d.text("A."), d.end()):
            await d.post(message)
            for unsaved in (0, 12):
                d.chat.status.unsaved = unsaved
                line = d.status
                assert len(line) <= size[0] - 2
                assert line.endswith(
                    ("12 s left", "reading 25 %", "reading…", "24/4096", "24/4,096", "reused", "tok/s", "GB")
                )
                assert "12 turns not saved" in line or not unsaved

    chat(script, size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (seconds(0.123), "0.12 s"),
        (seconds(12.3), "12 s"),
        (seconds(300), "5 min"),
        (reading_text(Reading(1, 5, 10)), "reading ━━━━━━╌╌╌╌╌╌ 5 of 10 tokens"),
        (loading_text(Loading("x")), "loading the model"),
    ],
)
def test_words(text, expected):
    assert text == expected


def test_an_empty_answer_is_still_an_answer():
    async def script(d):
        await d.say("hi")
        await d.post(Piece(d.engine.number, "", "", FIGURES), d.end("length"))
        assert d.said == ["hi", ""]
        assert "/continue goes on, or raise max_tokens" in str(d.app.query_one(".note").render())

    chat(script)


def test_large_texts_are_cut_on_screen_only():
    async def script(d):
        await d.exchange("y" * 10_000, "ok")
        assert len(str(d.app.query_one(UserTurn).content)) < 5000
        assert len(d.engine.asked[0][0]) == 10_000

    chat(script)


def test_what_was_shown_wrongly_is_corrected():
    """A thought that was none becomes the answer, and an answer that was a thought goes into the fold."""

    async def script(d):
        await d.say("hi")
        await d.post(d.thought("It is 4.", 3, 1.0))
        await d.post(Piece(d.engine.number, "", "It is 4.", FIGURES, revised=""), d.end())
        answer = d.chat.talk.leaf
        assert (answer.thinking, answer.content, d.said[-1]) == ("", "It is 4.", "It is 4.")
        assert not d.app.query(Fold).last().display
        await d.say("why")
        await d.post(d.text("Hm."))
        await d.post(Piece(d.engine.number, "", "So.", FIGURES, revised="Hm."), d.end())
        answer = d.chat.talk.leaf
        assert (answer.thinking, answer.content, d.said[-1]) == ("Hm.", "So.", "So.")
        assert d.app.query(Fold).last().display

    chat(script)


def test_an_answer_that_was_all_thought_says_so():
    async def script(d):
        await d.say("hi")
        await d.post(d.thought("Hm.", 3, 1.0))
        await d.post(Ended(d.engine.number, "length", Figures(generated_tokens=9, thinking_tokens=9)))
        note = str(d.app.query_one(".note").render())
        assert "the answer is empty: all 9 tokens were thought; /continue goes on, or raise max_tokens." in note

    chat(script)
