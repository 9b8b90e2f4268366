"""The configuration file, the settings panel, models, presets, keys and themes."""

from __future__ import annotations

import json
import re

import pytest
from textual.widgets import Input, OptionList, TextArea

from tests.tui_pilot import SIZES, FakeEngine, chat, pause
from tui import config, models, paths
from tui.config import START, Config, Preset
from tui.messages import Loaded, ModelChoice, Sampling
from tui.screens.models import ModelsScreen
from tui.screens.settings import SettingsScreen
from tui.screens.text import HelpScreen


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing of the user's is read or written."""
    monkeypatch.setenv("RING_MLX_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_files_are_in_the_platforms_folders_or_all_in_one(monkeypatch, tmp_path):
    assert paths.config_file() == tmp_path / "config.toml"
    monkeypatch.delenv("RING_MLX_HOME")
    assert paths.config_file().parent.name == "ring-mlx"
    assert paths.data_file("chats.db").parent.name == "ring-mlx"


def test_a_missing_file_is_all_defaults_and_the_start_is_one_too(tmp_path):
    assert config.load(tmp_path / "none.toml") == (Config(), "")
    (tmp_path / "start.toml").write_text(START)
    assert config.load(tmp_path / "start.toml") == (Config(), "")


def test_what_is_saved_comes_back_and_comments_stay(tmp_path):
    path = tmp_path / "deep" / "config.toml"
    new = Config(
        theme="textual-light",
        system_prompt='He said "so"\nand left',
        sampling=Sampling(temp=0.0, thinking_budget=100),
        presets={"a b": Preset(Sampling(seed=3), "p")},
    )
    config.save(path, new)
    assert config.load(path) == (new, "")
    path.write_text(path.read_text() + "\n[keys]  # mine\nnew = 'f5'\n")
    config.save(path, Config(theme="high-contrast"))
    text = path.read_text()
    assert "# mine" in text
    assert "Configuration of" in text
    again, wrong = config.load(path)
    assert (again.theme, again.keys, again.sampling, again.presets, wrong) == (
        "high-contrast",
        {"new": "f5"},
        Sampling(),
        {},
        "",
    )
    assert list(path.parent.iterdir()) == [path]


def test_options_of_the_command_line_are_not_written(tmp_path):
    path = tmp_path / "config.toml"
    config.save(path, Config(sampling=Sampling(top_p=0.9)))
    before = Config(model="given", sampling=Sampling(top_p=0.9, seed=5, temp=0.1))
    config.save(path, Config(model="given", sampling=Sampling(top_p=0.9, seed=5, temp=0.2), theme="x"), before)
    assert config.load(path) == (Config(theme="x", sampling=Sampling(top_p=0.9, temp=0.2)), "")


@pytest.mark.parametrize("text", ["theme = ", "\x00", "[sampling\n", "a = 1\na = 2"])
def test_a_broken_file_is_said_and_never_overwritten(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    found, wrong = config.load(path)
    assert found == Config()
    assert wrong.startswith(f"[config] {path} cannot be read (")
    assert "\n" not in wrong
    with pytest.raises(config.ConfigError):
        config.save(path, Config(theme="x"))
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thme = 'x'", "thme is not known"),
        ("theme = 3", "theme is not a text"),
        ("[sampling]\ntemp = 'hot'", "temp 'hot' is not a number from 0 to 100"),
        ("[sampling]\nmax_tokens = 1.5", "max_tokens 1.5 is not a whole number"),
        ("[sampling]\nheat = 1", "heat is not a setting"),
        ("sampling = 1", "sampling is not a table"),
        ("[presets]\nx = 1", None),
        ("[keys]\nfly = 'f5'", "keys.fly names no command"),
        ("[keys]\nnew = 5", "keys.new is not a text"),
        ("reduced_motion = 1", "reduced_motion is not true or false"),
    ],
)
def test_a_wrong_value_is_named_and_the_rest_holds(tmp_path, text, said):
    path = tmp_path / "config.toml"
    path.write_text(f"model = 'kept'\n{text}\n")
    found, wrong = config.load(path)
    assert found.model == "kept"
    assert (said or "") in wrong


