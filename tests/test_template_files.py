"""Where a checkpoint keeps its chat templates, which one is taken, and what is refused without one."""

from __future__ import annotations

import io
import json
from fnmatch import fnmatch

import pytest
from mlx_lm import utils

from ring_mlx import Session
from ring_mlx.checkpoint.hub import NEEDED_FILES
from ring_mlx.checkpoint.tokenizer import load_tokenizer
from ring_mlx.cli import main
from ring_mlx.errors import OptionError, TokenizerError
from ring_mlx.generation.templates import render_text
from tests.parrot import make_parrot
from tests.serving import send

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SETTINGS, OTHER, JINJA, TOOL_USE = (
    "tokenizer_config.json", "chat_template.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
)  # fmt: skip
NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]


@pytest.fixture
def folder(tmp_path):
    made = make_parrot(tmp_path / "model", ["Fine"])
    (made / JINJA).unlink()
    return made


def write(folder, files):
    (folder / TOOL_USE).parent.mkdir(exist_ok=True)
    for name, content in files.items():
        if name.endswith(".json"):
            before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
            content = json.dumps(before | {"chat_template": content})
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("files", "plain", "tools"),
    [
        ({SETTINGS: "plain"}, "plain", "plain"),
        ({SETTINGS: NAMED}, "plain", "tools"),
        ({SETTINGS: {"default": "plain", "tool_use": "tools"}}, "plain", "tools"),
        ({OTHER: "plain"}, "plain", "plain"),
        ({OTHER: NAMED}, "plain", "tools"),
        ({JINJA: "plain"}, "plain", "plain"),
        ({SETTINGS: "plain", TOOL_USE: "tools"}, "plain", "tools"),
        ({JINJA: "plain", TOOL_USE: "tools", "additional_chat_templates/rag.jinja": "rag"}, "plain", "tools"),
        ({SETTINGS: "older", OTHER: "old", JINJA: "plain"}, "plain", "plain"),
        ({SETTINGS: "older", OTHER: "plain"}, "plain", "plain"),
        ({JINJA: "plain", SETTINGS: NAMED, OTHER: NAMED}, "plain", "plain"),
        ({JINJA: "plain", SETTINGS: NAMED, TOOL_USE: "tools"}, "plain", "tools"),
        ({SETTINGS: "plain", OTHER: ""}, "plain", "plain"),
    ],
)
def test_a_template_is_found_wherever_it_lies(folder, files, plain, tools):
    write(folder, files)
    tokenizer = load_tokenizer(folder)
    assert render_text(tokenizer, USER) == render_text(tokenizer, USER, []) == plain
    assert render_text(tokenizer, USER, TOOLS) == tools


def test_every_door_takes_the_one_for_tools(folder, serve, capsys, registered):
    """Each template refuses in its own words, which tell which one was taken."""
    write(folder, {OTHER: "{{ raise_exception('plain') }}", TOOL_USE: "{{ raise_exception('tools') }}"})
    with Session(folder, store=False) as session:
        for tools, said in ((None, "plain"), (TOOLS, "tools")):
            with pytest.raises(TokenizerError, match=said):
                list(session.send(USER, tools=tools))
    server = serve(model=folder)
    for tools, said in (([], "plain"), (TOOLS, "tools")):
        status, _, answer = send(server, "POST", "/v1/chat/completions", {"messages": USER, "tools": tools})
        assert (status, said in answer["error"]["message"]) == (400, True)
    for extra, said in ({}, "plain"), ({"tools": TOOLS}, "tools"):
        flags = ["--chat-template-config", json.dumps(extra)]
        assert main(["generate", "--model", str(folder), *flags]) == 2
        assert said in capsys.readouterr().err
    assert set(utils.load(str(folder))[1].chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize(
    "files",
    [
        {SETTINGS: 5},
        {SETTINGS: [1, {"name": 2}]},
        {SETTINGS: [{"name": "default"}]},
        {SETTINGS: [{"name": [], "template": "x"}]},
        {OTHER: {"default": None}},
    ],
)
def test_what_is_no_template_is_named(folder, files):
    write(folder, files)
    with pytest.raises(TokenizerError, match=r"chat_template in .*\.json is neither a text nor a list of named"):
        load_tokenizer(folder)


def test_templates_that_cannot_be_used(folder):
    write(folder, {TOOL_USE: "tools"})
    tokenizer = load_tokenizer(folder)
    assert render_text(tokenizer, USER, TOOLS) == "tools"
    with pytest.raises(TokenizerError, match="no default chat template, only tool_use; give"):
        render_text(tokenizer, USER)
    (folder / TOOL_USE).write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"tool_use\.jinja is not text"):
        load_tokenizer(folder)


