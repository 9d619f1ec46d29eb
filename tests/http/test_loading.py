"""Flask is loaded by the first request that needs it, once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from fluxlib.control.http import Api
from tests.http.fakes import Fakes
from tests.support.programs import TOP

_HOT_ONLY = """
import io, sys
from tests.http.fakes import ADMIN, Fakes
from fluxlib.control.http import Api

api = Api(Fakes().services())
def call(method, path):
    seen = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", "REMOTE_ADDR": "192.0.2.1",
               "SERVER_NAME": "flux", "SERVER_PORT": "7227", "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr,
               "wsgi.input": io.BytesIO(), "HTTP_X_API_KEY": ADMIN}
    body = b"".join(api(environ, lambda status, headers, exc_info=None: seen.append(status)))
    assert seen[0].startswith("200"), (path, seen, body)

def loaded():
    return sorted({"flask", "werkzeug", "jinja2", "click"} & set(sys.modules))

call("GET", "/health")
call("POST", "/execute/hello")
print(loaded())
call("GET", "/agents")
print(loaded())
"""


def test_health_and_calls_need_no_flask() -> None:
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    run = subprocess.run([sys.executable, "-c", _HOT_ONLY], cwd=TOP, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["[]", "['click', 'flask', 'jinja2', 'werkzeug']"]


def test_requests_that_come_together_make_one_application() -> None:
    api = Api(Fakes().services())
    together = threading.Barrier(8)
    made: list[object] = []

    def ask() -> None:
        together.wait()
        made.append(api.flask)

    threads = [threading.Thread(target=ask, name=f"asker-{number}") for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len({id(one) for one in made}) == 1
