"""Errors that a request may end with: their gRPC codes, and the HTTP codes TensorFlow Serving gives them."""

from __future__ import annotations

from typing import Final

import grpc

from schema.errors import ServingError

# gRPC carries an error text in a header of about 8 kB: a longer text would replace the error by another one.
_MAX_MESSAGE_BYTES: Final = 2000

_HTTP_CODES: Final = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


class RequestError(ServingError):
    """A request that cannot be answered; `code` is what the caller sees, the text says what was wrong."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(short_text(message))
        self.code = code

    @property
    def http_code(self) -> int:
        """HTTP status of the same error over REST."""
        return _HTTP_CODES.get(self.code, 500)


def invalid_argument(message: str) -> RequestError:
    """Returns the error of a request that does not fit the model's signature or the API."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, message)


def not_found(message: str) -> RequestError:
    """Returns the error of a request for a model or version that is not there."""
    return RequestError(grpc.StatusCode.NOT_FOUND, message)


def failed_precondition(message: str) -> RequestError:
    """Returns the error of a request that this model cannot answer, however it is put."""
    return RequestError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unimplemented(message: str) -> RequestError:
    """Returns the error of a request for something that the server does not have."""
    return RequestError(grpc.StatusCode.UNIMPLEMENTED, message)


def deadline_exceeded(message: str) -> RequestError:
    """Returns the error of a request that took longer than it may."""
    return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, message)


def code_from_number(number: int) -> grpc.StatusCode:
    """Turns a canonical error number, as TensorFlow's errors carry it, into the gRPC code."""
    return _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)


def short_text(message: str) -> str:
    """Cuts an error text to what gRPC can carry, which sends a byte that is not printable ASCII as three."""
    num_bytes = 0
    for position, char in enumerate(message):
        num_bytes += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode(errors="replace"))
        if num_bytes > _MAX_MESSAGE_BYTES:
            return message[:position] + " ..."
    return message
