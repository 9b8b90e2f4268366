"""The routes of agents, with the official clients: turns with thoughts and tool calls, streams, and what is kept."""

from __future__ import annotations

import json
import socket

import anthropic
import openai
import pytest

from ring_mlx.engine.events import AnswerText, End, Revised, Sampling, ThinkingText
from ring_mlx.serve.engine import Settings
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.messages.reply import MessagesReply
from ring_mlx.serve.messages.request import parse_messages
from ring_mlx.serve.responses.reply import ResponsesReply
from ring_mlx.serve.responses.request import parse_responses
from ring_mlx.serve.responses.stored import Stored
from ring_mlx.serve.server import Server
from tests.parrot import make_parrot
from tests.scripted import results, said, script
from tests.serving import GREEDY, TOOLS, client_of, metric, send, user, wait_until

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SCHEMA = {"type": "object", "properties": {}}
FLAT = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
OWN = [{"name": "weather", "input_schema": SCHEMA}]
STEPS = (
    said("I look.", ("weather", '{"of": "Rome"}'), thought="Rome first"),
    said("", ("weather", '{"of": "Oslo"}'), ("weather", '{"of": "Bern"}'), thought="two more"),
    said("Rome is warm.", thought="enough"),
)
THINKS = {"thinking": {"type": "adaptive"}}
LONG = GREEDY | {"max_tokens": 300}
SUM = said("It is 62.", thought="27+35")
FOUND = ("warm in Rome", "cold in Oslo", "rain in Bern")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """With tools it says the steps, without them a sum."""
    model = make_parrot(tmp_path_factory.mktemp("agents") / "model", ["x"], max_position_embeddings=8192)
    with pytest.MonkeyPatch.context() as patch:
        script(patch, lambda request: STEPS[(0, 1, 1, 2)[min(results(request), 3)]] if request.tools else SUM)
        made = Server(Settings(model, "toy", store=False), port=0)
        made.start()
        assert made.engine.wait_until_loaded(30)
        yield made
        assert made.close()


@pytest.fixture
def client(server):
    with client_of(server) as made:
        yield made


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="any", max_retries=0) as made:
        yield made


class Chat:
    """The steps on the chat route; each turn gives the tokens of its prompt and those that were reused."""

    def __init__(self, server, question):
        self.client, self.talk = client_of(server), user(question)

    def turn(self, found):
        answer = self.client.chat.completions.create(messages=self.talk, tools=TOOLS, **LONG)
        message = answer.choices[0].message
        self.talk.append(message.model_dump(exclude_none=True))
        ids = [call.id for call in message.tool_calls or []]
        self.talk += [{"role": "tool", "tool_call_id": i, "content": f} for i, f in zip(ids, found, strict=True)]
        return answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens, message.content or ""


class Responses:
    """The same on ``/v1/responses``, where the client sends all items again."""

    def __init__(self, server, question):
        self.client, self.talk = client_of(server), user(question)

    def turn(self, found):
        answer = self.client.responses.create(
            input=self.talk, tools=FLAT, store=False, model="toy", temperature=0, max_output_tokens=300
        )
        self.talk += [item.model_dump(exclude_none=True) for item in answer.output]
        self._found([item.call_id for item in answer.output if item.type == "function_call"], found)
        return answer.usage.input_tokens, answer.usage.input_tokens_details.cached_tokens, answer.output_text

    def _found(self, ids, found):
        outputs = zip(ids, found, strict=True)
        self.talk += [{"type": "function_call_output", "call_id": i, "output": f} for i, f in outputs]


class Kept(Responses):
    """The same where the server has kept the conversation, streamed."""

    before = None

    def turn(self, found):
        with self.client.responses.stream(
            input=self.talk, tools=FLAT, model="toy", temperature=0, previous_response_id=self.before or openai.omit
        ) as stream:
            answer = stream.until_done().get_final_response()
        self.before, self.talk = answer.id, []
        self._found([item.call_id for item in answer.output if item.type == "function_call"], found)
        return answer.usage.input_tokens, answer.usage.input_tokens_details.cached_tokens, answer.output_text


