from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.windows.inside.runs import Programs


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    made = Programs(tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("code"))
    yield made
    made.executor.stop(time.monotonic() + 10)
