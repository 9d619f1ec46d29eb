"""Which clouds are built, and that nothing of them is imported before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fluxlib.config.control import AwsConfig, GcpConfig, ProvidersConfig
from fluxlib.errors import ProviderError
from fluxlib.providers import build_clouds

AWS = AwsConfig(region="eu-central-1", ami="ami-1", endpoint_url="http://127.0.0.1:9")
GCP = GcpConfig(project_id="p", zone="z", image="i", endpoint_url="http://127.0.0.1:9")


def test_what_is_configured_is_built_in_the_order_it_is_asked_for_room() -> None:
    assert build_clouds(ProvidersConfig(), "here") == []
    clouds = build_clouds(ProvidersConfig(aws=AWS, gcp=GCP), "here")
    assert [(cloud.name, cloud.config) for cloud in clouds] == [("aws", AWS), ("gcp", GCP)]
    assert [cloud.provider.ssh_user for cloud in clouds] == ["ec2-user", "ubuntu"]


def test_an_sdk_is_imported_only_for_its_cloud(top: Path) -> None:
    script = (
        "import sys, fluxlib.control.nodes.parts, fluxlib.providers as p\n"
        "from fluxlib.config.control import AwsConfig, ProvidersConfig\n"
        "loaded = lambda: {'boto3', 'paramiko', 'google.cloud.compute_v1'} & set(sys.modules)\n"
        "assert not loaded(), loaded()\n"
        "p.build_clouds(ProvidersConfig(aws=AwsConfig(region='r', ami='a')), 'here')\n"
        "assert loaded() == {'boto3'}, loaded()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=top, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("module", "config"), [("boto3", {"aws": AWS}), ("google.cloud", {"gcp": GCP})])
def test_a_missing_sdk_says_how_to_get_it(
    module: str, config: dict[str, AwsConfig | GcpConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [one for one in sys.modules if one == module or one.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ProviderError, match=r"pip install 'flux\[cloud\]'"):
        build_clouds(ProvidersConfig(**config), "here")  # type: ignore[arg-type]