class Messages:
    """The same on ``/v1/messages``, streamed."""

    def __init__(self, server, question):
        address = f"http://127.0.0.1:{server.server_port}"
        self.client, self.talk = anthropic.Anthropic(base_url=address, api_key="any"), user(question)

    def turn(self, found):
        with self.client.messages.stream(
            messages=self.talk, tools=OWN, model="toy", max_tokens=300, **THINKS
        ) as stream:
            answer = stream.get_final_message()
        self.talk.append({"role": "assistant", "content": [b.model_dump(exclude_none=True) for b in answer.content]})
        ids = [block.id for block in answer.content if block.type == "tool_use"]
        blocks = [{"type": "tool_result", "tool_use_id": i, "content": f} for i, f in zip(ids, found, strict=True)]
        self.talk.append({"role": "user", "content": blocks})
        text = "".join(block.text for block in answer.content if block.type == "text")
        usage = answer.usage
        prompt = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
        return prompt, usage.cache_read_input_tokens, text


def test_three_turns_with_thoughts_and_calls_read_only_what_is_new(server):
    """All routes render one conversation alike, and reuse as much of it."""
    seen = {}
    for n, route in enumerate((Chat, Responses, Kept, Messages)):
        talk, turns = route(server, f"Weather {n}?"), []
        for found in (FOUND[:1], FOUND[1:], ()):
            ahead = metric(server, "ahead_tokens_total")
            turns.append(talk.turn(found))
            wait_until(lambda ahead=ahead: metric(server, "ahead_tokens_total") > ahead)
        talk.client.close()
        seen[route] = turns
    assert [text.strip() for *_, text in seen[Chat]] == ["I look.", "", "Rome is warm."]
    new = [prompt - cached for prompt, cached, _ in seen[Chat]]
    count = lambda *texts: sum(len(server.engine.loaded.tokenizer.encode(text)) for text in texts)
    assert new[1] <= count(FOUND[0]) + 24
    assert new[2] <= count(*FOUND[1:]) + 24
    for route, turns in seen.items():
        assert [(prompt, text.strip()) for prompt, _, text in turns] == [(p, t.strip()) for p, _, t in seen[Chat]], (
            route
        )
        assert [cached for _, cached, _ in turns[1:]] == [cached for _, cached, _ in seen[Chat][1:]], route


# The Responses API


def test_a_response_is_items_and_can_be_gone_on_from(client, server):
    first = client.responses.create(model="toy", input="27 + 35?", instructions="Sum.", metadata={"a": "b"})
    assert [item.type for item in first.output] == ["reasoning", "message"]
    assert (first.output[0].content[0].text, first.output_text) == ("27+35\n", "It is 62.")
    assert (first.status, first.metadata, first.instructions, first.error) == ("completed", {"a": "b"}, "Sum.", None)
    usage = first.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens_details.reasoning_tokens < usage.output_tokens
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        script(patch, lambda request: asked.append(request.prompt) or SUM)
        client.responses.create(model="toy", input="And?", previous_response_id=first.id, store=False)
        client.responses.create(model="toy", input=[{"type": "item_reference", "id": first.output[1].id}, *user("So?")])
    answer = {"role": "assistant", "content": "It is 62."}
    assert asked[0] == [*user("27 + 35?"), answer | {"reasoning_content": "27+35"}, *user("And?")]
    assert asked[1] == [answer, *user("So?")]
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="any more"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as e:
        client.responses.create(model="toy", input="And?", previous_response_id=first.id)
    assert (e.value.code, e.value.param) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_to_be_stored_is_not(client, server):
    before = len(server.stored)
    answer = client.responses.create(model="toy", input="1 + 1?", store=False)
    assert len(server.stored) == before
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


PIECE = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


