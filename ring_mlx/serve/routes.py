"""Which routes there are, and how those that generate read their requests and write answers and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ring_mlx.engine.events import Sampling
from ring_mlx.serve import ollama
from ring_mlx.serve.answer import Answer
from ring_mlx.serve.completions import parse_completion
from ring_mlx.serve.failures import ApiError
from ring_mlx.serve.messages.reply import MessagesReply, error_body
from ring_mlx.serve.messages.request import parse_messages
from ring_mlx.serve.ollama import OllamaReply, parse_ollama
from ring_mlx.serve.protocol import ApiRequest, parse_chat
from ring_mlx.serve.replies import Reply
from ring_mlx.serve.responses.reply import ResponsesReply
from ring_mlx.serve.responses.request import parse_responses
from ring_mlx.serve.responses.stored import Stored

VERSION = "/v1"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, RESPONSE = "/v1/responses", "/v1/responses/"
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
OLLAMA, TAGS, SHOW = "/api/chat", "/api/tags", "/api/show"
MODELS, MODEL = "/v1/models", "/v1/models/"
# A route that ends in a slash is followed by a name.
METHODS = {
    **dict.fromkeys((CHAT, COMPLETIONS, RESPONSES, MESSAGES, COUNT, OLLAMA, SHOW), ("POST",)),
    RESPONSE: ("GET", "DELETE"),
    **dict.fromkeys((MODELS, MODEL, TAGS, "/health", "/metrics"), ("GET",)),
    "/": ("HEAD",),
}


@dataclass(frozen=True)
class Api:
    """How a route reads a body, by the defaults of sampling and with the responses kept, and answers."""

    parse: Callable[[Mapping[str, Any], Sampling, Stored], ApiRequest]
    reply: Callable[[Any, str], Answer]


APIS = {
    CHAT: Api(lambda body, defaults, _: parse_chat(body, defaults), Reply),
    COMPLETIONS: Api(lambda body, defaults, _: parse_completion(body, defaults), Reply),
    RESPONSES: Api(parse_responses, ResponsesReply),
    OLLAMA: Api(lambda body, defaults, _: parse_ollama(body, defaults), OllamaReply),
    MESSAGES: Api(lambda body, defaults, _: parse_messages(body, defaults), MessagesReply),
}


def found(path: str) -> tuple[str, str]:
    """The route of a path, and the name after it; ``/v1`` may be missing or there twice, as clients are configured."""
    short = path
    while short.startswith(f"{VERSION}/"):
        short = short.removeprefix(VERSION)
    for route in (short, VERSION + short):
        if route in METHODS and not (route.endswith("/") and route != "/"):
            return route, ""
    for route in (RESPONSE, MODEL):
        if (VERSION + short).startswith(route):
            return route, (VERSION + short).removeprefix(route)
    return path, ""


def failure_of(route: str) -> Callable[[ApiError], dict[str, Any]]:
    """The form of a route's errors."""
    if route in (OLLAMA, TAGS, SHOW):
        return ollama.error_body
    return error_body if route in (MESSAGES, COUNT) else ApiError.body
