"""A corpus held in arrays, with the interface of `pathlm.text.corpus.Corpus`, and models small enough to check by hand."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Record:
    number: int
    id: str
    start: int
    tokens: int
    bytes: int


class ArrayCorpus:
    """Documents given as lists of tokens per split; each is said to have three bytes of text per token."""

    folder = Path("arrays")

    def __init__(self, **splits):
        self.data = {split: [np.asarray(document, dtype=np.int64) for document in documents] for split, documents in splits.items()}
        self.splits = tuple(splits)
        self.manifest = {"digest": "a" * 64}

    def documents(self, split):
        starts = np.cumsum([0, *map(len, self.data[split])])
        return [
            Record(n, f"{split}-{n}", int(start), len(tokens), 3 * len(tokens))
            for n, (start, tokens) in enumerate(zip(starts, self.data[split], strict=False))
        ]

    def document_tokens(self, split, index):
        return self.data[split][index]

    def tokens(self, split):
        return np.concatenate(self.data[split])


class Letters:
    """A tokenizer whose every token is a word of its own."""

    all_special_ids = (0,)

    def decode(self, ids):
        return f" {ids[0]}"

    def convert_ids_to_tokens(self, token):
        return str(token)


def random_documents(lengths, *, vocab=40, seed=0):
    draw = np.random.default_rng(seed)
    return [[0, *draw.integers(1, vocab, size=length).tolist(), 0] for length in lengths]


def make_llama(*, vocab=40, context=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=context, bos_token_id=0, eos_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()
