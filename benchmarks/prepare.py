"""How fast `pathlm prepare` is, beside the bare tokenizers library, and how much memory it needs as the text grows.

    pathlm bench prepare                                   speed, and memory at 1 and 10 times the text
    pathlm bench prepare --megabytes 100 --repeats 1       the same at 100 MB and 1 GB
    pathlm bench prepare --corpus songci                   Chinese

Both sides turn the same text into tokens with the same vocabulary and the same number of threads, each in a fresh process. The library's
side is one `Tokenizer.encode_batch` over texts that are already in memory. Ours is the whole preparation with a ready tokenizer: reading
and checking the files, dropping repeats, choosing splits, encoding, hashing, writing. Imports are outside the clock on both sides. The
text is a named corpus, repeated with its sentences in another order and 1 % of its words replaced by new ones.
"""

import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import Ratio, arguments, ratio, show


def main(argv: list[str]) -> dict:
    """Measure megabytes a second of both sides in turns, and peak resident memory of prepare at 1 and 10 times the text."""
    parser = arguments(__doc__)
    parser.set_defaults(repeats=3)
    parser.add_argument("--corpus", default="sotu", help="named corpus that the text is made from")
    parser.add_argument("--megabytes", type=float, default=24.0, help="size of the text")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads on both sides")
    parser.add_argument("--no-memory", action="store_true", help="skip the run on 10 times the text")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pathlm-bench-") as scratch:
        folder = Path(scratch)
        sizes = {"1×": options.megabytes} | ({} if options.no_memory else {"10×": 10 * options.megabytes})
        bytes_ = {name: write_text(options.corpus, folder / name, megabytes) for name, megabytes in sizes.items()}
        tokenizer = train(folder, options.vocab_size)
        ours: list[dict[str, float]] = []
        theirs: list[dict[str, float]] = []
        for turn in range(options.repeats):
            for side in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
                name = "prepare" if side is ours else "encode_batch"
                side.append(child(name, folder / "1×", tokenizer, folder / "out", options.workers))
        rows = [_row("encode_batch, 1×", theirs, bytes_["1×"]), _row("prepare, 1×", ours, bytes_["1×"])]
        ratios = {"prepare ÷ encode_batch, MB/s": ratio([run["seconds"] for run in theirs], [run["seconds"] for run in ours])}
        if not options.no_memory:
            large = [child("prepare", folder / "10×", tokenizer, folder / "out", options.workers)]
            rows.append(_row("prepare, 10×", large, bytes_["10×"]))
            growth = large[0]["peak_mb"] / statistics.median(run["peak_mb"] for run in ours)
            ratios["peak resident memory, 10× ÷ 1× the text"] = Ratio(growth, growth, growth)
    title = f"prepare, {options.corpus}, {bytes_['1×'] / 1e6:.0f} MB, vocabulary {options.vocab_size}, {options.workers} threads"
    return show(title, rows, ratios, options=options)


def _row(case: str, runs: list[dict[str, float]], size: int) -> dict[str, Any]:
    seconds = statistics.median(run["seconds"] for run in runs)
    peak = max(run["peak_mb"] for run in runs)
    return {"case": case, "text MB": size / 1e6, "median s": seconds, "MB/s": size / 1e6 / seconds, "peak resident MB": peak}


def write_text(corpus: str, folder: Path, megabytes: float) -> int:
    """Write at least so much text made from a named corpus as JSON lines; return its size in UTF-8 bytes, without the JSON around it."""
    from pathlm.text.corpora import default_cache
    from pathlm.text.sources import SourceConfig, read

    originals = [b"".join(d.pieces).decode() for d in read(SourceConfig(name=corpus), cache=default_cache())]
    folder.mkdir()
    rng, size = random.Random(0), 0
    with (folder / "text.jsonl").open("w", encoding="utf-8") as out:
        while size < megabytes * 1e6:
            for original in originals:
                sentences = re.findall(r"[^.。!?\n]*[.。!?\n]*", original)
                rng.shuffle(sentences)
                words = " ".join(sentences).split(" ")
                for place in rng.sample(range(len(words)), len(words) // 100):
                    words[place] = "".join(rng.choices("etaoinshrdlu", k=rng.randrange(3, 9)))
                text = " ".join(words)
                size += out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n") and len(text.encode())
    return size


def train(folder: Path, vocab_size: int) -> Path:
    """Train the byte-level BPE that both sides use."""
    from pathlm.text.tokenizers import train_bpe

    with (folder / "1×" / "text.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(200), lines, strict=False)]
    train_bpe(texts, vocab_size).save(folder / "tokenizer")
    return folder / "tokenizer"


def child(side: str, text: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, float]:
    """Run one side in a fresh process; return its seconds and its peak resident memory."""
    command = [sys.executable, "-m", "benchmarks.prepare", side, str(text), str(tokenizer), str(out), str(workers)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    shutil.rmtree(out, ignore_errors=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


def _prepare(text: Path, tokenizer: Path, out: Path, workers: int) -> float:
    import pyarrow.parquet  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    from pathlm.text.prepare import prepare, prepare_config

    config = prepare_config({"out": str(out), "sources": [str(text)], "tokenizer": str(tokenizer), "workers": workers})
    start = time.perf_counter()
    prepare(config)
    return time.perf_counter() - start


def _encode_batch(text: Path, tokenizer: Path) -> float:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    with (text / "text.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    start = time.perf_counter()
    backend.encode_batch(texts, add_special_tokens=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    side_, text_, tokenizer_, out_, workers_ = sys.argv[1:]
    if side_ == "prepare":
        elapsed = _prepare(Path(text_), Path(tokenizer_), Path(out_), int(workers_))
    else:
        elapsed = _encode_batch(Path(text_), Path(tokenizer_))
    print(json.dumps({"seconds": elapsed, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
