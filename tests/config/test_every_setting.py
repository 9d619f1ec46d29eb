"""Every setting of every file, wrong in every way its kind can be: each is a fault that names the key's path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fluxlib.config.agent import AgentConfig, read_agent
from fluxlib.config.control import ControlConfig, RetentionConfig, read_control
from fluxlib.config.function import FunctionFile, read_function
from fluxlib.config.keys import ApiKey
from fluxlib.config.providers import AutoscalingConfig, AwsConfig, GcpConfig, NodeType
from fluxlib.config.reader import Between, OneOf, Setting, settings_of
from fluxlib.errors import ConfigInvalid, InvalidInput

KEY = {"name": "ci", "role": "deploy", "key_hash": "0" * 64}
AWS = {"region": "eu-central-1", "ami": "ami-1"}
GCP = {"project_id": "p", "zone": "z", "image": "i"}
FLUX = {"api_key": "a-long-random-text-for-tests"}
AGENT: dict[str, Any] = {"agent_id": "worker-1", "tls": {"enabled": False}, "isolation": "off"}
FUNCTION = {"name": "hello", "handler": "main.sh"}
HERE = Path("/somewhere/flux.yaml")

# Each class: how a document around its section is made, and what the section needs.
CLASSES: dict[str, tuple[type, Mapping[str, Any]]] = {
    "flux": (ControlConfig, FLUX),
    "flux.api_keys[0]": (ApiKey, KEY),
    "flux.retention": (RetentionConfig, {}),
    "flux.providers.aws": (AwsConfig, AWS),
    "flux.providers.gcp": (GcpConfig, GCP),
    "flux.providers.aws.autoscaling": (AutoscalingConfig, {}),
    "flux.providers.gcp.autoscaling.node_types[0]": (NodeType, {"instance_type": "n1"}),
    "agent": (AgentConfig, AGENT),
    "function": (FunctionFile, FUNCTION),
}


def document(where: str, section: Mapping[str, Any]) -> dict[str, Any]:
    match where:
        case "flux.api_keys[0]":
            return {**FLUX, "api_keys": [section]}
        case "flux.retention":
            return {**FLUX, "retention": section}
        case "flux.providers.aws":
            return {**FLUX, "providers": {"aws": section}}
        case "flux.providers.gcp":
            return {**FLUX, "providers": {"gcp": section}}
        case "flux.providers.aws.autoscaling":
            return {**FLUX, "providers": {"aws": {**AWS, "autoscaling": section}}}
        case "flux.providers.gcp.autoscaling.node_types[0]":
            return {**FLUX, "providers": {"gcp": {**GCP, "autoscaling": {"node_types": [section]}}}}
    return dict(section)


def read(where: str, data: Mapping[str, Any] | str) -> Any:
    # JSON is YAML, and keeps every text as it is.
    text = data if isinstance(data, str) else json.dumps(data)
    if where == "agent":
        return read_agent(text, HERE)
    return read_function(text) if where == "function" else read_control(text, HERE)


def nested(key: str, value: Any) -> dict[str, Any]:
    outer, _, inner = key.partition(".")
    return {outer: {inner: value}} if inner else {outer: value}


def wrong_values(declared: Setting) -> Iterator[Any]:
    """What this kind can never take."""
    if declared.kind != "map":
        yield {"a": "b"}
    if declared.kind not in ("strings",):
        yield ["a"]
    if declared.kind in ("integer", "number"):
        yield from ("many", "1,5", "0x10", "NaN", "inf", "1e999", "--1", "1 000", "٣")
        if declared.kind == "integer":
            yield from ("1.5", "0777", "1" * 30)
        if isinstance(declared.check, Between):
            yield from (str(int(declared.check.low) - 1), str(int(declared.check.high) + 1))
    if declared.kind == "boolean":
        yield from ("maybe", "2", "truee", "1.0")
    if declared.kind == "string":
        yield from ("two\nlines", "nul\0", "esc\x1b[31m", "x" * 70_000)
        if isinstance(declared.check, OneOf):
            yield "something else"
    if declared.kind in ("strings", "map"):
        yield "text"
        yield ([["nested"]], {"name": ["nested"]})[declared.kind == "map"]
        yield (["x" * 70_000], {"name": "x" * 70_000})[declared.kind == "map"]
    if declared.required:
        yield from (None, "", "  ")


SETTINGS = [
    pytest.param(where, declared, id=f"{where}.{declared.key}")
    for where, (cls, _) in CLASSES.items()
    for _, declared in settings_of(cls)
    if declared.kind != "section"
]


def test_every_setting_is_meant() -> None:
    assert len(SETTINGS) > 100
    kinds = {declared.kind for cls, _ in CLASSES.values() for _, declared in settings_of(cls)}
    assert kinds == {"string", "integer", "number", "boolean", "strings", "map", "section"}


@pytest.mark.parametrize(("where", "declared"), SETTINGS)
def test_wrong(where: str, declared: Setting) -> None:
    path = ".".join(part for part in (where.partition(".")[2], declared.key) if part)
    tried = 0
    for value in wrong_values(declared):
        section = {**CLASSES[where][1], **nested(declared.key, value)}
        if where == "agent" and declared.key == "redis_addr":
            section["store"] = "redis"  # without it the setting is an original's, and ignored
        with pytest.raises(InvalidInput) as refused:
            read(where, document(where, section))
        assert any(fault.startswith(path) for fault in refused.value.faults), (value, refused.value.faults)
        assert all(fault.isprintable() and len(fault) < 400 for fault in refused.value.faults)
        assert isinstance(refused.value, ConfigInvalid) or where == "function"
        tried += 1
    assert tried >= 4


UNITS = {"s": "seconds", "%": "percent"}
NUMBERS = [param for param in SETTINGS if param.values[1].kind in ("integer", "number")]  # type: ignore[union-attr]


@pytest.mark.parametrize(("where", "declared"), NUMBERS)
def test_every_fault_of_a_number_names_its_unit(where: str, declared: Setting) -> None:
    if not declared.unit:
        assert declared.key.endswith("port") or declared.key == "max_surge"
        return
    path = ".".join(part for part in (where.partition(".")[2], declared.key) if part)
    assert isinstance(declared.check, Between)
    for value in ("30s", "512Mi", "many", "", ["a"], str(int(declared.check.high) + 1)):
        if value == "" and not declared.required:
            value = "1,5"
        with pytest.raises(InvalidInput) as refused:
            read(where, document(where, {**CLASSES[where][1], **nested(declared.key, value)}))
        (fault,) = (fault for fault in refused.value.faults if fault.startswith(path))
        assert UNITS.get(declared.unit, declared.unit) in fault
        assert not isinstance(value, str) or value in fault


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("timeout: 010", "timeout: must be a whole number of seconds, is 010 (leave leading zeros out)"),
        ("timeout: 30s", "timeout: must be a whole number of seconds, is 30s"),
        ("timeout: 30.0", "timeout: must be a whole number of seconds, is 30.0"),
        ("timeout: '1 min'", "timeout: must be a whole number of seconds, is 1 min"),
        ("timeout: [30]", "timeout: must be a whole number of seconds, is a list"),
        ("timeout: -1", "timeout: must be a whole number of seconds between 0 and 604800, is -1"),
        ("resources: {memory: 512Mi}", "resources.memory: must be a whole number of MB, is 512Mi"),
        ("resources: {cpu: 0.5}", "resources.cpu: must be a whole number of millicores, is 0.5"),
        ("resources: {timeout: 3}", "resources.timeout: unknown key (did you mean timeout?)"),
        ("memory: 256", "memory: unknown key (did you mean resources.memory?)"),
        ("max_concurrency: lots", "max_concurrency: must be a whole number of executions, is lots"),
        ("env: [A=1]", "env: must be a mapping of names to texts (NAME: TEXT), is a list"),
        ("env: {A: [1]}", "env.A: must be text, is a list"),
        ("env: {spring profiles: x}", "env.spring profiles: is no variable name"),
    ],
)
def test_what_is_said_of_values_as_people_write_them(line: str, words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read("function", f"name: hello\nhandler: main.sh\n{line}\n")
    assert [fault[: len(words)] for fault in refused.value.faults] == [words]


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        *(("./run.sh", "run.sh"), ("././bin//./run", "bin/run"), ("bin/run.sh", "bin/run.sh")),
        *((".hidden", ".hidden"), ("a.b/c", "a.b/c")),
    ],
)
def test_a_handler_is_kept_as_a_path_inside_the_zip(written: str, kept: str) -> None:
    assert read("function", {"name": "f", "handler": written}).handler == kept


@pytest.mark.parametrize("written", [".", "./", "/", "/run.sh", ".//run.sh/", "bin/", "./../run.sh", "bin/../run.sh"])
def test_a_handler_that_is_no_file_inside_the_zip(written: str) -> None:
    with pytest.raises(InvalidInput, match="handler: must be a"):
        read("function", {"name": "f", "handler": written})


def test_variables_have_the_names_that_programs_use() -> None:
    env = {"spring.profiles.active": "prod", "Logging__Level": "x", "node-options": "y", "_A.b-c": "z"}
    assert dict(read("function", {**FUNCTION, "env": env}).env) == env


@pytest.mark.parametrize("where", CLASSES)
def test_the_least_is_enough(where: str) -> None:
    read(where, document(where, CLASSES[where][1]))


@pytest.mark.parametrize("where", CLASSES)
def test_an_unknown_key_is_told_with_the_nearest(where: str) -> None:
    cls, least = CLASSES[where]
    known = next(declared.key for _, declared in settings_of(cls) if len(declared.key) > 6 and "." not in declared.key)
    misspelt = known[:3] + known[4:]
    data = document(where, {**least, misspelt: "1"})
    with pytest.raises(InvalidInput) as refused:
        read(where, data)
    assert any(misspelt in fault and f"did you mean {known}?" in fault for fault in refused.value.faults)


def test_what_was_misspelt_is_told_beside_what_is_missing() -> None:
    with pytest.raises(ConfigInvalid) as refused:
        read_agent("agent_idd: worker-1\n", HERE)
    assert any("agent_id: " in fault for fault in refused.value.faults)
    assert any("did you mean agent_id?" in fault for fault in refused.value.faults)


def test_all_faults_are_told_at_once() -> None:
    data = {
        "port": "http",
        "max_archive_mb": -1,
        "agent_pork": 1,
        "providers": {"aws": {"spot": "perhaps"}, "azure": {}},
    }
    with pytest.raises(ConfigInvalid) as refused:
        read("flux", data)
    paths = {fault.split(":")[0] for fault in refused.value.faults}
    assert paths == {
        *("api_key", "port", "max_archive_mb", "agent_pork", "providers.azure"),
        *("providers.aws.region", "providers.aws.ami", "providers.aws.spot"),
    }


def test_thousands_of_faults_are_counted_not_listed() -> None:
    with pytest.raises(ConfigInvalid) as refused:
        read("flux", {f"key{number}": number for number in range(5000)})
    assert len(refused.value.faults) <= 51
    assert refused.value.faults[-1] == "and 4951 more"


@pytest.mark.parametrize(
    ("where", "data", "words"),
    [
        ("flux", {**FLUX, "providers": []}, "providers: must be a mapping"),
        ("flux", {**FLUX, "providers": {"aws": "x"}}, "providers.aws: must be a mapping"),
        ("flux", {**FLUX, "retention": 7}, "retention: must be a mapping, is a number"),
        ("flux", {**FLUX, "api_keys": {"a": 1}}, "api_keys: must be a list"),
        ("flux", {**FLUX, "api_keys": [KEY, KEY]}, "api_keys[1].name: ci appears twice"),
        ("flux", {**FLUX, "api_keys": [KEY, {**KEY, "name": "b"}]}, "is another key's too"),
        ("flux", {**FLUX, "api_keys": [{**KEY, "role": "admin", "functions": ["a"]}]}, "cannot limit an admin"),
        ("flux", {**FLUX, "api_keys": [{**KEY, "functions": []}]}, "functions: is empty: leave it out"),
        ("flux", {**FLUX, "agent_package_url": "https://x/y"}, "goes with agent_package_sha256"),
        ("flux", {**FLUX, "redis_addr": "redis://:secret@"}, "redis_addr: must be host:port"),
        ("flux", {**FLUX, "cors_origins": ["https://a.b/path"]}, "cors_origins[0]: is no origin"),
        ("flux", {**FLUX, "listen_host": "everywhere"}, "listen_host: must be an IP address"),
        ("flux.providers.aws", {**AWS, "access_key_id": "x"}, "goes with secret_access_key"),
        ("flux.providers.aws.autoscaling", {"enabled": True}, "autoscaling.name: is required"),
        ("flux.providers.aws.autoscaling", {"min_nodes": 5, "max_nodes": 2}, "more than max_nodes (2)"),
        ("flux.providers.aws.autoscaling", {"cpu_lower_threshold": 90}, "not below the upper one"),
        ("flux.providers.aws.autoscaling", {"poll_interval_sec": 90}, "longer than evaluation_window_sec"),
        ("agent", {"agent_id": "flux"}, "agent_id: flux is reserved"),
        ("agent", {"agent_id": "Worker"}, "agent_id: must be 1 to 63 lower-case"),
        ("agent", {**AGENT, "tls": {"enabled": True}}, "tls.ca_cert: is required when tls.enabled is true"),
        ("agent", {**AGENT, "tls": "on"}, "tls: must be a mapping"),
        ("agent", {**AGENT, "store": "redis"}, "redis_addr: is required with store: redis"),
        ("agent", {**AGENT, "uid_range": "0+10"}, "uid_range: must lie between"),
        ("agent", {**AGENT, "uid_range": "10000+10"}, "fewer than max_tasks (256)"),
        ("agent", {**AGENT, "limits": {"cpu": 5}}, "limits.cpu: must be 0 or at least 10 millicores"),
        ("agent", {**AGENT, "state_dir": "~/flux"}, "state_dir: ~ is not expanded"),
        ("function", {**FUNCTION, "name": "../x"}, "name: must be"),
        ("function", {**FUNCTION, "handler": "/bin/sh"}, "handler: must be a relative path"),
        ("function", {**FUNCTION, "handler": "..\\x"}, "handler: must not contain"),
        ("function", {**FUNCTION, "handler": "con"}, "handler: must not have parts"),
        ("function", {**FUNCTION, "env": {"1A": "x"}}, "env.1A: is no variable name"),
        ("function", {**FUNCTION, "env": {"FLUX_X": "x"}}, "env.FLUX_X: begins with FLUX_"),
        ("function", {**FUNCTION, "env": {f"A{n}": "x" * 60_000 for n in range(2)}}, "env: is larger than 64 KiB"),
        ("function", {**FUNCTION, "platforms": ["linux/x86_64"]}, "the architecture is called amd64 here"),
        ("function", {**FUNCTION, "platforms": ["linus"]}, "did you mean linux?"),
        ("function", {**FUNCTION, "resources": {"cpu": 5}}, "at least 10 millicores"),
        ("function", {**FUNCTION, "limits": {"open_files": 5}}, "at least 16"),
        ("function", {**FUNCTION, "resources": 5}, "resources: must be a mapping, is a number"),
    ],
)
def test_what_single_settings_demand(where: str, data: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        read(where, document(where, data))
    assert words in refused.value.message


def test_secrets_stay_out_of_messages_and_representations() -> None:
    config = read("flux", {**FLUX, "redis_addr": "redis://:hunter2@host:1"})
    assert "hunter2" not in repr(config)
    assert FLUX["api_key"] not in repr(config)
    with pytest.raises(ConfigInvalid) as refused:
        read("flux", {**FLUX, "redis_addr": "hunter2@:x"})
    assert "hunter2" not in refused.value.message


# -- what is taken -------------------------------------------------------------------


def test_values_in_the_spellings_people_use() -> None:
    config = read(
        "agent", "agent_id: worker-1\nport: '50053'\ntls:\n  enabled: no\nisolation: off\nkill_grace_sec: 1.5\n"
    )
    assert (config.port, config.tls_enabled, config.kill_grace_sec) == (50053, False, 1.5)
    spec = read("function", "name: 007\nhandler: no\nenv:\n  A: yes\n  B: 1.10\n  C:\n")
    assert (spec.name, spec.handler) == ("007", "no")
    assert dict(spec.env) == {"A": "yes", "B": "1.10", "C": ""}


ORIGINAL_FLUX = """
# as the original's users have it
api_key: "s3cret-key-of-an-original-install"
redis_addr: localhost:6379
port: "7227"
certs_dir: /etc/flux/certs
disable_grpc_tls: false
providers:
  aws:
    region: us-east-1
    ami: ami-0c02fb55956c7d316
    security_group_id: sg-1
    access_key_id: AKIA
    secret_access_key: xyz
    ssh_user: ec2-user
    agent_version: v1.2.3
    tags: {team: platform}
    agent_setup_commands: ["yum install -y python3"]
    autoscaling:
      enabled: true
      name: web
      min_nodes: 1
      max_nodes: 5
      cpu_upper_threshold: 80
      cpu_lower_threshold: 20
      mem_upper_threshold: 85
      mem_lower_threshold: 25
      evaluation_window_sec: 60
      poll_interval_sec: 10
      cooldown_sec: 300
      node_types:
        - {instance_type: t3.small, vcpus: 2, memory_gb: 2}
        - {instance_type: t3.large, vcpus: 2, memory_gb: 8}
