"""Reading bodies: size, type and shape are settled here, before a handler runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluxlib.config.document import MAX_BYTES as MAX_YAML_BYTES
from fluxlib.config.function import read_function
from fluxlib.control.http.fields import Field, Schema, anything, boolean, matching, pattern_schema, seconds, take
from fluxlib.control.http.request import Request
from fluxlib.control.services import Call
from fluxlib.errors import InvalidInput, UnsupportedMedia

_SMALL = 64 * 1024
# Arguments and standard input of one call; an unary message to an original agent takes 50 MB.
_CALL_BYTES = 8 * 2**20
# What execve takes: 128 KiB an argument, and of all together what a default stack leaves.
_MAX_ARG_BYTES = 128 * 1024 - 1
_MAX_ARGS_BYTES = 2**20
_MAX_ARGS = 10_000
_MAX_DEPTH = 32
_LONGEST_TIMEOUT = 7 * 86400.0
_KEY = re.compile("[!-~]{1,255}")
_FORM = "application/x-www-form-urlencoded"  # what curl says of everything sent with -d and --data-binary
_JSON_TYPES = ("", "application/json", _FORM)
# How a call begins, and hardly anything that a program reads from its standard input.
_CALL_BEGINS = re.compile(rb'\s*\{\s*"(args|input|timeout)"\s*:')
_FILE_NAME = re.compile(rb"[\w./-]{1,200}\.(ya?ml|json|zip)")


@dataclass(frozen=True, slots=True)
class Body:
    """What a route takes. ``content`` maps media types to schemas for the document; ``read`` makes ``request.data``."""

    limit: int  # bytes
    read: Callable[[Request, bytes], Any]
    content: Mapping[str, Schema] = field(default_factory=dict)
    required: bool = False
    any_type: bool = False  # the Content-Type is not looked at


def _ignored(request: Request, data: bytes) -> None:
    return None


# Clients that send `{}` or an empty form where nothing is wanted are let be.
NO_BODY = Body(_SMALL, _ignored)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"the key {twice[:80]!a} appears twice in the JSON")
    return found


def _no_constant(name: str) -> Any:
    raise InvalidInput(f"{name} is no JSON")


# Made once: json.loads with a hook would make one for each body.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(item, levels - 1) for item in inner)


def json_object(data: bytes) -> dict[str, Any]:
    """The object in ``data``, {} for nothing. Raises InvalidInput; the second of two equal keys never wins silently."""
    if not data.strip():
        return {}
    try:
        value = _DECODER.decode(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the body is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise InvalidInput(f"the JSON is nested more than {_MAX_DEPTH} deep") from error
    except ValueError as error:
        raise InvalidInput(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidInput('the body must be a JSON object such as {"args": []}')
    if _deeper_than(value, _MAX_DEPTH):
        raise InvalidInput(f"the JSON is nested more than {_MAX_DEPTH} deep")
    return value


def _refuse_encoding(request: Request) -> None:
    encoding = request.header("CONTENT_ENCODING").strip().lower()
    if encoding not in ("", "identity"):
        raise UnsupportedMedia(f"the Content-Encoding {encoding[:40]!a} is not taken: send the body as it is")


def json_body(fields: Sequence[Field], *, required: bool = False) -> Body:
    """A small JSON object with these fields."""

    example = json.dumps({field.name: field.about for field in fields if field.required}, ensure_ascii=False)

    def read(request: Request, data: bytes) -> dict[str, Any]:
        if request.media_type not in _JSON_TYPES:
            raise UnsupportedMedia(f"send JSON as application/json, not {request.media_type[:80]!a}")
        if required and not data.strip():
            raise InvalidInput(f"the body is empty: send JSON such as {example}")
        return take(fields, json_object(data), "the body")

    return Body(_SMALL, read, {"application/json": object_schema(fields)}, required=required)


def object_schema(fields: Sequence[Field]) -> Schema:
    return {
        "type": "object",
        "properties": {field.name: {**field.schema, "description": field.about} for field in fields},
        "required": [field.name for field in fields if field.required],
        "additionalProperties": False,
    }


# ---- a call ----------------------------------------------------------------------


def _text_problem(value: str) -> str | None:
    if "\0" in value:
        return "must not contain NUL"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "must not contain half a surrogate pair"
    return None


def _args(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise ValueError("must be a list of strings")
    if len(value) > _MAX_ARGS:
        raise ValueError(f"must not hold more than {_MAX_ARGS} arguments")
    total = 0
    for number, item in enumerate(value):
        problem = _text_problem(item) if isinstance(item, str) else "must be a string"
        if problem is None:
            size = len(item.encode())
            total += size + 1
            if size > _MAX_ARG_BYTES:
                problem = f"is longer than {_MAX_ARG_BYTES} bytes"
        if problem:
            raise ValueError(f"[{number}] {problem}")
    if total > _MAX_ARGS_BYTES:
        raise ValueError(f"must not be longer than {_MAX_ARGS_BYTES // 1024} KB together; send data as `input`")
    return tuple(value)


def _input(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("must be a string; send bytes as a body of application/octet-stream")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must not contain half a surrogate pair") from error


_ARGS_SCHEMA = {
    "type": ["array", "null"],
    "items": {"type": "string", "pattern": "^[^\\u0000]*$"},
    "maxItems": _MAX_ARGS,
}
_TIMEOUT_SCHEMA = {"type": "number", "minimum": 0, "maximum": _LONGEST_TIMEOUT}
CALL_FIELDS = (
    Field("args", "the program's arguments; null = none", _ARGS_SCHEMA, _args, ()),
    Field("input", "its standard input", {"type": "string"}, _input, b""),
    Field("timeout", "seconds; 0 = the function's", _TIMEOUT_SCHEMA, seconds(_LONGEST_TIMEOUT), 0.0),
)
_BYTES: Schema = {}


def _call(request: Request, data: bytes) -> Call:
    """``curl -d`` says it sends a form and means JSON, as with the original."""
    name = request.params["name"]
    key = idempotency_key(request)
    media_type = request.media_type
    if media_type.startswith("text/") and _is_call(data):
        raise UnsupportedMedia(
            f"this is a call in JSON, sent as {media_type[:80]} (fetch does so by itself): set the Content-Type to"
            " application/json, or to application/octet-stream if it is to be the program's standard input"
        )
    if media_type == "application/octet-stream" or media_type.startswith("text/"):
        return Call(name, stdin=data, idempotency_key=key)
    if media_type not in _JSON_TYPES:
        raise UnsupportedMedia(
            f"{media_type[:80]!a} is not taken: send JSON, or standard input as application/octet-stream or text/*"
        )
    if not data:
        return Call(name, idempotency_key=key)
    if media_type == _FORM and data.strip() and not data.lstrip().startswith((b"{", b"[", b"\xef\xbb\xbf")):
        raise InvalidInput(
            'this came as a form, as curl -d sends it, and is no JSON: send a call as {"args": ["…"]}, or standard'
            " input with -H 'Content-Type: application/octet-stream' --data-binary @FILE"
        )
    fields = take(CALL_FIELDS, json_object(data), "the call")
    return Call(name, fields["args"], fields["input"], fields["timeout"], key)


def _is_call(data: bytes) -> bool:
    if not _CALL_BEGINS.match(data):
        return False
    try:
        return set(json_object(data)) <= {field.name for field in CALL_FIELDS}
    except InvalidInput:
        return False


CALL_BODY = Body(
    _CALL_BYTES,
    _call,
    {
        "application/json": object_schema(CALL_FIELDS),
        "application/octet-stream": _BYTES,
        "text/plain": {"type": "string"},
    },
)


def idempotency_key(request: Request) -> str:
    """The header's key, for submissions; a synchronous call must not be thought repeatable."""
    if not request.has_header("IDEMPOTENCY_KEY"):
        return ""
    key = request.header("IDEMPOTENCY_KEY").strip()
    # Not by its end alone: a function may be called async.
    if request.path != f"/execute/{request.params['name']}/async":
        raise InvalidInput("Idempotency-Key works for asynchronous calls only: POST /execute/NAME/async")
    if not _KEY.fullmatch(key):
        raise InvalidInput("Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key


# ---- the others --------------------------------------------------------------------


_PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_ADDRESS = re.compile(rf"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{{0,252}})|\[[0-9A-Fa-f:.]{{2,45}}\]):(?:{_PORT})")

REGISTER_BODY = json_body(
    (
        Field(
            "address",
            "host:port of the agent",
            pattern_schema(_ADDRESS),
            matching(_ADDRESS, "must be host:port, an IPv6 address in brackets, the port between 1 and 65535"),
            required=True,
        ),
        Field("legacy", "accept a certificate without an ID", {"type": "boolean"}, boolean, False),
        Field("tls", "the original's; accepted and ignored", {}, anything),
    ),
    required=True,
)


def _function(request: Request, data: bytes) -> Any:
    send = "curl --data-binary @function.yaml"
    if not data.strip():
        raise InvalidInput(f"the body is empty: send the function's YAML, for example with {send}")
    if data.startswith(b"PK\x03\x04"):
        raise InvalidInput("this is a zip: send it to PUT /deploy/NAME, and the function's YAML here")
    _refuse_upload_form(request, send)
    if _FILE_NAME.fullmatch(data.strip()):
        raise InvalidInput(f"this is the name of a file: put an @ before it, as in {send}")
    try:
        spec = read_function(data)
    except InvalidInput as error:
        if request.media_type != _FORM or b"\n" in data.strip():
            raise
        hinted = InvalidInput(
            f"{error.message}. It arrived as one line: curl -d removes line ends, send the file with --data-binary"
            " @function.yaml"
        )
        hinted.faults = error.faults
        raise hinted from error
    request.subject = spec.name
    return spec


def _archive(request: Request, data: bytes) -> bytes:
    send = "curl --data-binary @code.zip"
    if not data:
        raise InvalidInput(f"the body is empty: send the zip, for example with {send}")
    _refuse_upload_form(request, send)
    return data


def _refuse_upload_form(request: Request, send: str) -> None:
    if request.media_type == "multipart/form-data":
        raise InvalidInput(f"this is an upload form, as curl -F sends it: send the file itself, with {send}")


def function_body(schema: Schema) -> Body:
    return Body(MAX_YAML_BYTES, _function, {"application/yaml": schema}, required=True, any_type=True)


def archive_body(max_archive_mb: int) -> Body:
    return Body(max_archive_mb * 2**20, _archive, {"application/zip": _BYTES}, required=True, any_type=True)


def read_body(body: Body, request: Request) -> Any:
    """``request.data`` by what the route declares. Raises TooLarge, UnsupportedMedia, InvalidInput."""
    _refuse_encoding(request)
    return body.read(request, request.body(body.limit))
