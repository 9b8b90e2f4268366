"""Failures in the form of OpenAI's API: a status and a small JSON object."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from ring_mlx.errors import ModelError, RingError, SessionError
from ring_mlx.system.terminal_text import note

TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}


class ApiError(Exception):
    """An error that a client gets instead of an answer.

    Args:
        status: Of HTTP: 400 if OpenAI refuses it too, 422 if only this server cannot do it.
        message: What is wrong, the value seen and the remedy.
        param: The field of the request, if one is to blame.
        code: A word for programs, such as ``context_length_exceeded``.
        headers: To send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class GoneError(Exception):
    """The client has left."""


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong."""
    return ApiError(400, message, param, code)


def cannot(message: str, param: str) -> ApiError:
    """A valid request that this server does not support."""
    return ApiError(422, message, param, "unsupported_value")


def busy(message: str, retry_after_s: int = 1) -> ApiError:
    """A request that may be sent again later."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(retry_after_s)})


def of_answer(error: RingError) -> ApiError:
    """The error for a client whose answer failed; unexpected exceptions go to the server's log."""
    if isinstance(error, ModelError):
        return ApiError(500, str(error), code="model_error")
    if not isinstance(error, SessionError):
        return bad(str(error))
    if (cause := error.__cause__) is None:
        return busy(str(error), 10)
    note("".join(traceback.format_exception(cause)))
    text = f"the model failed ({type(cause).__name__}); see the server's log."
    return ApiError(500, text, code="internal_error")
