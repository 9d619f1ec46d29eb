"""A client that does by hand what good and bad clients do."""

from __future__ import annotations

import json
import socket
from types import TracebackType
from typing import Any, Self

from tests.http.fakes import ADMIN


class Wire:
    """One connection. Reading waits at most ``timeout`` seconds."""

    def __init__(self, port: int, timeout: float = 10) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self._data = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> Self:
        self.socket.sendall(head(method, path, len(body), **headers) + body)
        return self

    def raw(self, data: bytes) -> Self:
        self.socket.sendall(data)
        return self

    def end(self) -> None:
        """Send no more, and go on reading."""
        self.socket.shutdown(socket.SHUT_WR)

    def final_answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next response that is no interim one."""
        found = self.answer()
        return self.final_answer() if found[0] < 200 else found

    @property
    def rest(self) -> bytes:
        """What came beyond what was asked for so far."""
        return self._data

    def read_until(self, end: bytes) -> bytes:
        while end not in self._data:
            self._more()
        found, _, self._data = self._data.partition(end)
        return found + end

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of the next response."""
        lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = b""
        if headers.get("transfer-encoding") == "chunked":
            while chunk := self.chunk():
                body += chunk
        else:
            length = int(headers.get("content-length", "0"))
            while len(self._data) < length:
                self._more()
            body, self._data = self._data[:length], self._data[length:]
        return int(lines[0].split()[1]), headers, body

    def json(self) -> tuple[int, Any]:
        status, _, body = self.answer()
        return status, json.loads(body)

    def chunk(self) -> bytes:
        """The next chunk, empty at the end."""
        length = int(self.read_until(b"\r\n"), 16)
        while len(self._data) < length + 2:
            self._more()
        chunk, self._data = self._data[:length], self._data[length + 2 :]
        return chunk

    def closed(self) -> bool:
        """Reads to the end; True when the server has closed the connection."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._data += data


def head(method: str, path: str, length: int = 0, **headers: str) -> bytes:
    """A request's head with the administrator's key; names with underscores become hyphens."""
    lines = [f"{method} {path} HTTP/1.1", "Host: flux", f"X-API-Key: {ADMIN}"]
    if length or method in ("POST", "PUT"):
        lines.append(f"Content-Length: {length}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()
