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
        return super().openapi()
