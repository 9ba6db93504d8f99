"""Whether every row of a manifest can be trained, asked before the first one is: models, data, weights to begin with, folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

from pathlm.evaluate.lm import choose, reach
from pathlm.experiment import notes
from pathlm.experiment.manifest import EVALUATED, Experiment, Run
from pathlm.experiment.measure import parameters
from pathlm.models import family
from pathlm.text.corpus import Corpus
from pathlm.train import record
from pathlm.train.run import Job, existing, find_init, resolve


@dataclass(frozen=True)
class Plan:
    """What would be done for one run."""

    run: Run
    progress: notes.Progress
    parameters: int | None
    """None where only the data tell, such as the edges of a graph."""


def check(experiment: Experiment, chosen: Sequence[Run]) -> list[Plan]:
    """Check all rows of an experiment, and the folders of the `chosen` runs; return what there is to do for these.

    Raises `ValueError` naming the file, the row, the field, its value and the rule.
    """
    jobs: dict[str, Job] = {}
    for run in experiment.runs:
        if run.row.name not in jobs:  # seeds differ in their seed alone
            try:
                jobs[run.row.name] = _job(run, jobs)
                _check_evaluation(experiment, run, jobs[run.row.name])
            except ValueError as error:
                raise ValueError(f"{experiment.place}: row {run.row.name!r}: {error}") from error
    for run in chosen:
        try:
            _check_folder(run, jobs[run.row.name])
        except ValueError as error:
            said = str(error).removeprefix("--resume: ")
            raise ValueError(f"{experiment.place}: {run.title}: {said}. Or remove {run.config.folder}.") from error
    counts = {name: parameters(job.model_config) for name, job in jobs.items()}
    return [Plan(run, notes.progress(run, experiment), counts[run.row.name]) for run in chosen]


def _job(run: Run, jobs: Mapping[str, Job]) -> Job:
    """Resolve a run's configuration, and compare the weights it will begin with, which need not be there yet."""
    if run.before is None:
        return resolve(run.config, verify=False)
    job, theirs = resolve(replace(run.config, init=None), verify=False), jobs[run.before.row.name]
    origin = f"from={run.row.origin!r}"
    mine, its = job.model_config.model_type, theirs.model_config.model_type
    if mine != its:
        raise ValueError(f"preset={run.config.preset!r}: a {mine} model cannot begin with the weights of {origin}, a {its} model")
    family(mine).check_start(theirs.model_config, job.model_config, origin=origin)
    if job.rows.tokenizer().get_vocab() != theirs.rows.tokenizer().get_vocab():
        raise ValueError(f"data.corpus={run.config.data.corpus!r}: {origin} was trained on tokens of another tokenizer")
    return job


def _check_evaluation(experiment: Experiment, run: Run, job: Job) -> None:
    if not experiment.evaluates:
        return
    if run.config.data.corpus is None:
        asked = next(name for name in experiment.columns if name in EVALUATED)
        raise ValueError(f"data.corpus=None: the metric {asked} is measured on documents; ask for validation/loss, or name a corpus")
    how = experiment.evaluation
    corpus = Corpus.open(run.config.data.corpus, verify=False)
    if how.split not in corpus.splits:
        raise ValueError(f"evaluation.split={how.split!r}: {corpus.folder} has {', '.join(corpus.splits)}")
    choose(corpus, how.split, max_documents=how.max_documents, max_tokens=how.max_tokens)
    reach(SimpleNamespace(config=job.model_config), how.context or run.config.data.length, how.stride)


def _check_folder(run: Run, job: Job) -> None:
    """Refuse to go on with a folder that holds another run."""
    file = run.config.folder / "run.json"
    init = job.init
    if run.before is not None and file.is_file():
        try:
            init = find_init(run.config)
        except ValueError:  # the row it begins from is not there any more; the trainer looks again when it is
            init = record.read(file).get("init")
    new = record.describe(run.config, job.model_config, device="", processes=1, init=init)
    existing(run.config, job, new, resume=True)
