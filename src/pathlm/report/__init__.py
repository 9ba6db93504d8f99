"""`pathlm report`: one page, in one file, of what runs wrote into their folders. Imports no torch."""

from pathlm.report.page import Written, report

__all__ = ["Written", "report"]
