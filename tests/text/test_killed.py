import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from texts import contents, sentences

from pathlm.text.corpus import Corpus


def run(texts: Path, out: Path, moment: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(texts), str(out), str(moment)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)


def kill_and_continue(texts: Path, tmp_path: Path, rounds: int, seed: int) -> None:
    (texts / "long.txt").write_text(sentences(1, 300), encoding="utf-8")
    whole = run(texts, tmp_path / "whole", 10**9)
    assert whole.returncode == 0, whole.stderr
    moments = int(whole.stdout)
    assert moments > 100
    wanted = contents(tmp_path / "whole")
    rng = random.Random(seed)
    left = rounds
    while left:
        out = tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        finished = False
        while left and not finished:
            result = run(texts, out, rng.randrange(1, moments))
            left -= 1
            finished = result.returncode == 0
            assert result.returncode in (0, -signal.SIGKILL), result.stderr
            if not finished and not (out / "manifest.json").exists():
                with pytest.raises(ValueError, match="not a prepared corpus"):
                    Corpus.open(out)
        result = run(texts, out, 10**9)
        assert result.returncode == 0, result.stderr
        assert contents(out) == wanted


def test_a_killed_prepare_continues_and_ends_byte_identical(texts: Path, tmp_path: Path) -> None:
    kill_and_continue(texts, tmp_path, rounds=4, seed=11)


@pytest.mark.slow
def test_a_prepare_killed_at_many_moments_ends_byte_identical(texts: Path, tmp_path: Path) -> None:
    kill_and_continue(texts, tmp_path, rounds=80, seed=5)


def test_continuing_with_other_settings_or_other_text_is_refused(texts: Path, tmp_path: Path) -> None:
    assert run(texts, tmp_path / "out", 60).returncode == -signal.SIGKILL
    from pathlm.text.prepare import prepare, prepare_config

    sources = [{"path": f"{texts}/**/*.txt", "share": 0.6, "label": "t"}, {"path": f"{texts}/*.jsonl", "share": 0.4, "label": "j"}]
    table = {"out": str(tmp_path / "out"), "sources": sources, "vocab_size": 300, "shard_tokens": 1500}
    with pytest.raises(ValueError, match="vocab_size was 300 and is now 310"):
        prepare(prepare_config(table | {"vocab_size": 310}))
    (texts / "story-01.txt").write_text("Changed meanwhile.")
    with pytest.raises(ValueError, match=r"'story-01\.txt' among them, since this preparation began"):
        prepare(prepare_config(table))
    assert prepare(prepare_config(table | {"overwrite": True})).tokens > 1000


def peak_megabytes(texts: Path, out: Path) -> float:
    program = (
        "import re, sys; from pathlib import Path; from pathlm.text.prepare import prepare, prepare_config;"
        "table = {'sources': [sys.argv[1]], 'out': sys.argv[2], 'vocab_size': 2000, 'tokenizer_sample_mb': 2, 'workers': 2};"
        "prepare(prepare_config(table));"
        # `ru_maxrss` would begin with the peak of the process that runs the tests.
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(texts), str(out)], capture_output=True, text=True, check=True)
    return float(result.stdout)


@pytest.mark.slow
def test_ten_times_the_text_needs_the_same_memory_in_many_documents_and_in_one(tmp_path: Path) -> None:
    piece = sentences(3, 20_000)
    for name, copies in (("small", 4), ("large", 40)):
        (tmp_path / name).mkdir()
        for number in range(copies // 2):
            (tmp_path / name / f"{number}.txt").write_text(f"{number} {piece}", encoding="utf-8")
        with (tmp_path / name / "long.txt").open("w", encoding="utf-8") as out:
            out.writelines(f"{number}: {piece}" for number in range(copies // 2))
    small, large = (peak_megabytes(tmp_path / name, tmp_path / f"{name}-out") for name in ("small", "large"))
    assert large < 1.1 * small + 10 and large < 700
