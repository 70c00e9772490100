"""The server's address, access rules and limits."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from .options import check_types, common, option, raise_all

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_LIMITS = "Limits"


@dataclass(frozen=True)
class ServeConfig:
    """The server's address, access rules and limits."""

    help_section = "Server"

    host: str = common("127.0.0.1", "Address to listen on. An address that other machines can reach needs --api-key.")
    port: int = common(8080, "Port to listen on.")
    api_key: str | None = option(None, "Requests must bring this key (Authorization: Bearer KEY, or x-api-key).")
    allow_host: tuple[str, ...] = option(
        (), "Also answer requests for this host name, as a reverse proxy sends; repeat the option for several."
    )
    allow_origin: tuple[str, ...] = option(
        (), "Let web pages of this origin, such as http://localhost:3000, send requests; repeat it for several."
    )
    runs_dir: str | None = option(
        None, "Show live runs on the chat page: the folder of one run, or a folder of several runs."
    )
    batch_size: int = option(16, "Requests to compute at a time.", section=_LIMITS)
    queue_size: int = option(
        64, "Requests that may wait; further ones get an error with a time to retry.", section=_LIMITS
    )
    max_tokens_limit: int = option(8192, "Most tokens that a request may ask for.", section=_LIMITS)
    request_timeout: float = option(600.0, "Seconds after which an answer is cut off.", section=_LIMITS)
    body_limit: int = option(4_000_000, "Largest request body in bytes.", section=_LIMITS)
    upload_limit: int = option(
        2_000_000_000, "Largest upload of an adapter into --adapters-dir, in bytes.", section=_LIMITS
    )
    adapter_memory: float | None = option(
        None,
        "GB of adapters to keep in memory; the least recently used are dropped (default: all stay).",
        section=_LIMITS,
    )
    prompt_cache_size: int = option(
        32, "Number of prompts and answers whose keys and values are kept.", section=_LIMITS
    )
    prompt_cache_bytes: int | None = option(
        None,
        "Most bytes for the keys and values of these (default: a quarter of the memory for models).",
        section=_LIMITS,
    )

    def __post_init__(self):
        for name in ("allow_host", "allow_origin"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        check_types(self)
        faults = []
        numbers = {"batch_size": 1, "queue_size": 1, "max_tokens_limit": 1, "prompt_cache_size": 0}
        numbers |= {"body_limit": 1000, "upload_limit": 1000}
        for name, least in numbers.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                faults.append(f"{name} must be a whole number of at least {least}, not {value!r}")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 2**16:
            faults.append(f"port must be a number from 0 to 65535, not {self.port!r}")
        for name in ("request_timeout", "adapter_memory", "prompt_cache_bytes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                faults.append(f"{name} must be above 0, not {value!r}")
        if self.prompt_cache_bytes and not self.prompt_cache_size:
            faults.append("prompt_cache_bytes has no effect with prompt_cache_size 0")
        if self.api_key is not None and (len(self.api_key) < 8 or self.api_key != self.api_key.strip()):
            faults.append("api_key must have at least 8 characters, and no spaces at either end")
        if not self.local and self.api_key is None:
            faults.append(f"host {self.host} can be reached from other machines, so an api_key is needed")
        for origin in self.allow_origin:
            if "://" not in origin or origin.endswith("/") or "*" in origin:
                faults.append(f"allow_origin must be like http://localhost:3000, without a path, not {origin!r}")
        raise_all(faults, self)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host in LOCAL_NAMES or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
