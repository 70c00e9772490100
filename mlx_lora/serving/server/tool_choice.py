"""``tool_choice`` of every interface: which tools the model is shown, and whether it must call one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError


@dataclass(frozen=True)
class Tools:
    """The tools of one request, as chat templates take them."""

    shown: list[dict] | None = None  # to the model, which may call these and no others
    forced: bool = False  # one of them must be called
    one_call: bool = False  # the answer ends after the first call


def tools_of(
    tools: Sequence[dict], mode: str | None, names: Sequence[str] | None = None, parallel: bool | None = None
) -> Tools:
    """The tools of a request. Raises: ConfigError: a tool that must be called is not among them.

    Args:
        mode: "none", "auto" or "required".
        names: of those that may be called; None for all.
        parallel: whether several may be called in one answer.
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
    """The tools of a chat completion or a response. Raises: ConfigError.

    Args:
        choice: "none", "auto", "required"; {"type": "function"} with a name, of which one call is made; or
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
        f"tool_choice: {str(kind or choice)[:100]!r} cannot be used so",
        'Send "none", "auto", "required", or {"type": "function", "function": {"name": ...}}.',
    )


def _name(choice: Any) -> str:
    """The function that a choice names, in the form of chat completions or of responses."""
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ConfigError(
            "tool_choice: a function has no name", 'Send {"type": "function", "function": {"name": ...}}.'
        )
    return name