def test_the_events_of_a_response(client):
    events = list(client.responses.create(model="toy", input="Weather?", tools=FLAT, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    told = [kind for n, kind in enumerate(kinds) if kind != kinds[n - 1]]
    thought = [*PIECE[0], "reasoning_text.delta", "reasoning_text.done", *PIECE[1]]
    text = [*PIECE[0], "output_text.delta", "output_text.done", *PIECE[1]]
    assert told == ["created", "in_progress", *thought, *text, *CALL, "completed"]
    for kind, whole in (("reasoning_text", "Rome first\n"), ("output_text", "I look.\n")):
        deltas = [e.delta for e in events if e.type == f"response.{kind}.delta"]
        assert "".join(deltas) == whole == next(e.text for e in events if e.type == f"response.{kind}.done")
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert done == events[-1].response.output
    assert [e.output_index for e in events if e.type == "response.output_item.done"] == [0, 1, 2]
    assert (done[2].name, json.loads(done[2].arguments)) == ("weather", {"of": "Rome"})
    assert events[0].response.id == events[-1].response.id
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])


def test_a_summary_is_the_thought(client):
    answer = client.responses.create(model="toy", input="1 + 1?", reasoning={"summary": "auto"})
    assert answer.output[0].summary[0].text == answer.output[0].content[0].text == "27+35\n"
    events = list(client.responses.create(model="toy", input="1 + 1?", reasoning={"summary": "auto"}, stream=True))
    kinds = [e.type.removeprefix("response.reasoning_summary_") for e in events if "summary" in e.type]
    assert [k for n, k in enumerate(kinds) if k != kinds[n - 1]] == [
        "part.added",
        "text.delta",
        "text.done",
        "part.done",
    ]


