"""Prepare a folder, and kill this process without warning at the n-th moment at which something has just been written."""

import os
import signal
import sys
from pathlib import Path

from pathlm.text import collect, encode, journal, prepare


def main(texts: str, out: str, moment: int) -> None:
    left = [moment]

    def step(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(function):  # type: ignore[no-untyped-def]
        def wrapped(*args, **options):  # type: ignore[no-untyped-def]
            step()
            result = function(*args, **options)
            step()
            return result

        return wrapped

    collect.COMMIT_BYTES, collect.COMMIT_DOCUMENTS, encode.COMMIT_BYTES, encode.TASK_BYTES, encode.PART_CHARACTERS = (
        4000,
        9,
        3000,
        1000,
        700,
    )
    os.fsync = after(os.fsync)
    Path.replace = after(Path.replace)  # type: ignore[method-assign]
    journal.Journal.commit = after(journal.Journal.commit)  # type: ignore[method-assign]
    prepare.shutil.rmtree = after(prepare.shutil.rmtree)
    prepare.tk.Encoder.save = after(prepare.tk.Encoder.save)  # type: ignore[method-assign]
    table = {"out": out, "sources": [f"{texts}/*.txt=0.6", f"{texts}/*.jsonl=0.4"], "vocab_size": 300, "workers": 2, "shard_tokens": 1500}
    table["sources"] = [{"path": f"{texts}/**/*.txt", "share": 0.6, "label": "t"}, {"path": f"{texts}/*.jsonl", "share": 0.4, "label": "j"}]
    prepare.prepare(prepare.prepare_config(table), progress=step)
    print(moment - left[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
