"""The numbers of one trained run that its log does not hold."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from pathlm.evaluate import run as evaluate
from pathlm.evaluate.checkpoint import find_checkpoint
from pathlm.experiment.manifest import Experiment, Run
from pathlm.models import family


def measured(run: Run, experiment: Experiment) -> dict[str, Any]:
    """Measure a trained run at the checkpoint that `pathlm eval` takes: its best, else its latest."""
    place = find_checkpoint(run.config.folder)
    model_config: Any = AutoConfig.from_pretrained(place)
    size = parameters(model_config)
    found: dict[str, Any] = {"checkpoint": place.name, "step": int(place.name.removeprefix("step-")), "parameters": size}
    if experiment.evaluates:
        result = evaluate(run.config.folder, order=0, **vars(experiment.evaluation))
        found |= {name: result["model"][name] for name in ("loss", "bits_per_byte", "tokens", "documents")}
        if result["routes"] is not None:
            found["block_evaluations"] = result["routes"]["block_evaluations"]
        elif model_config.model_type == "brian":
            found["block_evaluations"] = float(model_config.num_hidden_layers)
    return found


def parameters(model_config: Any) -> int | None:
    """Count a model's parameters without building it; None for a graph whose edges have not been counted."""
    package = family(model_config.model_type)
    if any(getattr(model_config, name) == still_open for name, still_open in package.FROM_DATA.items()):
        return None
    with torch.device("meta"):
        return sum(p.numel() for p in package.Model(model_config).parameters())
