"""What the tests of the wire contract share: error answers, the head of the log, requests byte by byte."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from typing import NamedTuple

NOWHERE = "00000000-0000-4000-8000-000000000000"  # a well-formed id of nothing


class Reply(NamedTuple):
    """An answer as it came over the socket."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def status_code(self) -> int:
        """The status under the name that requests gives it."""
        return self.status

    @property
    def text(self) -> str:
        """The body, for the message of a failing assertion."""
        return self.content.decode("utf-8", "replace")

    def json(self):
        """The body's JSON."""
        return json.loads(self.content)


def words(table: str) -> list[str]:
    """The entries of a table that is written with blanks between them."""
    return table.split()


def refused(response, status: int, code: str, field: str | None = None) -> None:
    """Assert that a response says no in the one error shape: a code, a sentence, the field it is about."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"].startswith("application/json")
    body = response.json()
    assert body["error"] == code
    assert " " in body["message"], "a sentence for a person"
    assert "Traceback" not in response.text
    if field is not None:
        assert body["field"] == field
        assert field in body["message"]


def head(server) -> int:
    """The number of the newest event: it rises with whatever is stored."""
    response = server.ask("GET", "/api/stream?poll=1&format=ndjson")
    return json.loads(response.text.splitlines()[0])["data"]["seq"]


@contextlib.contextmanager
def nothing_stored(server):
    """Assert that the server still serves after the block, and that no event came of it."""
    before = head(server)
    yield
    assert head(server) == before


def exchange(server, request: bytes, finished: bool = False) -> Reply:
    """Send bytes, read the one answer. `finished` closes our side after sending, as a client that gave up."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        with contextlib.suppress(ConnectionError):  # it may answer and hang up before all is sent
            connection.sendall(request)
        if finished:
            connection.shutdown(socket.SHUT_WR)
        with contextlib.closing(http.client.HTTPResponse(connection)) as response:
            response.begin()
            return Reply(response.status, response.headers, response.read())


def request_bytes(server, method: str, path: str, body: bytes = b"", **headers: str | None) -> bytes:
    """A request as bytes; header names are written with underscores, None leaves one out."""
    usual = {"Host": f"127.0.0.1:{server.port}", "Content_Type": "application/json", "Connection": "close"}
    usual |= {"Content_Length": str(len(body))} if method != "GET" else {}
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [
        f"{name.replace('_', '-')}: {text}" for name, text in (usual | headers).items() if text is not None
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
