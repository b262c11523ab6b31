"""The API's own description, at /openapi.json and /docs."""

from typing import Any

from fastapi import FastAPI

from nanovllm.server.auth import OPEN_PATHS

KEY_SCHEME = "API key"


class DescribedAPI(FastAPI):
    """FastAPI, but its description knows our keys, and that a bad request is a 400."""

    def openapi(self) -> dict[str, Any]:
        """The description; made once."""
        if self.openapi_schema is None:
            schema = super().openapi()
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if self.state.server.config.api_key and path not in OPEN_PATHS:
                        operation["security"] = [{KEY_SCHEME: []}]
            components = schema["components"]
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            components["securitySchemes"] = {KEY_SCHEME: {"type": "http", "scheme": "bearer"}}
            self.openapi_schema = _exact(schema)
        return super().openapi()


def _exact(value: Any) -> Any:
    """Spell out integers: FastAPI makes each bound a float, and 2**63 is then printed rounded."""
    if isinstance(value, dict):
        return {key: _exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
