"""How fast the command line answers: wall time of `pathlm --help`, beside a bare Python and beside importing torch."""

import subprocess
import sys

from benchmarks.timing import arguments, interleaved, ratio, show

HELP = """
import sys
from pathlm.cli import app
app(["--help"], prog_name="pathlm", standalone_mode=False)
assert "torch" not in sys.modules
"""


def main(argv: list[str]) -> dict:
    """Time `--help` in fresh processes; fails when the help page imports torch."""
    options = arguments(__doc__).parse_args(argv)
    programs = {"bare python": "pass", "pathlm --help": HELP, "import torch": "import torch"}

    def fresh(program: str):
        return lambda: subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)

    seconds = interleaved({name: fresh(program) for name, program in programs.items()}, repeats=options.repeats)
    rows = [{"command": name, "median s": sorted(times)[len(times) // 2], "worst s": max(times)} for name, times in seconds.items()]
    ratios = {"pathlm --help ÷ import torch": ratio(seconds["pathlm --help"], seconds["import torch"])}
    return show("pathlm --help in a fresh process", rows, ratios, options=options)
