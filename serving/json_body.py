"""What all JSON of the REST API has in common: parsing a body, binary text, writing an answer or an error."""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any, Final

import orjson

from serving.status import invalid_argument

_MAX_SHOWN_CHARS: Final = 100
_CONSTANTS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parse_body(body: bytes) -> dict[str, Any]:
    """Parses a request body.

    Args:
      body: a JSON object in UTF-8; NaN, Infinity and -Infinity are numbers.

    Raises:
      RequestError: INVALID_ARGUMENT for what is no JSON object, is nested deeper than Python's recursion
        limit (about 1,000), or holds an integer of more than 4,300 digits.
    """
    try:
        # Decoded first: json.loads would take UTF-16 and half characters as well.
        document = json.loads(body.decode("utf-8-sig"), parse_constant=_CONSTANTS.__getitem__)
    except (ValueError, RecursionError) as error:
        raise invalid_argument(f"JSON Parse error: {error}") from error
    if not isinstance(document, dict):
        raise invalid_argument(f"the body must be a JSON object, got {show(document)}")
    return document


def overflowed(value: float) -> bool:
    """Whether a parsed number was finite in the JSON, such as 1e999, and beyond what a double holds."""
    return math.isinf(value) and not any(value is constant for constant in _CONSTANTS.values())


def signature_name_of(document: dict[str, Any]) -> str:
    """Returns `signature_name` of a body, `""` if there is none. Raises RequestError: INVALID_ARGUMENT."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid_argument(f"'signature_name' must be a string, got {show(name)}")
    return name


def is_base64(value: object) -> bool:
    """Whether a JSON value is binary text: `{"b64": <string>}`."""
    return isinstance(value, dict) and set(value) == {"b64"} and isinstance(value["b64"], str)


def decode_base64(place: str, value: Any) -> bytes:
    """Decodes `{"b64": ...}`; TensorFlow Serving takes base64 with and without padding."""
    try:
        return base64.b64decode(value["b64"] + "=" * (-len(value["b64"]) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid_argument(f"{place}: {show(value)} is not base64: {error}") from error


def encode_base64(value: bytes) -> dict[str, str]:
    """Encodes binary text."""
    return {"b64": base64.b64encode(value).decode()}


def encode_text(place: str, value: str) -> bytes:
    """Turns JSON text into UTF-8. Raises RequestError: INVALID_ARGUMENT for a lone surrogate."""
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise invalid_argument(f"{place}: {show(value)} is not valid Unicode: {error}") from error


def encode_error(message: str) -> bytes:
    """Encodes `{"error": message}`."""
    return dump({"error": message})


def dump_arrays(value: object) -> bytes:
    """Writes JSON that may hold NumPy arrays of finite numbers."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def dump(value: object) -> bytes:
    """Writes JSON without spaces; NaN and infinities are bare tokens."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def show(value: object) -> str:
    """Returns the beginning of a JSON value, for an error text, without writing all of it."""
    text = ""
    for chunk in json.JSONEncoder().iterencode(value):
        text += chunk
        if len(text) > _MAX_SHOWN_CHARS:
            return text[:_MAX_SHOWN_CHARS] + " ..."
    return text
