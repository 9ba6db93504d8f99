import random
from collections.abc import Callable
from pathlib import Path

from pathlm.text.corpus import Corpus

Build = Callable[..., Corpus]
PHRASE = "the river of may bears no grain, and every miller's wheel stands still; 42 sacks remain. 水 流 山 高 月 小 naïve café — end"
WORDS = PHRASE.split()


def sentences(seed: int, count: int) -> str:
    """Return reproducible text with punctuation, digits, Chinese, accents and line breaks."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        words = [rng.choice(WORDS) + (str(rng.randrange(10**6)) if rng.random() < 0.1 else "") for _ in range(rng.randrange(3, 14))]
        lines.append(" ".join(words).capitalize() + rng.choice([".", "!", "。", " …"]))
    return "\n".join(lines) + "\n" * rng.randrange(3)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a corpus that describes its content, by name."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file() and f.name != "inputs.json"}
