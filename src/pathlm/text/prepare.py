"""`pathlm prepare`: from sources of text to a folder of token shards with a manifest, the same bytes on every machine, resumable."""

import importlib.metadata
import json
import math
import os
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from pathlm.config import find_recipe, override, shipped_recipes, with_options
from pathlm.text import assemble, corpora
from pathlm.text import tokenizers as tk
from pathlm.text.collect import Report, collect
from pathlm.text.corpus import Corpus
from pathlm.text.encode import encode, spooled_text
from pathlm.text.journal import Busy, Journal
from pathlm.text.manifest import FILE, FORMAT, Manifest
from pathlm.text.shards import dtype_for
from pathlm.text.sources import SourceConfig, fingerprint, parse_source, source_from

__all__ = ["PrepareConfig", "from_arguments", "load_recipe", "parse_source", "prepare", "prepare_config"]

_SAMPLE_PART = 16 << 10
_SETTINGS_LEFT_OUT = {"out", "workers", "overwrite", "cache"}


@strict
@dataclass(kw_only=True)
class PrepareConfig:
    """One preparation: which sources, which tokenizer, which splits, and where the result goes."""

    out: str
    """Folder of the prepared corpus."""
    sources: list[SourceConfig] = field(default_factory=list)
    tokenizer: str = "bpe"
    """`bpe` (byte-level) and `characters` are trained on the train split; anything else is a Hugging Face tokenizer's folder or name."""
    vocab_size: int = 8192
    """Of a trained tokenizer, special tokens included."""
    tokenizer_sample_mb: float = 32.0
    """A tokenizer is trained on at most so many megabytes of the train split, a fixed sample of documents."""
    validation: float = 0.05
    """Share of documents in the validation split."""
    test: float = 0.05
    """Share of documents in the test split."""
    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    shard_tokens: int = 1 << 26
    """Tokens per shard file."""
    workers: int = 0
    """Threads that encode; 0 means one per core. The result does not depend on it."""
    cache: str | None = None
    """Where fetched corpora are kept; `PATHLM_CACHE` or `~/.cache/pathlm` when absent."""
    overwrite: bool = False
    """Replace a corpus that was prepared with other settings."""

    def validate_prepare(self) -> None:
        """Refuse what cannot be prepared, before any work."""
        titles = [source.title for source in self.sources]
        shares = [source.share for source in self.sources]
        smallest = tk.SMALLEST_BPE if self.tokenizer == "bpe" else 4
        _require(bool(self.sources), "sources", self.sources, "name at least one")
        _require(len(set(titles)) == len(titles), "sources", titles, "two sources have one name; give one of them a label")
        _require(None not in shares or not any(shares), "share", shares, "either every source declares a share or none does")
        _require(bool(self.out), "out", self.out, "must name a folder")
        _require(bool(self.tokenizer), "tokenizer", self.tokenizer, "must be bpe, characters, or a tokenizer's folder or name")
        _require(self.vocab_size >= smallest, "vocab_size", self.vocab_size, f"tokenizer = {self.tokenizer!r} needs at least {smallest}")
        _require(self.tokenizer_sample_mb > 0, "tokenizer_sample_mb", self.tokenizer_sample_mb, "must be positive")
        _require(self.validation >= 0, "validation", self.validation, "must not be negative")
        _require(self.test >= 0, "test", self.test, "must not be negative")
        _require(self.validation + self.test < 1, "validation", self.validation, f"must leave text for training beside test={self.test}")
        _require(self.shard_tokens >= 1, "shard_tokens", self.shard_tokens, "must be at least 1")
        _require(self.workers >= 0, "workers", self.workers, "must not be negative")
        if self.tokenizer in ("bpe", "characters"):
            dtype_for(self.vocab_size, self.dtype)

    def settings(self) -> dict[str, Any]:
        """Return the fields that decide the content, as plain values."""
        table = {name: value for name, value in asdict(self).items() if name not in _SETTINGS_LEFT_OUT}
        return table | {"format": FORMAT}


def prepare_config(table: Mapping[str, Any]) -> PrepareConfig:
    """Build a `PrepareConfig` from plain values. `sources` lists words such as `sotu=0.7` or tables with the fields of `SourceConfig`."""
    sources = table.get("sources", [])
    if isinstance(sources, str | Mapping) or not isinstance(sources, Sequence):
        raise ValueError(f"sources={sources!r}: must be a list")
    floats = {name: float(table[name]) for name in ("tokenizer_sample_mb", "validation", "test") if type(table.get(name)) is int}
    return with_options(PrepareConfig, {**table, **floats, "sources": [source_from(value) for value in sources]})


def load_recipe(recipe: Path | str, **overrides: Any) -> PrepareConfig:
    """Read a TOML recipe; keyword arguments that are not None replace its fields. `out` defaults to `data/<name of the recipe>`."""
    return prepare_config(_read_recipe(Path(recipe)) | {name: value for name, value in overrides.items() if value is not None})


