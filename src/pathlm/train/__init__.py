"""Training: one loop for every family, resumable bit for bit, on one or several processes."""

from pathlm.train.loop import RunResult
from pathlm.train.run import start

__all__ = ["RunResult", "start"]
