"""Measurements behind `pathlm bench NAME`: each module here has `main(argv) -> dict`."""
