"""Loss of a routed model whose rows give way to codes made of its blocks' own weights, before any training.

`untrained.py CHECKPOINT CORPUS [TOKENS]` prints a row for every number of turned keys.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

from pathlm.models.brian.convert import start_from
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.text.corpus import Corpus

LENGTH = 256
WAYS = (
    {"memory": "canonical"},
    {"memory": "canonical", "code_adapter": "shared"},
    {"memory": "local+canonical", "local_window": 4},
    {"memory": "local+canonical", "local_window": 16},
)


def main(checkpoint: Path, folder: Path, tokens: int) -> None:
    """Print losses of the first tokens of the validation split, in rows of 256."""
    torch.set_num_threads(1)
    corpus = Corpus.open(folder, verify=False)
    row_BT = torch.tensor(corpus.tokens("validation")[:tokens].astype("int64")).view(-1, LENGTH)
    model = BrianForCausalLM.from_pretrained(checkpoint).eval()

    @torch.no_grad()
    def loss(**options: Any) -> float:
        config = copy.deepcopy(model.config)
        for name, value in options.items():
            setattr(config, name, value)
        if config.memory == "canonical":
            config.left_rows = "kept"
        return float(start_from(checkpoint, config).eval()(row_BT, labels=row_BT).loss)

    print("rows", round(loss(), 4))
    for keys in (1, 2, 4, 8, 16):
        print(keys, *(f"{way}: {loss(code_keys=keys, **way):.4f}" for way in WAYS), sep="\n  ", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 4096)
