"""Error texts fit into the header that gRPC sends them in."""

from urllib.parse import quote

import grpc
import pytest

from serving.status import RequestError

PRINTABLE = "".join(map(chr, range(32, 127))).replace("%", "")


@pytest.mark.parametrize("char", ["a", "%", "\n", "é", "中", "😀"], ids=ascii)
def test_a_long_text_is_cut_to_what_a_header_holds(char):
    text = str(RequestError(grpc.StatusCode.INTERNAL, char * 100_000))
    assert text.endswith(char + " ...")
    encoded = quote(text, safe=PRINTABLE)
    assert 1_980 < len(encoded) < 2_010


def test_a_text_that_fits_is_left_alone():
    assert str(RequestError(grpc.StatusCode.INTERNAL, "中" * 200)) == "中" * 200


def test_a_text_that_is_no_unicode_is_cut_as_well():
    assert len(str(RequestError(grpc.StatusCode.INTERNAL, "\udc80" * 100_000))) < 2_010


@pytest.mark.parametrize(
    ("code", "http_code"),
    [
        ("CANCELLED", 499),
        ("UNKNOWN", 500),
        ("INVALID_ARGUMENT", 400),
        ("DEADLINE_EXCEEDED", 504),
        ("NOT_FOUND", 404),
        ("ALREADY_EXISTS", 409),
        ("PERMISSION_DENIED", 403),
        ("RESOURCE_EXHAUSTED", 429),
        ("FAILED_PRECONDITION", 400),
        ("ABORTED", 409),
        ("OUT_OF_RANGE", 400),
        ("UNIMPLEMENTED", 501),
        ("INTERNAL", 500),
        ("UNAVAILABLE", 503),
        ("DATA_LOSS", 500),
        ("UNAUTHENTICATED", 401),
    ],
)
def test_codes_become_the_http_codes_of_tensorflow_serving(code, http_code):
    assert RequestError(grpc.StatusCode[code], "text").http_code == http_code
