"""Reading request bodies: JSON as its standard has it, and models whose fields are what a request may hold.

NaN, lone surrogates and nesting beyond reason end here. Behind this file they would come back as errors in the middle
of an answer.
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
    """The type of a boolean field that may have but one value. (``Literal[False]`` would take 0 as well.)"""

    def check(given: bool) -> bool:
        if given is not value:
            raise ValueError(f"only {str(value).lower()} can be honoured")
        return given

    return Annotated[bool, AfterValidator(check), WithJsonSchema({"const": value})]


def integer(least: int, most: int = 2**31 - 1, **about: str) -> Any:
    """The type of a whole number within bounds. 3.0 is one in JSON."""
    return Annotated[int, Field(ge=least, le=most, **about), BeforeValidator(_whole)]


class Body(BaseModel):
    """A request's body. A field that is not named is refused by name: it would be ignored in silence otherwise."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StrictRequest(Request):
    """A request whose JSON is read by pydantic's parser, which takes no NaN, no half characters and 200 levels."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = from_json(await self.body(), allow_inf_nan=False)
                json.dumps(self._json, allow_nan=False)  # 1e999, which the parser reads as infinity
            except ValueError as error:
                raise HTTPException(400, f"the body is not valid JSON: {error}") from None
        return self._json


class StrictRoute(APIRoute):
    """A route that reads its body with ``StrictRequest``; a body that is no JSON is refused by its type."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Any:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self.body_field is not None and kind != "application/json":
                raise HTTPException(415, "send the body as JSON, with Content-Type: application/json")
            return await handle(StrictRequest(request.scope, request.receive))

        return strict
