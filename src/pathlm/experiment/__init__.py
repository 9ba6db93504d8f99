"""Tables of runs: one manifest names a recipe, rows of overrides and seeds; every row is trained, measured and compared."""

from pathlm.experiment.manifest import Experiment, read
from pathlm.experiment.runner import ExperimentResult, run

__all__ = ["Experiment", "ExperimentResult", "read", "run"]