def test_an_answer_that_is_cut_is_incomplete(client):
    answer = client.responses.create(model="toy", input="1 + 1?", max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *_, last = client.responses.create(model="toy", input="1 + 1?", max_output_tokens=2, stream=True)
    assert (last.type, last.response.usage.output_tokens) == ("response.incomplete", 2)


def test_logprobs_of_a_response(client):
    answer = client.responses.create(model="toy", input="1 + 1?", top_logprobs=2)
    logprobs = answer.output[1].content[0].logprobs
    assert "".join(t.token for t in logprobs).strip() == answer.output_text
    assert all(len(t.top_logprobs) == 2 for t in logprobs)
    events = client.responses.create(model="toy", input="1 + 1?", stream=True, include=["message.output_text.logprobs"])
    told = [t.token for e in events if e.type == "response.output_text.delta" for t in e.logprobs]
    assert told == [t.token for t in logprobs]


def test_the_oldest_turns_may_be_dropped(client, server):
    talk = [m for n in range(6) for m in (*user(f"{n} " + "many words " * 800), {"role": "assistant", "content": "so"})]
    talk = [{"role": "developer", "content": "Be brief."}, *talk, *user("1 + 1?")]
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        client.responses.create(model="toy", input=talk)
    answer = client.responses.create(model="toy", input=talk, truncation="auto", max_output_tokens=30)
    assert answer.output_text == "It is 62."
    assert 1000 < answer.usage.input_tokens < 8192
    with pytest.raises(openai.BadRequestError, match="exceed the context"):
        client.responses.create(model="toy", input=user("many words " * 9000), truncation="auto")


# The Messages API


def test_a_message_is_blocks(claude, server):
    answer = claude.messages.create(model="toy", max_tokens=80, messages=user("27 + 35?"), system="Sum.", **THINKS)
    assert [(b.type, getattr(b, b.type)) for b in answer.content] == [("thinking", "27+35\n"), ("text", "It is 62.")]
    assert (answer.stop_reason, answer.stop_sequence, answer.role, answer.model) == (
        "end_turn",
        None,
        "assistant",
        "toy",
    )
    asked = {"model": "toy", "messages": user("27 + 35?"), **THINKS}
    count = claude.messages.count_tokens(**asked, system=[{"type": "text", "text": "Sum."}]).input_tokens
    assert count == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
    assert claude.messages.count_tokens(**asked, tools=OWN).input_tokens > count
    assert claude.models.list().data[0].display_name == "toy"
    assert claude.beta.messages.create(max_tokens=80, **asked).content[1].text == "It is 62."


def test_the_events_of_a_message(claude):
    request = {"model": "toy", "max_tokens": 300, "messages": user("Weather?"), "tools": OWN, **THINKS}
    events = list(claude.messages.create(stream=True, **request))
    kinds = [(e.type, e.delta.type) if e.type == "content_block_delta" else e.type for e in events]
    start, stop, delta = "content_block_start", "content_block_stop", "content_block_delta"
    assert [kind for n, kind in enumerate(kinds) if kind != kinds[n - 1]] == [
        *("message_start", start, (delta, "thinking_delta"), (delta, "signature_delta"), stop),
        *(
            start,
            (delta, "text_delta"),
            stop,
            start,
            (delta, "input_json_delta"),
            stop,
            "message_delta",
            "message_stop",
        ),
    ]
    assert [e.index for e in events if e.type == stop] == [0, 1, 2]
    assert (events[-2].delta.stop_reason, events[0].message.usage.output_tokens) == ("tool_use", 0)
    prompt = lambda usage: usage.input_tokens + usage.cache_read_input_tokens
    assert prompt(events[0].message.usage) == prompt(events[-2].usage) > 0
    whole = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        final = stream.get_final_message()
    plain = lambda answer: [b.model_dump(exclude={"id"}) for b in answer.content]
    assert plain(final) == plain(whole)
    assert final.content[2].input == {"of": "Rome"}


def test_why_a_message_ends(claude):
    asked = {"model": "toy", "messages": user("1 + 1?"), **THINKS}
    answer = claude.messages.create(max_tokens=80, stop_sequences=["no", "is 6"], **asked)
    assert (answer.content[1].text, answer.stop_reason, answer.stop_sequence) == ("It ", "stop_sequence", "is 6")
    *_, delta, _ = claude.messages.create(max_tokens=80, stop_sequences=["is 6"], stream=True, **asked)
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == ("stop_sequence", "is 6")
    assert claude.messages.create(max_tokens=2, **asked).stop_reason == "max_tokens"


def test_thinking_can_be_off_and_bounded(claude):
    """What the template and the budget make of it, since a scripted model thinks as it is told."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        script(patch, lambda request: asked.append(request) or SUM)
        claude.messages.create(model="toy", max_tokens=80, messages=user("1?"))
        for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
            claude.messages.create(model="toy", max_tokens=80, messages=user("1?"), thinking=thinking)
    assert [request.thinking_budget for request in asked] == [0, 0, 1024, None]
    assert [request.prepared.prompt.text.endswith("</think>\n\n") for request in asked] == [True, True, False, False]


def test_a_last_turn_of_the_assistant_is_gone_on_with(claude):
    with pytest.MonkeyPatch.context() as patch:
        script(patch, lambda request: "2, or 62.")
        talk = [*user("1 + 1?"), {"role": "assistant", "content": "It is"}]
        answer = claude.messages.create(model="toy", max_tokens=80, messages=talk)
    assert [b.text for b in answer.content if b.type == "text"] == ["2, or 62."]


ERRORS = {400: anthropic.BadRequestError, 404: anthropic.NotFoundError, 422: anthropic.UnprocessableEntityError}


@pytest.mark.parametrize(
    ("change", "status", "kind", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
         422, "invalid_request_error", "'image' with a source of type 'base64'"),
        ({"messages": user("many words " * 9000)}, 400, "invalid_request_error", "prompt is too long"),
        ({"model": "claude-x"}, 404, "not_found_error", "no model 'claude-x'"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"output_config": {"format": {"type": "json_schema"}}}, 400, "invalid_request_error", "format.schema"),
    ],
)  # fmt: skip
def test_errors_are_anthropics(claude, change, status, kind, words):
    request = {"model": "toy", "max_tokens": 80, "messages": user("x")} | change
    with pytest.raises(ERRORS[status], match=words) as e:
        claude.messages.create(**request)
    assert e.value.body["type"] == "error"
    assert e.value.body["error"]["type"] == kind


def test_any_name_can_be_left_out(server):
    """A header holds what is plain of a name, without blanks at its ends."""
    names = ["a b", " ", "", "\r\nSet-Cookie: x", "\u00e9\ud800", "x" * 100]
    for path, body in ((RESPONSES, {"input": "1?"}), (MESSAGES, {"messages": user("1?")})):
        for name in names:
            status, headers, _ = send(server, "POST", path, body | {"model": "toy", name: 1})
            assert (status, headers["X-Ring-Left-Out"].isascii(), "Set-Cookie" in headers) == (200, True, False), name


def test_a_model_that_fails_in_a_stream_is_told_in_the_routes_form(server):
    failing = lambda request: (_ for _ in ()).throw(ValueError("made to fail"))
    for path, body in ((RESPONSES, {"input": "1?"}), (MESSAGES, {"messages": user("1?")})):
        with pytest.MonkeyPatch.context() as patch:
            script(patch, failing)
            status, _, answer = send(server, "POST", path, body | {"stream": True})
        assert status == 500
        assert ("type" in answer, answer["error"]["message"]) == (
            path == MESSAGES,
            "the model failed (ValueError); see the server's log.",
        )


def test_responses_are_kept_within_bounds():
    response = {"id": "r0", "output": [{"id": "i0"}]}
    for stored in (Stored(1000, most=2), Stored(1000, most_bytes=130)):
        for n in range(5):
            stored.put({"id": f"r{n}", "output": [{"id": f"i{n}"}]}, [])
        assert len(stored) == 2
        assert stored.item("i4", "input") == {"id": "i4"}
        for name in ("r2", "r1"):
            with pytest.raises(ApiError, match="any more"):
                stored.get(name)
        with pytest.raises(ApiError, match="any more"):
            stored.item("i2", "input")
        stored.drop("r3")
        stored.drop("r4")
        assert (len(stored), stored.nbytes) == (0, 0)
    stored = Stored(longest=40)
    stored.put(response, [])
    assert len(stored) == 0, "longer than a body may be"


CORRECTED = [ThinkingText("a"), AnswerText("b"), Revised("a</think>b c"), AnswerText("d"), End("stop")]
NO_THOUGHT = [ThinkingText("said"), Revised(""), AnswerText("said"), End("stop")]


@pytest.mark.parametrize(("events", "expected"), [(CORRECTED, ("a</think>b c", "d")), (NO_THOUGHT, ("", "said"))])
def test_what_is_corrected_in_a_stream_is_right_when_it_is_sent_back(events, expected):
    """The thought and the text of the last message, which a client makes of the blocks and items that it was sent."""
    reply = MessagesReply(parse_messages({"messages": user("x")}, Sampling()), "toy")
    blocks = []
    for event in events:
        for piece in reply.last(event) if isinstance(event, End) else reply.add(event):
            if piece["type"] == "content_block_start":
                blocks.append(dict(piece["content_block"]))
            elif piece["type"] == "content_block_delta":
                (key, value), *_ = ((k, v) for k, v in piece["delta"].items() if k != "type")
                blocks[-1][key] += value
    talk = [*user("x"), {"role": "assistant", "content": blocks}, *user("y")]
    turn = parse_messages({"messages": talk}, Sampling()).prompt[1]
    assert (turn.get("reasoning_content", ""), turn["content"]) == expected
    stored = Stored(10_000)
    reply = ResponsesReply(parse_responses({"input": "x", "store": False}, Sampling(), stored), "toy")
    told = [p for e in events for p in (reply.last(e) if isinstance(e, End) else reply.add(e))]
    items = [p["item"] for p in told if p["type"] == "response.output_item.done"]
    assert items == told[-1]["response"]["output"]
    turn = parse_responses({"input": [*user("x"), *items, *user("y")]}, Sampling(), stored).prompt[1]
    assert (turn.get("reasoning_content", ""), turn["content"]) == expected


@pytest.mark.parametrize("path", ["/responses", "/v1/v1/messages?beta=true", "/messages"])
def test_a_client_that_leaves_stops_the_work_on_any_name_of_a_route(server, path):
    body = json.dumps({"input": "1?", "messages": user("1?"), "stream": True, "model": "toy"}).encode()
    gone = metric(server, 'requests_finished_total{reason="cancelled"}')
    with pytest.MonkeyPatch.context() as patch:
        script(patch, lambda request: "again " * 3000)
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as s:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            s.sendall(head.encode() + body)
            assert b"200 OK" in s.recv(1 << 12)
        wait_until(lambda: metric(server, 'requests_finished_total{reason="cancelled"}') > gone)
    assert metric(server, "batch_size") == 0
    assert send(server, "HEAD", "/")[0] == 200
