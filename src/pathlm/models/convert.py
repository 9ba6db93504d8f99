"""The body of `pathlm convert`: from other makers' models to ours and back, whichever family they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def convert(
    places: Sequence[Path | str],
    *,
    to: Literal["brian", "llama", "released"] = "brian",
    wrap_as: str | None = None,
    tokenizer: Path | str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Convert a model and return the folder written.

    `places` are a folder and a new folder, or `"brillm"`, the three files of a released BriLLM (weights, vocabulary, word frequencies) and
    a new folder. `to="released"` writes a BriLLM with the released arithmetic as those three files; the other options are those of
    `pathlm.models.brian.convert.convert` and `pathlm.models.brillm.convert.import_released`, and are refused where they say nothing.
    """
    if to not in ("brian", "llama", "released"):
        raise ValueError(f"to={to!r}: must be brian, llama or released")
    released = len(places) == 5 and str(places[0]) == "brillm"
    if len(places) != 2 and not released:
        rule = "must be FOLDER OUT, or brillm WEIGHTS VOCAB FREQUENCY OUT for the files of a released BriLLM"
        raise ValueError(f"{' '.join(map(str, places)) or 'nothing'}: {rule}")
    given = {"--to": None if to == "brian" else to, "--wrap": wrap_as, "--set": next(iter(overrides), None)}
    if released or to == "released":
        for name, value in given.items():
            if value is not None and (name, value) != ("--to", "released" if not released else None):
                raise ValueError(f"{name} {value}: a released BriLLM is converted as it is; leave it out")
    if tokenizer is not None and not released:
        raise ValueError(f"--tokenizer {tokenizer}: goes with brillm WEIGHTS VOCAB FREQUENCY OUT; a folder brings its own")
    if released:
        from pathlm.models.brillm.convert import import_released

        return import_released(*places[1:], tokenizer=tokenizer)
    from pathlm.models.brian.convert import checkpoint_in
    from pathlm.models.brian.convert import convert as convert_llama

    folder, out = places
    if to == "released":
        from pathlm.models.brillm.convert import export_released

        return export_released(checkpoint_in(Path(folder)), out)
    return convert_llama(folder, out, to=to, wrap_as=wrap_as, overrides=overrides)
