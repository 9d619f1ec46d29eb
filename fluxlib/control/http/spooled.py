"""JSON with a text too large to be held as bytes, as text, escaped and encoded at once: made piece by piece, in a file.

In a file and not as it is sent: an agent that goes away meanwhile is an answer
with a status, the length is known, and a slow client holds no thread and no memory.
Nor does it outlast the time that an agent is given for the whole. So is the bare output.
"""

from __future__ import annotations

import codecs
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fluxlib.control.http.answers import Answer, json_bytes

BYTES = "application/octet-stream"
_PIECE = 256 * 1024


def spooled_answer(status: int, data: Mapping[str, Any], output: Iterable[bytes]) -> Answer:
    """``data`` with the text of ``output`` in place of its "output"."""
    names = list(data)
    place = names.index("output")
    before, after = ({name: data[name] for name in part} for part in (names[:place], names[place + 1 :]))
    file = tempfile.TemporaryFile()  # noqa: SIM115  (whoever sends it closes it)
    try:
        file.write(_opened(before) + b'"output": "')
        for text in _texts(output):
            file.write(json.dumps(text, ensure_ascii=False)[1:-1].encode())
        file.write(b'"' + (b", " + json_bytes(after)[1:] if after else b"}\n"))
        length = file.tell()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Answer(status, file=file, other_length=length)


def spooled_output(output: Iterable[bytes]) -> Answer:
    """What there is of an output, byte for byte."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  (whoever sends it closes it)
    try:
        file.writelines(output)
        length = file.tell()
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return Answer(200, content_type=BYTES, file=file, other_length=length)


def pieces(data: bytes) -> Iterator[bytes]:
    """What is in memory already, for ``spooled_answer``."""
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]


def _opened(data: Mapping[str, Any]) -> bytes:
    """An object that goes on."""
    return json_bytes(data).removesuffix(b"}\n") + (b", " if data else b"")


def _texts(output: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in output:
        yield decoder.decode(piece)
    yield decoder.decode(b"", True)
