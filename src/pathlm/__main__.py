"""`python -m pathlm` is `pathlm`."""

from pathlm.cli import app

app(prog_name="pathlm")
