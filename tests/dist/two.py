"""Start `pathlm train` as one process, or as two that talk over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = """
name = "run"
preset = "plain-tiny"
steps = 12
batch_tokens = 640
micro_rows = 2
eval_every = 4
eval_rows = 5
save_every = 3
log_every = 1
[model]
hidden_size = 16
intermediate_size = 32
pre_blocks = 1
post_blocks = 1
num_attention_heads = 2
[data]
length = 64
task_share = 1.0
tasks = { copy = 1.0, reverse = 1.0 }
[optim]
warmup_steps = 2
"""


def begin(folder: Path, *options: str, processes: int = 1, resume: bool = False) -> subprocess.Popen[str]:
    """Start the run in `folder`; options are `name=value`."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    chosen = [word for option in (f'out="{folder}"', *options) for word in ("--set", option)]
    command = [sys.executable, *launcher, "-m", "pathlm", "train", str(folder / "recipe.toml"), *chosen, *(["--resume"] if resume else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=folder
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a run that must succeed; return what it said."""
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return said


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in found]
