"""Read request bodies: strict JSON, and pydantic models that list every field a request may have.

NaN, lone surrogates and extreme nesting are refused here. Otherwise they would cause errors in the middle of an
answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import from_json
from starlette.exceptions import HTTPException


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def only(value: bool) -> Any:
    """The type of a boolean field that accepts only ``value``. (``Literal[False]`` would accept 0 as well.)"""

    def check(given: bool) -> bool:
        if given is not value:
            raise ValueError(f"only {str(value).lower()} is supported")
        return given

    return Annotated[bool, AfterValidator(check), WithJsonSchema({"const": value})]


def integer(least: int, most: int = 2**31 - 1, **about: str) -> Any:
    """The type of an integer within bounds. 3.0 is accepted, because it is an integer in JSON Schema."""
    return Annotated[int, Field(ge=least, le=most, **about), BeforeValidator(_whole)]


class Body(BaseModel):
    """A request's body. The error names each unknown field, so that no field is ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StrictRequest(Request):
    """A request whose JSON is parsed by pydantic, which refuses NaN, lone surrogates and more than 200 levels."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
                json.dumps(self._json, allow_nan=False)  # refuses 1e999, which pydantic parses as infinity
            except ValueError as error:
                raise HTTPException(400, f"the body is not valid JSON: {error}") from None
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its body with ``StrictRequest`` and refuses content types other than JSON."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Any:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.body_field is not None and kind != "application/json":
                raise HTTPException(415, "send the body as JSON, with Content-Type: application/json")
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