"""

ORIGINAL_AGENT = """
agent_id: agent-1
redis_addr: "10.0.0.5:6379"
port: "50052"
network:
  node_private_ip: 10.0.0.7
  node_public_ip: 1.2.3.4
tls:
  enabled: true
  ca_cert: /etc/flux/certs/ca.pem
  cert_file: /etc/flux/certs/agent.pem
  key_file: /etc/flux/certs/agent-key.pem
"""


def test_an_originals_flux_yaml() -> None:
    config = read_control(ORIGINAL_FLUX, Path("/etc/flux/flux.yaml"))
    assert (config.port, config.redis_addr, config.certs_dir) == (7227, "localhost:6379", Path("/etc/flux/certs"))
    aws = config.providers.aws
    assert aws is not None
    assert [kind.instance_type for kind in aws.autoscaling.node_types] == ["t3.small", "t3.large"]
    assert (aws.autoscaling.enabled, aws.autoscaling.mem_upper_threshold) == (True, 85.0)
    assert config.warnings == ()


def test_an_originals_agent_yaml() -> None:
    config = read_agent(ORIGINAL_AGENT, Path("/etc/flux/agent.yaml"))
    assert (config.agent_id, config.port, config.store) == ("agent-1", 50052, "sqlite")
    assert config.node_private_ip == "10.0.0.7"
    assert config.tls_key_file == Path("/etc/flux/certs/agent-key.pem")
    # Agents that share Flux's own Redis could rewrite the control plane.
    assert config.redis_addr == ""
    assert [warning.split(":")[0] for warning in config.warnings] == ["redis_addr"]


def test_relative_paths_count_from_the_file() -> None:
    config = read_agent(
        "agent_id: a\nstate_dir: s\ninsecure: yes\ntls: {enabled: no, ca_cert: c.pem}\n", Path("/etc/x/agent.yaml")
    )
    assert (config.state_dir, config.tls_ca_cert) == (Path("/etc/x/s"), Path("/etc/x/c.pem"))


def test_more_tasks_than_users_stretch_the_default_range_only() -> None:
    config = read_agent("agent_id: a\nmax_tasks: 1000\nisolation: off\ntls: {enabled: false}\n", HERE)
    assert (config.uid_first, config.uid_count) == (1879048192, 1000)


def test_json_of_every_default_is_taken_back() -> None:
    for where, (cls, least) in CLASSES.items():
        section: dict[str, Any] = {}
        for field, declared in settings_of(cls):
            simple = declared.kind in ("integer", "number", "boolean") and not declared.required
            if simple:
                outer, _, inner = declared.key.partition(".")
                section.setdefault(outer, {}).update({inner: field.default}) if inner else section.update(
                    {outer: field.default}
                )
        read(where, yaml.safe_dump(document(where, {**least, **section})))


# -- an agent without TLS ------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "lines"),
    [
        ("", ["tls: {enabled: false}", "insecure: true"]),
        ("tls: {ca_cert: ca.pem}\n", ["tls: {enabled: false}", "insecure: true"]),
        ("isolation: off\n", ["tls: {enabled: false}"]),
        ("insecure: true\n", ["tls: {enabled: false}"]),
        ("tls: {enabled: false}\n", ["insecure: true"]),
        ("tls: {enabled: false}\nisolation: strict\n", ["insecure: true"]),
    ],
)
def test_an_agent_without_tls_is_refused_with_the_line_to_add(said: str, lines: list[str]) -> None:
    """By an omission nobody opens a port that runs programs for everybody."""
    with pytest.raises(ConfigInvalid) as refused:
        read_agent(f"agent_id: worker-1\nport: '50052'\n{said}", HERE)
    faults = "\n".join(refused.value.faults)
    assert [line for line in ("tls: {enabled: false}", "insecure: true") if f"add the line `{line}`" in faults] == lines
    assert "anybody who reaches the agent's port can run programs" in faults


@pytest.mark.parametrize("said", ["insecure: true", "isolation: off", "isolation: strict\ninsecure: yes"])
def test_an_agent_that_is_told_to_do_without_tls_warns(said: str) -> None:
    config = read_agent(f"agent_id: worker-1\ntls: {{enabled: false}}\n{said}\n", HERE)
    (warning,) = config.warnings
    assert "TLS is off" in warning
    assert "0.0.0.0:50052" in warning


def test_a_misspelt_isolation_is_no_less_isolation() -> None:
    with pytest.raises(ConfigInvalid) as refused:
        read("agent", {**AGENT, "isolatoin": "strict"})
    assert any("isolatoin: unknown key (did you mean isolation?)" in fault for fault in refused.value.faults)
