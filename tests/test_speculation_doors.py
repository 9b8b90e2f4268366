"""``--speculate`` at every door: one definition, on by default, with counts; and texts that a client expects."""

from __future__ import annotations

import argparse

import pytest

from ring_mlx import add_speculate_option
from ring_mlx.cli import build_parser
from ring_mlx.cli.serve_command import make_settings
from ring_mlx.engine.events import Statistics
from ring_mlx.generation.draft_sources import Predicted, PromptDrafts
from ring_mlx.generation.drafts import Draft
from ring_mlx.generation.pace import Pace
from ring_mlx.serve.replies import usage_of
from tests.serving import CHAT, metric, send, user
from tui.gauges import gauges
from tui.messages import Figures, Loaded, ModelChoice, Sampling
from tui.records import record_lines, record_of

EDIT = "Send this back with one change: one two three four five six seven eight nine ten eleven twelve"


REPEATING = "Repeat: one two three four five. one two three four five. one two three four"


@pytest.mark.parametrize(("given", "value"), [([], None), (["off"], "off"), (["auto"], "auto"), (["7"], 7)])
def test_one_option_for_all(given, value):
    parser = argparse.ArgumentParser()
    add_speculate_option(parser)
    assert parser.parse_args([f"--speculate={v}" for v in given]).speculate == value


def parse(words):
    return build_parser(words).parse_args(words)


def test_the_server_and_the_chat_take_it():
    assert make_settings(parse(["serve"])).speculate == "auto"
    assert make_settings(parse(["serve", "--speculate", "off"])).speculate == "off"
    assert parse(["chat", "--plain", "--speculate", "3"]).speculate == 3
    assert ModelChoice().speculate is None


def test_a_record_and_the_status_line_say_what_was_drafted():
    figures = Figures(generated_tokens=30, generation_tps=50.0, drafted_tokens=24, accepted_tokens=15)
    assert "2.0 tokens a step" in gauges(figures, 1000, 0, 200)
    assert "a step" not in gauges(Figures(generated_tokens=30), 1000, 0, 200)
    loaded = Loaded("toy", 1000)
    record = record_of(loaded, Sampling(), figures, "stop")
    assert "drafts       15 of 24 tokens accepted" in record_lines(record)
    assert record_of(loaded, Sampling(), figures, "stop", record).accepted_tokens == 30


def test_the_usage_has_openais_names():
    details = usage_of(Statistics(generated_tokens=9, drafted_tokens=7, accepted_tokens=4))["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (4, 3)


def test_every_route_counts_drafts(serve):
    server, found = serve(speculate=4), {}
    for path, messages in ((CHAT, "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")):
        most = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        status, _, reply = send(
            server, "POST", path, {messages: user(REPEATING), "temperature": 0, most: 60, "model": "toy"}
        )
        assert status == 200
        usage = reply["usage"]
        details = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or usage
        found[path] = details["accepted_prediction_tokens"]
        assert details["rejected_prediction_tokens"] >= 0
    assert found[CHAT] > 0 < found["/v1/responses"]
    assert metric(server, "accepted_tokens_total") == sum(found.values())


def test_a_text_that_is_expected_is_no_part_of_the_sequence():
    source = PromptDrafts(Pace())
    lookup = Predicted(source, [5, 6, 7, 8, 9]).drafter([1, 2, 5, 6])
    assert lookup.sequence == [1, 2, 5, 6]
    assert lookup.draft(3) == Draft([7, 8, 9], 2)
    assert len(source.drafter([1, 2])) == 2


def test_a_prediction_changes_only_the_time(serve):
    server = serve(speculate=4)
    body = {"messages": user(EDIT), "temperature": 0, "max_tokens": 40}
    status, _, plain = send(server, "POST", CHAT, body)
    assert status == 200
    message = plain["choices"][0]["message"]
    text = f"{message.get('reasoning_content', '')}{message['content']}"
    predictions = text, [{"type": "text", "text": part} for part in (text[:9], text[9:])], "what never comes", ""
    accepted = []
    for content in predictions:
        status, _, found = send(server, "POST", CHAT, body | {"prediction": {"type": "content", "content": content}})
        assert status == 200
        assert found["choices"] == plain["choices"]
        accepted.append(found["usage"]["completion_tokens_details"]["accepted_prediction_tokens"])
    assert accepted[0] == accepted[1] > accepted[2]


@pytest.mark.parametrize(
    ("prediction", "status", "param"),
    [
        ("text", 400, "prediction"),
        ({"type": "image", "content": "x"}, 400, "prediction.type"),
        ({"content": "x"}, 400, "prediction.type"),
        ({"type": "content"}, 400, "prediction.content"),
        ({"type": "content", "content": 7}, 400, "prediction.content"),
        ({"type": "content", "content": [7]}, 400, "prediction.content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, 422, "prediction"),
        ({"type": "content", "content": "one two " * 9000}, 400, "prediction"),
    ],
)
def test_other_predictions_are_refused(serve, prediction, status, param):
    body = {"messages": user("x"), "max_tokens": 1, "prediction": prediction}
    found = send(serve(), "POST", CHAT, body)
    assert (found[0], found[2]["error"]["param"]) == (status, param)


def test_completions_take_no_prediction(serve):
    body = {"prompt": "x", "max_tokens": 1, "prediction": {"type": "content", "content": "x"}}
    found = send(serve(), "POST", "/v1/completions", body)
    assert (found[0], found[2]["error"]["param"]) == (422, "prediction")
