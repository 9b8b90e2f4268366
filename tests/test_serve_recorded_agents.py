"""What codex and Claude Code sent while they read, edited and answered, with short texts in place of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ring_mlx.serve.answer import Call
from ring_mlx.serve.calls import Calls
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.server import Server
from tests.parrot import make_parrot
from tests.scripted import results, said, script
from tests.serving import metric, send, wait_until

READ = '{"file_path": "/p/a.py"}', '{"cmd": "cat a.py"}'
EDIT = (
    '{"file_path": "/p/a.py", "old_string": "hello = 1", "new_string": "hello = 2"}',
    '{"cmd": "sed -i \'s/hello = 1/hello = 2/\' a.py"}',
)
AGENTS = {
    "claude": (("Read", READ[0]), ("Edit", EDIT[0]), "context_management, output_config.effort"),
    "codex": (("exec_command", READ[1]), ("exec_command", EDIT[1]), "tool web_search, reasoning.encrypted_content"),
}


def recorded(agent):
    return json.loads(Path(__file__).with_name("agents").joinpath(f"{agent}.json").read_text())


def events_of(text):
    """The events of a stream; each line that names one fits its data."""
    found = [block.split("\n", 1) for block in text.strip().split("\n\n") if not block.startswith(":")]
    events = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in found]
    assert all(name == event["type"] for name, event in events)
    return [event for _, event in events]


def told(agent, text):
    """Thought, text and calls of an answer, the ids of its calls, and the tokens of its prompt that were reused and read."""
    events = events_of(text)
    if agent == "codex":
        response = events[-1]["response"]
        items = response["output"]
        usage = response["usage"]
        cached = usage["input_tokens_details"]["cached_tokens"]
        thought, texts = ([i["content"][0]["text"] for i in items if i["type"] == t] for t in ("reasoning", "message"))
        calls = [(i["name"], json.loads(i["arguments"]), i["call_id"]) for i in items if i["type"] == "function_call"]
        return "".join(thought), "".join(texts), calls, (cached, usage["input_tokens"] - cached)
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    thought, text = ("".join(d.get(kind, "") for d in deltas) for kind in ("thinking", "text"))
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    inputs = iter([d["partial_json"] for d in deltas if "partial_json" in d])
    calls = [(b["name"], json.loads(next(inputs)), b["id"]) for b in blocks if b["type"] == "tool_use"]
    usage = events[-2]["usage"]
    return thought, text, calls, (usage["cache_read_input_tokens"], usage["input_tokens"])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = make_parrot(tmp_path_factory.mktemp("recorded") / "model", ["x"], max_position_embeddings=8192)
    made = Server(Settings(model, "ring", store=False), port=0)
    made.start()
    assert made.engine.wait_until_loaded(30)
    yield made
    assert made.close()


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_reads_edits_and_answers(agent, server, monkeypatch):
    """Ids of calls are the server's own, as in the recorded talk; nothing but the last results is read in each turn."""
    read, edit, left_out = AGENTS[agent]
    steps = (
        said("I read it.", read, thought="read first"),
        said("", edit, thought="now edit"),
        said("Done.", thought="so"),
    )
    script(monkeypatch, lambda request: steps[results(request)])
    talk = recorded(agent)
    bodies, path = json.dumps(talk["bodies"]), talk["path"]
    for n, step in enumerate(((read,), (edit,), ())):
        ahead = metric(server, "ahead_tokens_total")
        status, headers, text = send(server, "POST", path, json.loads(bodies)[n], **talk["headers"])
        assert (status, headers["X-Ring-Left-Out"]) == (200, left_out)
        thought, answer, calls, (cached, new) = told(agent, text)
        assert (thought.strip(), answer.strip()) == (("read first", "I read it."), ("now edit", ""), ("so", "Done."))[n]
        assert [call[:2] for call in calls] == [(name, json.loads(arguments)) for name, arguments in step]
        assert n == 0 or (cached > 300 and new < 100), "only the result of the tool is read"
        for _, _, made in calls:
            bodies = bodies.replace(f'"{OLD[agent][n]}"', f'"{made}"')
        wait_until(lambda before=ahead: metric(server, "ahead_tokens_total") > before)


OLD = {agent: [] for agent in AGENTS}
for agent, ids in OLD.items():
    last = recorded(agent)["bodies"][-1]
    if agent == "codex":
        ids += [item["call_id"] for item in last["input"] if item["type"] == "function_call"]
    else:
        ids += [
            b["id"]
            for m in last["messages"]
            if m["role"] == "assistant"
            for b in m["content"]
            if b["type"] == "tool_use"
        ]


def turn(**arguments):
    function = {"name": "edit", "arguments": arguments}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"all": False, "b": [1], "a": 1}, ["a", "b"]),
        ({"b": [1], "a": 2}, ["b", "a"]),
        ({"b": [True], "a": 1}, ["b", "a"]),
        ({"b": [1]}, ["b"]),
    ],
)
def test_a_call_is_restored_unless_the_client_changed_it(given, expected):
    calls, talk = Calls(), turn(**given)
    calls.keep([Call("c1", "edit", {"a": 1, "b": [1]})])
    calls.restore(talk)
    assert list(talk[0]["tool_calls"][0]["function"]["arguments"]) == expected


def test_calls_are_kept_within_bounds():
    for calls in (Calls(most=3), Calls(most_bytes=3 * len('{"a": 10}'))):
        calls.keep([Call(f"c{n}", "edit", {"a": 10}) for n in range(9)])
        assert list(calls._kept) == ["c6", "c7", "c8"]
