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
