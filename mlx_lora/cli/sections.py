"""``--help`` in sections, for commands with many options. Only these commands import cloup."""

from __future__ import annotations

from typing import Any

import click
import cloup

from ..config import COMMON, MEMORY, MORE, SECTIONS

# Sections of options that are not fields of ``config.py``; other options are under "Run".
_SECTIONS = {
    "model": COMMON,
    "adapter_path": COMMON,
    "adapters": COMMON,
    "adapters_dir": COMMON,
    "pin": COMMON,
    "merge": COMMON,
    "config": COMMON,
    "prompt": COMMON,
    "system_prompt": COMMON,
    "ignore_chat_template": "Generation",
    "prompt_cache_file": MEMORY,
    "trust_remote_code": "Model and data",
    "init_reference": MORE,
    "report_to": "Output",
    "project_name": "Output",
    "as_json": "Output",
}


class SectionedCommand(cloup.Command):
    """A command whose options are listed under ``config.SECTIONS``, in the order in which they are declared."""

    def __init__(self, *args: Any, params: list[click.Parameter], **kwargs: Any):
        groups = {title: cloup.OptionGroup(title) for title in SECTIONS}
        for param in params:
            title = getattr(param, "section", None) or _SECTIONS.get(param.name, "Run")
            param.group = groups[title]
        params.sort(key=lambda param: SECTIONS.index(param.group.title))
        super().__init__(*args, params=params, **kwargs)
