"""`pathlm bench branches` runs, and counts more blocks and more memory for more branches."""

import sys
from pathlib import Path

from pathlm.bench import bench

sys.path.insert(0, str(Path(__file__).parents[1]))


def test_more_branches_run_more_blocks():
    found = bench("branches", ["--tiny", "--repeats", "1", "--threads", "1", "--branches", "2", "--rows", "2"])
    rows = {row["case"]: row for row in found["rows"]}
    assert len(rows) == 8
    for memory in ("local", "canonical"):
        one, two = (rows[f"training step, {memory}, {name}"] for name in ("1 branch", "2 branches"))
        assert one["blocks/token"] == 12 and 12 < two["blocks/token"] <= 20
        assert 0 < one["kept MB"] < two["kept MB"]
        assert rows[f"reading, {memory}, 2 branches"]["kept MB"] == 0