def test_the_settings_panel(home):
    async def script(d):
        await d.post(Loaded("fake", 4096, sampling=Sampling(temp=0.25, top_k=20)))
        await d.press("ctrl+s")
        assert isinstance(d.app.screen, SettingsScreen)
        temp, top_k = (d.app.screen.query_one(f"#{name}", Input) for name in ("temp", "top_k"))
        assert (temp.value, temp.placeholder, top_k.placeholder) == ("", "0.25", "20")
        d.app.screen.query_one("#temp", Input).value = "hot"
        await d.press("ctrl+s")
        assert "temp 'hot' is not a number" in "\n".join(d.screen_text)
        d.app.screen.query_one("#temp", Input).value = "0.2"
        d.app.screen.query_one("#thinking_budget", Input).value = "64"
        d.app.screen.query_one("#system", TextArea).text = "Be brief."
        await d.press("ctrl+s")
        assert d.chat.sampling == Sampling(temp=0.2, thinking_budget=64)
        await d.say("hi")
        assert d.engine.questions[0].sampling.temp == 0.2
        assert d.engine.asked == [["Be brief.", "hi"]]
        assert config.load(home / "config.toml")[0].system_prompt == ""
        await d.command("/defaults save")
        assert config.load(home / "config.toml")[0].system_prompt == "Be brief."

    chat(script)


def test_settings_by_command_and_presets():
    async def script(d):
        await d.command("/set temp 0")
        await d.command("/set seed 7")
        await d.command("/budget 10")
        await d.command("/set xtc_probability 0.5")
        await d.command("/system Say so.")
        await d.command("/preset save exact")
        await d.command("/set xtc_probability none")
        await d.command("/budget")
        await d.command("/system")
        await d.command("/set seed none")
        assert d.chat.sampling == Sampling(temp=0.0)
        await d.command("/set temp hot")
        await d.command("/set nothing 1")
        await d.command("/preset nothing")
        assert d.chat.sampling == Sampling(temp=0.0)
        await d.command("/preset exact")
        assert d.chat.sampling == Sampling(temp=0.0, seed=7, thinking_budget=10, xtc_probability=0.5)
        await d.command("/settings")
        await d.press("ctrl+s")
        assert d.chat.sampling.xtc_probability == 0.5, "what the panel does not show stays"
        await d.command("/set xtc_probability none")
        assert d.chat.system_prompt == "Say so."
        await d.command("/settings")
        d.app.screen.query_one("#preset").value = "exact"
        await d.settle()
        await d.press("ctrl+s")
        assert (d.chat.sampling.seed, d.chat.sampling.xtc_probability) == (7, 0.5)

    chat(script)
    assert list(config.load(paths.config_file())[0].presets) == ["exact"]


def test_a_preset_is_deleted_in_the_panel_and_by_command(home):
    presets = {name: Preset(Sampling(seed=n)) for n, name in enumerate(("one", "two", "three"))}
    config.save(home / "config.toml", Config(presets=presets))

    def names():
        return list(config.load(home / "config.toml")[0].presets)

    async def script(d):
        await d.press("ctrl+s")
        await d.press("ctrl+x")
        assert names() == ["one", "two", "three"]
        d.app.screen.query_one("#preset").value = "two"
        await d.settle()
        await pause(0.3)
        assert "Delete preset" in "\n".join(d.screen_text)
        await d.press("ctrl+x")
        assert names() == ["one", "three"]
        assert "Deleted two." in "\n".join(d.screen_text)
        assert d.app.screen.query_one("#seed", Input).value == "1"
        await d.press("ctrl+x")
        assert names() == ["one", "three"]
        d.app.screen.query_one("#preset").value = "one"
        await d.settle()
        await d.press("escape")
        assert d.chat.sampling == Sampling()
        await d.command("/preset delete one")
        await d.command("/preset delete one")
        assert names() == ["three"]
        await d.press("ctrl+s")
        d.app.screen.query_one("#preset").value = "three"
        await d.settle()
        await d.press("ctrl+x")
        assert names() == []
        assert not d.app.screen.query_one("#preset").display
        assert "Delete preset" not in "\n".join(d.screen_text)
        await d.press("escape", "ctrl+s")
        assert not d.app.screen.query("#preset")

    chat(script, config=Config(presets=presets))


def checkpoint(folder, **extra):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bailing_moe_linear", **extra}))
    (folder / "model.safetensors").write_bytes(b"0" * 2_000_000)
    return folder


