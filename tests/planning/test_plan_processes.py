"""Each process of a distributed run plans for its own machine, whose memory may differ."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_lora
from mlx_lora.tiny_base import skill

LAUNCH = Path(sys.executable).with_name("mlx.launch")
pytestmark = pytest.mark.skipif(not LAUNCH.exists(), reason="no mlx.launch here")

# argv: folder, bytes that rank 1 can use.
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
if rank == 1 and sys.argv[2] != "-":
    plan.memory_limit = lambda: int(sys.argv[2])
train = {"iters": 2, "batch_size": 2, "val_batches": 0, "report_prompts": 0}
try:
    for report in run(folder / "adapters", model=PATH, data=folder, train=train):
        print(type(report).__name__, rank, getattr(report, "peak", ""), flush=True)
except MLXLoRAError as error:
    sys.exit(f"Error: {error.message}")
"""


@pytest.mark.parametrize(("limit", "said"), [("-", ("Done 0", "Done 1")), ("1000", ("rank 1", "this run needs about"))])
def test_processes_plan_and_end_together(limit, said, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skill.rows(split, 4)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(mlx_lora.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    command = [LAUNCH, "-n", "2", "-p", str(port), "--", sys.executable, "-c", RUN, str(tmp_path), limit]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert all(text in output for text in said), output
    peaks = {line.split()[-1] for line in output.splitlines() if "Planned" in line}
    assert len(peaks) == 1 and output.count("Planned") == 2
