"""New keys without a restart: a leaked one must not wait until calls in flight may be broken off."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from fluxlib.config.control import ControlConfig, load_control
from fluxlib.errors import ConfigInvalid

log = logging.getLogger(__name__)

LOOK_EVERY = 2.0


class KeyReload:
    """Hands flux.yaml to ``take`` when it has changed. Only its keys are taken over; the rest needs a restart."""

    def __init__(self, path: Path, take: Callable[[ControlConfig], None]) -> None:
        self._path = path
        self._take = take
        self._seen = self._look()

    def tick(self, now: float) -> None:
        """One look at the file's times: files can be replaced on any system, and told about on few."""
        del now
        found = self._look()
        if found is None or found == self._seen:
            return
        self._seen = found
        try:
            config = load_control(self._path)
        except ConfigInvalid as error:
            log.error("%s has changed and cannot be used, the keys stay as they are: %s", self._path, error.message)
            return
        self._take(config)
        log.info("took the keys of %s: %s", self._path, ", ".join(["api_key", *(key.name for key in config.api_keys)]))

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
