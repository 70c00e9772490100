"""``tool_choice`` for every API: which tools the model sees, and whether it must call one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError


@dataclass(frozen=True)
class Tools:
    """The tools of one request, in the form that chat templates expect."""

    shown: list[dict] | None = None  # the model sees and may call only these
    forced: bool = False  # the model must call one of them
    one_call: bool = False  # the answer ends after the first call


def tools_of(
    tools: Sequence[dict], mode: str | None, names: Sequence[str] | None = None, parallel: bool | None = None
) -> Tools:
    """Select the tools of a request. Raises: ConfigError: a named tool does not exist.

    Args:
        mode: "none", "auto" or "required".
        names: the tools that the model may call; None for all.
        parallel: whether one answer may have several calls.
    """
    if mode == "none":
        return Tools()
    given = [tool["function"]["name"] for tool in tools]
    if unknown := [name for name in names or () if name not in given]:
        raise ConfigError(
            f"tool_choice: there is no tool {', '.join(map(repr, unknown))[:300]}",
            f"Known: {', '.join(given)[:500] or 'none'}.",
        )
    shown = [tool for tool in tools if names is None or tool["function"]["name"] in names]
    if mode == "required" and not shown:
        raise ConfigError("tool_choice: there is no tool to call", 'Send tools, or tool_choice "auto".')
    return Tools(shown or None, mode == "required", parallel is False)


def tools_of_openai(tools: Sequence[dict], choice: str | dict[str, Any] | None, parallel: bool | None) -> Tools:
    """Select the tools of a chat completion or a response. Raises: ConfigError.

    Args:
        choice: "none", "auto", "required"; {"type": "function"} with a name, for exactly one call of it; or
            {"type": "allowed_tools"} with a mode and names.
    """
    if choice is None or choice in ("none", "auto", "required"):
        return tools_of(tools, choice, None, parallel)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return tools_of(tools, "required", [_name(choice)], parallel=False)
    allowed = choice.get("allowed_tools", choice) if kind == "allowed_tools" else None
    if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
        listed = allowed.get("tools")
        if isinstance(listed, list) and listed:
            return tools_of(tools, allowed["mode"], [_name(each) for each in listed], parallel)
    raise ConfigError(
        f"tool_choice: {str(kind or choice)[:100]!r} is not supported",
        'Send "none", "auto", "required", or {"type": "function", "function": {"name": ...}}.',
    )


def _name(choice: Any) -> str:
    """Return the function that a choice names, in the format of chat completions or of responses."""
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ConfigError(
            "tool_choice: a function has no name", 'Send {"type": "function", "function": {"name": ...}}.'
        )
    return name
