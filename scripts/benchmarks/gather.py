"""Writes what the reports in scripts/benchmarks/reports/ say into the documents: ./scripts/bench gather [--check]

A report is the report.json of ./scripts/check_gpu, under the name of its chip, such as reports/Apple_M3_Pro.json. The
figures are gathered by chip in scripts/benchmarks/README.md. The estimates in metal/README.md are made again with the
bandwidth and the cost of a launch that the reports tell. --check writes nothing, and exits with 1 where a document is
not what it would write.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path

import mlx_lora  # noqa: F401  isort: skip  (opens a BLAS before MLX is imported)
from mlx_lora.bench import assumptions_of, gathered, read_report, table

ROOT = Path(__file__).resolve().parents[2]
REPORTS = Path(__file__).parent / "reports"


def documents(reports: list) -> dict[Path, dict[str, str]]:
    """document -> {name of a block: its text}."""
    given = assumptions_of(reports)
    constants = (
        f"It assumes rank 16 on all linear layers, a 4-bit base, {100 * given.efficiency:.0f} % of the bandwidth in "
        f"the data sheet, and {given.microseconds:.1f} microseconds for each dependent launch ({given.source})."
    )
    return {
        ROOT / "scripts" / "benchmarks" / "README.md": {"gathered": gathered(reports)},
        ROOT / "metal" / "README.md": {"assumed": textwrap.fill(constants, 120), "estimates": table(given)},
    }


def with_block(text: str, name: str, block: str) -> str:
    """``text`` with what stands between the marks of ``name`` replaced."""
    begin, end = f"<!-- {name}: ./scripts/bench gather writes this -->\n", f"<!-- end of {name} -->"
    assert text.count(begin) == text.count(end) == 1, f"marks of {name}"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}{block}\n{end}", text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    stale = []
    for path, blocks in documents([read_report(path) for path in sorted(REPORTS.glob("*.json"))]).items():
        before = after = path.read_text(encoding="utf-8")
        for name, block in blocks.items():
            after = with_block(after, name, block)
        if after != before:
            stale.append(str(path.relative_to(ROOT)))
            if not options.check:
                path.write_text(after, encoding="utf-8")
    print("\n".join(stale) or "Nothing has changed.")
    sys.exit(1 if options.check and stale else 0)


if __name__ == "__main__":
    main()
