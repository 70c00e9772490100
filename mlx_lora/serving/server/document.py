"""The OpenAPI description: FastAPI's, plus this server's models, vocabulary size and API key."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from .state import Server

_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
_WITHOUT_KEY = ("/health",)


def describe(app: FastAPI, server: Server) -> dict[str, Any]:
    """Return the OpenAPI description of ``app`` with the adapters that exist now."""
    found = FastAPI.openapi(app)
    names = [server.name, *server.engine.bank.names]
    schemas = found["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):  # of FastAPI's 422; this server answers 400
        schemas.pop(unused, None)
    for schema in schemas.values():
        fields = schema.get("properties", {})
        if "model" in fields:
            fields["model"]["examples"] = names
        if "logit_bias" in fields:
            fields["logit_bias"]["anyOf"][0]["propertyNames"] = {"pattern": f"^({below(server.engine.vocab_size)})$"}
        if "tools" in fields and not server.engine.shows_tools:
            fields["tools"]["anyOf"][0]["maxItems"] = 0
        for name in ("prompt", "stop_token_ids"):
            if name in fields:
                _limit_tokens(fields[name], server.engine.vocab_size - 1)
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "model":
                    parameter["schema"]["examples"] = names
            if server.config.api_key is None or path in _WITHOUT_KEY:
                operation["responses"].pop("401", None)
            else:
                operation["security"] = [{name: []} for name in _KEYS]
    if server.config.api_key is not None:
        found["components"]["securitySchemes"] = _KEYS
    return found


def _limit_tokens(schema: Any, most: int) -> None:
    if isinstance(schema, list):
        for part in schema:
            _limit_tokens(part, most)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            schema["maximum"] = most
        for part in (schema.get("anyOf"), schema.get("items")):
            _limit_tokens(part, most)


def below(number: int) -> str:
    """Return a regular expression for the integers from 0 to ``number - 1``, without leading zeros."""
    digits = str(number - 1)
    # Numbers with fewer digits; those that begin like the last one and then have a smaller digit; the last one.
    shorter = [f"[1-9][0-9]{{{length - 1}}}" for length in range(2, len(digits))]
    smaller = []
    for place, digit in enumerate(digits):
        least = 1 if place == 0 and len(digits) > 1 else 0
        if int(digit) > least:
            smaller.append(f"{digits[:place]}[{least}-{int(digit) - 1}][0-9]{{{len(digits) - place - 1}}}")
    single = ["[0-9]"] if len(digits) > 1 else []
    return "|".join([*single, *shorter, *smaller, digits])