@pytest.mark.parametrize("files", [{}, {SETTINGS: []}, {SETTINGS: {}}, {SETTINGS: ""}, {OTHER: ""}, {JINJA: " \n"}])
def test_what_says_nothing_is_no_template(folder, files):
    write(folder, files)
    for tools in (None, TOOLS):
        with pytest.raises(TokenizerError, match="the checkpoint has no chat template; use --ignore-chat-template"):
            render_text(load_tokenizer(folder), USER, tools)


def test_of_several_templates_only_the_one_that_is_taken_must_be_whole(folder):
    for good, tools in ((TOOLS, None), (None, TOOLS)):
        broken = {"default": "{% if %}", "tool_use": "tools"} if good else {"default": "plain", "tool_use": "{{ a"}
        write(folder, {SETTINGS: broken})
        tokenizer = load_tokenizer(folder)
        assert render_text(tokenizer, USER, good) == ("tools" if good else "plain")
        with pytest.raises(TokenizerError, match=r"the chat template is broken \(.*\); take it from the original"):
            render_text(tokenizer, USER, tools)


def test_a_download_brings_all_templates():
    for name in (SETTINGS, OTHER, JINJA, TOOL_USE):
        assert any(fnmatch(name, pattern) for pattern in NEEDED_FILES)


def test_a_conversion_keeps_all_templates(folder, tmp_path):
    write(folder, {SETTINGS: "plain", TOOL_USE: "tools"})
    assert main(["convert", "--model", str(folder), "--mlx-path", str(tmp_path / "out")]) == 0
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (render_text(tokenizer, USER), render_text(tokenizer, USER, TOOLS)) == ("plain", "tools")


# Without a template.


@pytest.mark.parametrize(
    "command", [("generate",), ("cache-prompt", "--prompt", "a", "--prompt-cache-file", "{tmp}/c"), ("chat", "--plain")]
)
def test_commands_refuse_without_one(folder, tmp_path, capfd, monkeypatch, command):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "RING_MLX_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    main([*(c.format(tmp=tmp_path) for c in command), "--model", str(folder)])
    said = [line for line in capfd.readouterr().err.splitlines() if "no chat template" in line]
    assert len(said) == 1


def test_session_and_server_refuse_without_one(folder, serve):
    with Session(folder, store=False) as session:
        for tools in (None, TOOLS):
            with pytest.raises(TokenizerError, match="no chat template"):
                list(session.send(USER, tools=tools))
        for option in ({"template_options": {"enable_thinking": False}}, {"continue_last": True}):
            with pytest.raises(OptionError, match="needs the chat template, but the prompt is text"):
                list(session.send("hi", **option))
        assert list(session.send("hi"))[-1].message["content"] == "Fine"
    server = serve(model=folder)
    assert send(server, "POST", "/v1/chat/completions", {"messages": USER})[0] == 400
    for extra in ({"tools": TOOLS}, {"chat_template_kwargs": {"enable_thinking": False}}):
        status, _, answer = send(server, "POST", "/v1/completions", {"prompt": "hi", **extra})
        assert (status, answer["error"]["message"].count("needs the chat template")) == (422, 1)
    assert send(server, "POST", "/v1/completions", {"prompt": "hi"})[2]["choices"][0]["text"] == "Fine"


@pytest.mark.parametrize("flag", ["--system-prompt", "--ignore-chat-template"])
def test_a_cached_prompt_in_plain_text_has_no_system_prompt(folder, tmp_path, capsys, flag):
    flags = ["--system-prompt", "S", "--ignore-chat-template"] if flag == "--system-prompt" else [flag]
    sent = ["cache-prompt", "--model", str(folder), "--prompt", "a", "--prompt-cache-file", str(tmp_path / "c"), *flags]
    assert main(sent) == (2 if "S" in flags else 0)
    assert ("--system-prompt needs the chat template" in capsys.readouterr().err) == ("S" in flags)
