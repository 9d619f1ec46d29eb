"""The OpenAPI document: valid, complete, and made from what the routes check."""

from __future__ import annotations

from typing import Any

from openapi_spec_validator import OpenAPIV31SpecValidator

from fluxlib.config.function import FunctionFile
from fluxlib.config.reader import settings_of
from tests.http.conftest import Client


def test_it_is_openapi_3_1(client: Client) -> None:
    OpenAPIV31SpecValidator(client.document.document).validate()


def test_every_operation_says_what_it_may_answer(client: Client) -> None:
    for path, item in client.document.document["paths"].items():
        for method, operation in item.items():
            responses = set(operation["responses"])
            assert {"400", "500", "503"} <= responses
            public = {} in operation.get("security", [])
            assert public == (path in ("/health", "/agents", "/openapi.json")), path
            if not public:
                assert {"401", "403", "429"} <= responses, (method, path)
            names = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "path"}
            assert names == {part.strip("{}") for part in path.split("/") if part.startswith("{")}


def test_a_function_is_described_by_its_readers_settings(client: Client) -> None:
    operation = client.document.document["paths"]["/functions"]["put"]
    schema = operation["requestBody"]["content"]["application/yaml"]["schema"]

    def keys(properties: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in properties.items():
            inner = value.get("properties")
            found |= keys(inner, f"{name}.") if inner else {prefix + name}
        return found

    assert keys(schema["properties"]) == {declared.key for _, declared in settings_of(FunctionFile)}
    assert schema["required"] == ["name", "handler"]
    assert schema["properties"]["max_concurrency_behavior"]["enum"] == ["exit", "wait"]


def test_unused_and_missing_components(client: Client) -> None:
    document = client.document.document
    text = str(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}'" in text, name