def test_models_are_found_in_folders_and_the_hubs_cache(home):
    checkpoint(home / "mine", quantization={"bits": 4})
    cached = home / "hub" / "models--owner--ring"
    checkpoint(cached / "snapshots" / "abc", quantization={"bits": 8})
    checkpoint(cached / "snapshots" / "newer")  # not main, which is what is loaded
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    checkpoint(home / "hub" / "models--owner--part" / "snapshots" / "abc")
    (home / "hub" / "models--owner--part" / "snapshots" / "abc" / "model.safetensors").unlink()
    (home / "hub" / "models--owner--empty").mkdir()
    other = checkpoint(home / "other")
    (other / "config.json").write_text('{"model_type": "llama"}')
    (home / "broken").mkdir()
    (home / "broken" / "config.json").write_text("{")
    found = list(models.found_models((".", "~/nowhere")))
    assert [(f.name, f.remark) for f in found] == [
        ("toy", "packaged, for trying things out"),
        ("mine", "4-bit, 2 MB"),
        ("owner/ring", "in the hub's cache, 8-bit, 2 MB"),
    ]
    assert found[2].path == "owner/ring"


def test_the_model_picker(home):
    checkpoint(home / "mine")

    async def script(d):
        await d.press("ctrl+l")
        assert isinstance(d.app.screen, ModelsScreen)
        assert d.app.screen.query_one(OptionList).option_count == 2
        await d.press("down", "enter")
        await d.press("ctrl+l")
        await d.type("owner/x")
        await d.press("enter")
        await d.command("/model toy")
        assert d.engine.choices == [ModelChoice(str(home / "mine")), ModelChoice("owner/x"), ModelChoice(None)]
        await d.press("ctrl+l", "escape")
        assert len(d.engine.choices) == 3

    chat(script)


def test_keys_can_be_remapped():
    keys = {"new": "f5", "send": "ctrl+d", "new_line": "enter", "turn_edit": "x"}

    async def script(d):
        await d.type("a")
        await d.press("enter", "b", "ctrl+d")
        assert d.engine.asked == [["a\nb"]]
        await d.post(d.text("ok"), d.end())
        await d.press("alt+up", "x")
        assert d.app.screen is not d.chat
        await d.press("escape", "ctrl+n")
        assert d.said == ["a\nb", "ok"]
        await d.press("f5")
        assert d.said == []
        await d.press("f1")
        assert isinstance(d.app.screen, HelpScreen)
        assert any("f5" in line and "/new" in line for line in d.screen_text)

    chat(script, SIZES[1], config=Config(keys=keys))


def test_themes_and_reduced_motion(home):
    async def script(d):
        assert d.app.animation_level == "none"
        assert d.app.theme == "high-contrast"
        await d.press("ctrl+t")
        assert d.app.theme == "textual-dark"
        await d.command("/theme textual-light")
        assert not d.app.current_theme.dark
        await d.command("/theme nothing")
        assert d.app.theme == "textual-light"

    chat(script, config=Config(theme="high-contrast", reduced_motion=True))
    assert config.load(home / "config.toml")[0].theme == "textual-light"


def test_an_unknown_theme_and_a_read_only_home_are_said(home):
    async def script(d):
        assert "there is no theme 'pink'" in " ".join("".join(d.screen_text).split())
        (home / "config.toml").mkdir()
        await d.command("/set temp 0")
        assert d.chat.sampling.temp == 0

    chat(script, SIZES[1], config=Config(theme="pink"))


def test_without_colour(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    async def script(d):
        await d.exchange("q", "**bold** `code`")
        assert d.app.no_color
        svg = d.app.export_screenshot()
        colours = set(re.findall(r"fill: (#[0-9a-f]{6})", svg))
        colours.discard("#c5c8c6")  # the picture's own title
        assert all(c[1:3] == c[3:5] == c[5:7] for c in colours), colours

    chat(script)


def test_the_palette_has_the_commands():
    async def script(d):
        found = {c.title: c for c in d.app.get_system_commands(d.chat)}
        assert {"New", "Chats", "Regenerate", "Theme", "Quit"} <= set(found)
        await found["New"].callback()
        await d.press("ctrl+p")
        await d.type("regen")
        await pause(0.3)
        assert "Regenerate" in "\n".join(d.screen_text)

    chat(script, engine=FakeEngine())
