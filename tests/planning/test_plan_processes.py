"""A distributed run that does not fit into the memory of one of its machines is refused by all processes."""

from __future__ import annotations

import json

from mlx_lora.tiny_base import skill
from ranks import Ranks

RUN = """
import sys
from pathlib import Path
import mlx_lora
import mlx.core as mx
from mlx_lora.errors import MLXLoRAError
from mlx_lora.planning import plan
from mlx_lora.runs import run
from mlx_lora.tiny_base import PATH

folder, rank = Path(sys.argv[1]), mx.distributed.init().rank()
if rank == 1:
    plan.memory_limit = lambda: 1000
try:
    for report in run(folder / "adapters", model=PATH, data=folder, train={"iters": 2, "batch_size": 2}):
        print(type(report).__name__)
except MLXLoRAError as error:
    sys.exit(f"Error: {error.message}")
"""


def test_a_run_too_large_for_one_machine_is_refused_by_all(tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, 4)))
    with Ranks(tmp_path, 2, "-c", RUN, tmp_path) as ranks:
        assert ranks.end() == [1, 1]
    for output in ranks.outputs:
        assert output.count("Planned") == 1 and "Started" not in output
        assert "this run needs about" in output
    assert "rank 1 (127.0.0.1) failed" in ranks.outputs[0]
