"""How fast rows of synthetic tasks are made on one core, as tokens a second of packed rows (padding counted as part of a row).

pathlm bench tasks                    every task, training split
pathlm bench tasks --split validation
"""

import time

from benchmarks.timing import arguments, show
from pathlm.text.mixture import TaskRows
from pathlm.text.synthetic import SPLITS, TASKS


def main(argv: list[str]) -> dict:
    """Measure every task in turns; each turn makes rows that were never made before."""
    parser = arguments(__doc__)
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=256, help="rows in a turn")
    options = parser.parse_args(argv)
    sources = {name: TaskRows({name: 1.0}, options.split, length=options.length, seed=0) for name in TASKS}
    seconds: dict[str, list[float]] = {name: [] for name in TASKS}
    padding = {}
    for turn in range(options.repeats + 1):
        for name, source in sources.items():
            begun = time.process_time()
            batch = source.batch(turn * options.rows, options.rows)
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - begun)
            padding[name] = float((batch["document_ids"] < 0).mean())
    tokens = options.rows * options.length
    rows = [
        {
            "task": name,
            "median tokens/s": tokens / sorted(runs)[len(runs) // 2],
            "lowest": tokens / max(runs),
            "padding": padding[name],
        }
        for name, runs in seconds.items()
    ]
    return show(f"rows of synthetic tasks, {options.split}, one core", rows, {}, options=options)
