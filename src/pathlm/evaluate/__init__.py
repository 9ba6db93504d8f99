"""Measuring models: text beside n-grams (`run`), synthetic tasks, multiple choice; records of what every token cost."""

from pathlm.evaluate.compare import run

__all__ = ["run"]
