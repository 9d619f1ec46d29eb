"""Logging for both programs: one line an event, to standard error, as journald likes it."""

from __future__ import annotations

import logging
import logging.handlers
import sys
import traceback
from pathlib import Path
from typing import Any

from fluxlib.errors import CannotStart, FluxError, Internal

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Libraries whose INFO lines repeat what ours say, or say it per request.
_QUIET = ("waitress", "waitress.queue", "werkzeug", "botocore", "boto3", "urllib3", "paramiko", "google")


_relayed = logging.getLogger(f"{__name__}.relayed")
_FILE_BYTES, _OLD_FILES = 10 * 1024 * 1024, 4


def set_up(level: str = "INFO", *, timestamps: bool = True, file: Path | None = None, console: bool = True) -> None:
    """Send everything of ours to standard error at ``level``, and to ``file``; to that alone without a ``console``.

    ``timestamps=False`` under journald, which stamps each line itself. Raises CannotStart when the file cannot be
    written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if console else []
    if file is not None:
        handlers.append(_rotating(file))
    for handler in handlers:
        handler.setFormatter(_OneLine(_FORMAT if timestamps else _FORMAT.partition(" ")[2]))
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


def relay(line: str) -> None:
    """Log a line of another process of ours as it is: it has its own time and level."""
    _relayed.critical("%s", line, extra={"relayed": True})


def _rotating(file: Path) -> logging.Handler:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return logging.handlers.RotatingFileHandler(
            file, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8"
        )
    except OSError as error:
        raise CannotStart(f"the log {file} cannot be written: {error.strerror or error}") from error


class _OneLine(logging.Formatter):
    """What agents, clouds and clients say is in messages: no line of theirs may look like one of ours."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        message = record.message if getattr(record, "relayed", False) else super().formatMessage(record)
        if (reason := _deliberate(record.exc_info)) is not None:
            message = f"{message}: {reason}"
        return message if message.isprintable() else _escaped(message)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        if _deliberate(ei) is not None:
            return ""
        return "\n".join("    " + (line if line.isprintable() else _escaped(line)) for line in _traceback(ei))


def one_line(text: str, limit: int = 500) -> str:
    """Text from outside made safe for a log line: no control characters, bounded."""
    cleaned = _escaped(text[: limit + 1])
    return cleaned if len(cleaned) <= limit else cleaned[:limit] + "…"


def _deliberate(exc_info: Any) -> str | None:
    """What an error of ours says; where it was raised says no more. None for any other, which needs a traceback."""
    error = exc_info[1] if exc_info else None
    return error.message if isinstance(error, FluxError) and not isinstance(error, Internal) else None


def _traceback(exc_info: Any) -> list[str]:
    return "".join(traceback.format_exception(*exc_info)).rstrip("\n").split("\n")


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
