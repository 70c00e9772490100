"""The thermal state of the machine, if a user without special rights can read it."""

from __future__ import annotations

import shutil
import subprocess
import sys

# Foundation's NSProcessInfoThermalState. `powermetrics` shows more, but needs root.
_STATES = {"0": "nominal", "1": "fair", "2": "serious", "3": "critical"}
_JAVASCRIPT = "ObjC.import('Foundation'); $.NSProcessInfo.processInfo.thermalState"


def thermal_state() -> str:
    """Such as "nominal" on macOS, or "61 C, 1980 MHz, ..." for an NVIDIA GPU; "unknown" elsewhere."""
    if sys.platform == "darwin":
        state = _STATES.get(_output("osascript", "-l", "JavaScript", "-e", _JAVASCRIPT), "")
        warnings = _output("pmset", "-g", "therm").splitlines()
        limits = [" ".join(line.split()) for line in warnings if "=" in line]  # such as CPU_Speed_Limit = 100
        power = "low power mode" if "lowpowermode 1" in " ".join(_output("pmset", "-g").split()) else ""
        return "; ".join(filter(None, [state, *limits, power])) or "unknown"
    fields = "temperature.gpu,clocks.sm,clocks_throttle_reasons.active"
    found = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    if not found or found[0].count(",") != 2:
        return "unknown"
    temperature, clock, reasons = (text.strip() for text in found[0].split(","))
    return f"{temperature} C, {clock}, throttle reasons {reasons}"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