def _read_recipe(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from error
    table.setdefault("out", f"data/{file.stem.removeprefix('data-')}")
    return table


def from_arguments(sources: Sequence[str], overrides: Sequence[str] = (), **options: Any) -> PrepareConfig:
    """Return what the words of a command mean: one recipe (a TOML file, or the name of a shipped one), or sources.

    `options` that are not None, then `overrides` such as `test=0.1`, replace fields. Raises `ValueError` for what is unknown.
    """
    recipe = len(sources) == 1 and (sources[0].endswith(".toml") or sources[0] in shipped_recipes())
    table = _read_recipe(find_recipe(sources[0])) if recipe else {"sources": list(sources)}
    table |= {name: value for name, value in options.items() if value is not None}
    for text in overrides:
        override(table, text)
    if "out" not in table:
        raise ValueError("out: name the folder to write, for example --out data/mine")
    return prepare_config(table)


def prepare(config: PrepareConfig, *, progress: Any = None) -> Manifest:
    """Write the corpus that `config` describes into `config.out`, or continue, or return at once when it is already there.

    `progress` is None, a callable `(phase, done_bytes, total_bytes_or_None)`, or a `rich.progress.Progress`. The files depend on the
    text and the settings only, not on the machine, the number of workers, or how often the work was interrupted. Memory use does not
    grow with the amount of text. Sources with shares are mixed as `pathlm.text.assemble.choose` explains.

    Raises `ValueError` naming the file, field or setting for everything that cannot be prepared.
    """
    out = Path(config.out)
    report = _reporter(progress)
    pretrained = None if config.tokenizer in ("bpe", "characters") else tk.load_pretrained(config.tokenizer)
    settings = config.settings() | ({"tokenizer_digest": pretrained.digest} if pretrained else {})
    if pretrained:
        dtype_for(pretrained.vocab_size, config.dtype)
        settings.pop("vocab_size")
    inputs = json.loads(json.dumps([fingerprint(source) for source in config.sources]))
    finished = _enter(out, settings, inputs, overwrite=config.overwrite)
    if finished is not None:
        return finished
    fresh = not out.exists()
    journal = _journal(out, settings, inputs, overwrite=config.overwrite)
    try:
        manifest = _run(config, journal, pretrained, settings, inputs, report)
    except Exception:
        if journal.is_empty():  # nothing to go on from
            journal.close()
            shutil.rmtree(out if fresh else out / ".work")
        raise
    finally:
        journal.close()
    shutil.rmtree(out / ".work")
    return manifest


def _run(
    config: PrepareConfig, journal: Journal, pretrained: tk.Encoder | None, settings: dict[str, Any], inputs: Any, report: Report
) -> Manifest:
    """Do what is left of the three passes, and put the manifest in place last."""
    out = Path(config.out)
    work = out / ".work"
    spool, tokens = work / "text.bin", work / "tokens.bin"
    cache = Path(config.cache) if config.cache else corpora.default_cache()
    collect(config.sources, journal, spool, fractions=(config.validation, config.test), cache=cache, report=report)
    encoder = _tokenizer(config, journal, work, pretrained, report)
    dtype = dtype_for(encoder.vocab_size, config.dtype)
    encode(journal, spool, tokens, encoder, dtype=dtype, workers=config.workers or _cores(), report=report)
    splits, sources = assemble.write_all(
        journal, tokens, out, sources=config.sources, dtype=dtype, shard_tokens=config.shard_tokens, report=report
    )
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    shutil.copytree(work / "tokenizer", out / "tokenizer")
    files = [assemble.describe_file(out, file) for file in sorted((out / "tokenizer").iterdir())]
    ids = {"bos": encoder.bos, "eos": encoder.eos, "pad": encoder.pad}
    tokenizer = {"kind": encoder.kind, "digest": encoder.digest, "vocab_size": encoder.vocab_size, "files": files} | ids
    made_with = {name: importlib.metadata.version(name) for name in ("pathlm", "tokenizers")}
    manifest = Manifest(
        settings=settings, tokenizer=tokenizer, dtype=dtype, splits=splits, sources=sources, made_with=made_with, folder=out
    )
    (out / "inputs.json").write_text(json.dumps(inputs) + "\n", encoding="utf-8")
    manifest.write(out)
    return manifest


def _enter(out: Path, settings: dict[str, Any], inputs: Any, *, overwrite: bool) -> Manifest | None:
    """Return the manifest of a finished identical corpus; refuse or clear a folder that holds something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file, not a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if not (out / FILE).exists() and not (out / ".work").exists():
        raise ValueError(f"out={str(out)!r}: holds files that prepare did not write; name an empty or a new folder")
    if not (out / FILE).exists():
        return None
    try:
        manifest = Manifest.read(out)
        _refuse_differences(out, manifest.settings, settings)
        _refuse_changed_inputs(out, inputs)
        Corpus.open(out, verify=overwrite)  # a damaged corpus is not a finished one
    except ValueError:
        if not overwrite:
            raise
        assemble.remove_corpus(out)
        return None
    shutil.rmtree(out / ".work", ignore_errors=True)
    return manifest


def _journal(out: Path, settings: dict[str, Any], inputs: Any, *, overwrite: bool) -> Journal:
    """Open the journal of this job. One with other settings or inputs is refused, or cleared with `overwrite`."""
    (out / ".work").mkdir(parents=True, exist_ok=True)
    journal = None
    try:
        journal = Journal(out / ".work" / "journal.sqlite")
        if journal.get("settings") is not None and journal.is_empty():
            # An attempt that failed before its first document holds nothing to protect.
            journal.close()
            shutil.rmtree(out / ".work")
            return _journal(out, settings, inputs, overwrite=overwrite)
        _refuse_differences(out, journal.get("settings", settings), settings)
        if (listed := journal.get("inputs", inputs)) != inputs:
            raise ValueError(f"{out}: {_changed(listed, inputs)} since this preparation began; start again with overwrite")
    except Busy:
        raise
    except ValueError:
        if journal is not None:
            journal.close()
        if not overwrite:
            raise
        assemble.remove_corpus(out)
        return _journal(out, settings, inputs, overwrite=False)
    journal.set(settings=settings, inputs=inputs)
    journal.commit()
    return journal


def _refuse_differences(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(now))
    names = [name for name in sorted({*before, *plain}) if before.get(name) != plain.get(name)]
    if names:
        what = "; ".join(f"{name} was {_brief(before.get(name))} and is now {_brief(plain.get(name))}" for name in names)
        raise ValueError(f"{out} was prepared with other settings: {what}. Name another folder, or prepare with overwrite")


def _brief(value: Any) -> str:
    """Show a setting without the fields of its sources that are empty."""
    if isinstance(value, list):
        value = [{k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item for item in value]
    return json.dumps(value, ensure_ascii=False)


def _refuse_changed_inputs(out: Path, inputs: Any) -> None:
    file = out / "inputs.json"
    if file.exists() and (before := json.loads(file.read_text(encoding="utf-8"))) != inputs:
        raise ValueError(f"{out}: {_changed(before, inputs)} since it was prepared; name another folder, or prepare with overwrite")


def _changed(before: Any, now: Any) -> str:
    """Name the first input file that differs."""
    old, new = ({row[0]: row for source in listing for row in source} for listing in (before, now))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return f"{len(names)} input file(s) changed, {names[0]!r} among them," if names else "the list of input files changed"


def _tokenizer(config: PrepareConfig, journal: Journal, work: Path, pretrained: tk.Encoder | None, report: Report) -> tk.Encoder:
    """Open the tokenizer of this job, training and saving it first where needed."""
    folder, part = work / "tokenizer", work / "tokenizer.part"
    if not folder.exists():
        encoder = pretrained
        if encoder is None:
            texts = _sample(config, journal, work / "text.bin", report)
            encoder = (tk.train_bpe if config.tokenizer == "bpe" else tk.train_characters)(texts, config.vocab_size)
        shutil.rmtree(part, ignore_errors=True)
        encoder.save(part)
        part.replace(folder)
    return pretrained or tk.open_trained(folder, config.tokenizer)


def _sample(config: PrepareConfig, journal: Journal, spool: Path, report: Report) -> Iterator[str]:
    """Yield train text up to the cap: per source, the documents with the smallest text hashes.

    Sources with shares contribute by share, all others by their size.
    """
    held = {source: size for source, split, _, size, _ in journal.totals() if split == "train"}
    cap = min(config.tokenizer_sample_mb * 1e6, sum(held.values()))
    shares = {number: held[number] / sum(held.values()) for number in held}
    if config.sources[0].share is not None:
        shares = {number: share for number, share in enumerate(assemble.normalised(config.sources)) if number in held}
        cap = min([cap, *(held[number] / share for number, share in shares.items())])
    done, total = 0, math.ceil(cap)
    anywhere = config.tokenizer == "characters"
    with spool.open("rb") as text:
        for number, share in shares.items():
            left = math.ceil(share * cap)
            for document, _ in journal.by_content(number):
                yield from tk.cut(spooled_text(text, document, limit=left), _SAMPLE_PART, anywhere=anywhere)
                done, left = done + min(left, document.bytes), left - document.bytes
                report("tokenizer", min(done, total), total)
                if left <= 0:
                    break


def _cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _reporter(progress: Any) -> Report:
    """Turn None, a callable or a rich progress bar into a callable."""
    if progress is None:
        return lambda phase, done, total: None
    if callable(progress):
        return progress
    from pathlm.text.progress import rich_reporter

    return rich_reporter(progress)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")
