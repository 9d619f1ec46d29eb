"""A Redis as people have it: passwords, ACLs, TLS, sockets, Clusters. What is wrong with it is told in a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fluxlib.archive import digest_of
from fluxlib.config.redis_address import parse_redis_address
from fluxlib.errors import StoreUnavailable
from fluxlib.pki import Authority
from fluxlib.store.base import ControlStore
from fluxlib.store.redis import RedisControlStore
from tests.support.entries import entry, function
from tests.support.programs import free_port, wait_until
from tests.support.redis_server import RedisServer

SECRET = "p@ss/w#rd?x=1:%"
# As docs/operations.md says it.
RIGHTS = (
    *("~fluxpy:*", "~function:*", "~code:*", "~flux:agents:*"),
    *("+@all", "-@admin", "-@dangerous", "+info", "+config|get"),
)
WITHOUT_INFO = "could not ask whether Redis keeps what it is given: it does not let Flux run INFO"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    directory = tmp_path_factory.mktemp("redis")
    options = ("--appendonly", "yes", "--appendfsync", "always", "--unixsocket", str(directory / "redis.sock"))
    with RedisServer(directory, *options) as running:
        yield running


@pytest.fixture
def user(server: RedisServer) -> Iterator[Callable[..., str]]:
    """Makes a user of these rights; the address with its password."""
    made: list[str] = []

    def make(*rights: str) -> str:
        name = f"u{len(made)}"
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", name, "reset", "on", f">{SECRET}", *rights)
        made.append(name)
        return f"redis://{name}:{SECRET}@{server.address}/0"

    yield make
    with server.client() as client:
        for name in made:
            client.execute_command("ACL", "DELUSER", name)


def works(store: ControlStore) -> None:
    store.save_function(function(code_digest=digest_of(b"zip")), b"zip")
    assert store.archive(digest_of(b"zip")) == b"zip"
    execution_id, commit = store.create_execution(entry("e-1"), durable=True)
    commit.wait()
    assert store.execution(execution_id) is not None
    store.forget_execution(execution_id, "").wait()
    store.ping()


# ---- addresses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown", "login", "database"),
    [
        ("localhost:6380", "localhost:6380", ("", ""), 0),
        ("[::1]:6379", "[::1]:6379", ("", ""), 0),
        ("redis://redis_1", "redis_1:6379", ("", ""), 0),
        ("REDISS://h:1/2", "h:1", ("", ""), 2),
        ("redis://h/0?db=3", "h:6379", ("", ""), 3),
        ("redis://:secret@h:1", "h:1", ("", "secret"), 0),
        ("redis://u:s%40%2F%23@h:1/1", "h:1", ("u", "s@/#"), 1),
        ("redis://u:@h:1", "h:1", ("u", ""), 0),
        # As they are pasted.
        (f"redis://u:{SECRET}@h:1/4", "h:1", ("u", SECRET), 4),
        ("redis://:a/b@[::1]:1", "[::1]:1", ("", "a/b"), 0),
        ("redis://u:123/x@h:1", "h:1", ("u", "123/x"), 0),
        ("redis://:a@b@h:1", "h:1", ("", "a@b"), 0),
        ("unix://u:a/b@/run/redis.sock?db=2", "/run/redis.sock", ("u", "a/b"), 2),
        ("unix:///run/redis.sock", "/run/redis.sock", ("", ""), 0),
        ("redis://h/0?client_name=a@b", "h:6379", ("", ""), 0),
    ],
)
def test_an_address_is_read_as_it_was_meant(text: str, shown: str, login: tuple[str, str], database: int) -> None:
    address = parse_redis_address(text)
    assert (str(address), (address.username, address.password), address.database) == (shown, login, database)
    assert address.password == "" or address.password not in repr(address)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("localhost", "must be host:port, or a redis://"),
        (":secret@h:1", "with the password inside: redis://:PASSWORD@HOST:PORT"),
        ("http://secret@h:1", "must be host:port, or a redis://"),
        ("redis://:secret@", "must be host:port, or a redis://"),
        ("redis://:secret@h:70000", "a port is between 1 and 65535"),
        ("redis://secret@h:1", "a user without a password"),
        ("redis://:secret@h:1/secret", "must be host:port, or a redis://"),
        ("redis://:secret@h:1?secret=1", "an option behind the ? that is not known"),
        ("redis://:sec ret@h:1", "must not contain spaces (in a password: %20)"),
        ("unix://secret.sock", "unix:///PATH"),
    ],
)
def test_a_wrong_address_is_refused_without_a_part_of_it(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_redis_address(text)
    assert problem in str(caught.value)
    assert "secret" not in str(caught.value)


# ---- servers as people have them ------------------------------------------------------


def test_a_unix_socket(server: RedisServer) -> None:
    with server.client() as client:
        path = client.config_get("unixsocket")["unixsocket"]  # type: ignore[index]
    with closing(RedisControlStore(f"unix://{path}?db=1")) as store:
        works(store)
    with pytest.raises(StoreUnavailable, match=r"^Redis at /nowhere/r\.sock cannot be reached: No such file"):
        RedisControlStore("unix:///nowhere/r.sock")


def test_a_password_that_was_pasted_as_it_is(tmp_path: Path) -> None:
    with RedisServer(tmp_path, "--requirepass", SECRET) as server:
        with closing(RedisControlStore(f"redis://:{SECRET}@{server.address}/0")) as store:
            works(store)
        with pytest.raises(
            StoreUnavailable, match=r"wants a password: write redis_addr as redis://:PASSWORD@HOST:PORT"
        ):
            RedisControlStore(server.address)
        with pytest.raises(StoreUnavailable, match=r"refuses the user or the password of redis_addr$"):
            RedisControlStore(f"redis://:wr/ng@{server.address}/0")


def test_the_rights_that_the_documentation_names_are_enough(user: Callable[..., str]) -> None:
    with closing(RedisControlStore(user(*RIGHTS))) as store:
        works(store)
        assert store.persistence() == ()
    documented = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"ACL SETUSER flux on >PASSWORD {' '.join(RIGHTS)}\n" in documented


@pytest.mark.parametrize(
    ("denied", "warning"),
    [
        ("-info", WITHOUT_INFO),
        ("-config|get", "could not ask whether Redis keeps what it is given: it does not let Flux run CONFIG GET"),
    ],
)
def test_a_question_that_redis_does_not_allow_is_a_warning(user: Callable[..., str], denied: str, warning: str) -> None:
    with closing(RedisControlStore(user(*RIGHTS, denied))) as store:
        works(store)
        (said,) = store.persistence()
        assert said.startswith(warning)


def test_a_managed_redis_has_other_names_for_its_commands(tmp_path: Path) -> None:
    options = ("--appendonly", "yes", "--rename-command", "CONFIG", "")
    with RedisServer(tmp_path, *options) as server, closing(RedisControlStore(server.address)) as store:
        works(store)
        assert [warning.partition(", which")[0] for warning in store.persistence()] == [
            "could not ask whether Redis keeps what it is given: it does not let Flux run CONFIG GET"
        ]


@pytest.mark.parametrize("rights", [("~other:*", "+@all"), ("~*", "+@all", "-@scripting")])
def test_a_user_who_may_too_little_is_said_to_be(user: Callable[..., str], rights: tuple[str, ...]) -> None:
    with pytest.raises(StoreUnavailable, match=r"does not let the user of redis_addr .*docs/operations\.md") as caught:
        RedisControlStore(user(*rights))
    assert SECRET not in caught.value.message


def test_rights_taken_away_while_flux_runs_are_a_sentence(server: RedisServer, user: Callable[..., str]) -> None:
    with closing(RedisControlStore(user(*RIGHTS))) as store:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "u0", "-@scripting")
        with pytest.raises(StoreUnavailable, match="does not let the user of redis_addr do what Flux needs"):
            store.ping()
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "u0", "+@scripting")
        store.ping()


@pytest.mark.parametrize("slots", [0, 16384])
def test_a_cluster_is_refused(tmp_path: Path, slots: int) -> None:
    with RedisServer(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port())) as server:
        if slots:
            with server.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, slots - 1)
                wait_until(lambda: client.cluster("INFO")["cluster_state"] == "ok", "the Cluster to be ready")  # type: ignore[no-untyped-call]
        with pytest.raises(StoreUnavailable, match=r"^Redis at \S+ is a Cluster, which Flux cannot use"):
            RedisControlStore(server.address)


def test_a_replica_is_refused(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path, "--replicaof", "127.0.0.1", "1") as server,
        pytest.raises(StoreUnavailable, match="is a replica and takes no writes: name its master"),
    ):
        RedisControlStore(server.address)


def test_tls_with_a_ca_of_ones_own(tmp_path: Path) -> None:
    identity = Authority.open(tmp_path / "certs").issue_agent("redis")  # a server's certificate
    for name, pem in (("ca.pem", identity.ca_pem), ("cert.pem", identity.cert_pem), ("key.pem", identity.key_pem)):
        (tmp_path / name).write_bytes(pem)
    secured = free_port()
    options = ["--tls-port", str(secured), "--tls-auth-clients", "no"]
    for option, name in (("ca-cert", "ca"), ("cert", "cert"), ("key", "key")):
        options += [f"--tls-{option}-file", str(tmp_path / f"{name}.pem")]
    with RedisServer(tmp_path, *options) as server:
        url = f"rediss://127.0.0.1:{secured}/0"
        with closing(RedisControlStore(f"{url}?ssl_ca_certs={tmp_path}/ca.pem&ssl_check_hostname=false")) as store:
            works(store)
        for address, said in (
            (url, r"name the CA of its certificate in redis_addr: \?ssl_ca_certs="),
            (f"{url}?ssl_ca_certs={tmp_path}/no.pem", r"ssl_ca_certs .*no\.pem cannot be read: No such file"),
            (f"127.0.0.1:{secured}", "if it speaks TLS, write rediss:// in place of redis://"),
            (f"rediss://{server.address}?socket_timeout=0.5&socket_connect_timeout=0.5", "if it does not speak TLS"),
            (f"redis://{server.address}?ssl_ca_certs=x", "ssl_ca_certs goes with rediss:// only"),
        ):
            with pytest.raises(StoreUnavailable, match=said):
                RedisControlStore(address)


# ---- the program -----------------------------------------------------------------------


@pytest.mark.parametrize("address", [f"redis://:{SECRET}@127.0.0.1:1/0", "unix:///nowhere/r.sock"])
def test_flux_without_its_redis_ends_with_one_sentence(tmp_path: Path, address: str) -> None:
    (tmp_path / "flux.yaml").write_text(
        f'api_key: {"k" * 20}\nstate_dir: s\ncerts_dir: c\nport: {free_port()}\nredis_addr: "{address}"\n'
    )
    ended = subprocess.run(
        [sys.executable, "flux.py"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "FLUX_CONFIG": str(tmp_path / "flux.yaml")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if line.startswith("flux: ")]
    assert len(said) == 1
    assert "cannot be reached" in said[0]
    assert "Traceback" not in ended.stderr
    assert not any(part in ended.stderr for part in (SECRET, "p@ss", "w#rd"))
