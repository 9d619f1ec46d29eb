"""The clouds that flux.yaml configures, each imported only then."""

from __future__ import annotations

from dataclasses import dataclass

from fluxlib.config.control import AutoscalingConfig, AwsConfig, GcpConfig, ProvidersConfig
from fluxlib.providers.base import Provider


@dataclass(frozen=True)
class Cloud:
    """One configured provider and its settings."""

    provider: Provider
    config: AwsConfig | GcpConfig

    @property
    def name(self) -> str:
        return self.provider.name

    @property
    def scaling(self) -> AutoscalingConfig:
        return self.config.autoscaling


def build_clouds(config: ProvidersConfig, installation_id: str) -> list[Cloud]:
    """In the order in which they are asked for room. Raises ProviderError when one cannot be used."""
    clouds: list[Cloud] = []
    if config.aws is not None:
        from fluxlib.providers.aws import Aws

        clouds.append(Cloud(Aws(config.aws, installation_id), config.aws))
    if config.gcp is not None:
        from fluxlib.providers.gcp import Gcp

        clouds.append(Cloud(Gcp(config.gcp, installation_id), config.gcp))
    return clouds
