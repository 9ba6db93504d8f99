"""Released BriLLM checkpoints as models of ours and back: the same numbers, each edge's matrix transposed, streamed from disk to disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from pathlm.config import build_strict
from pathlm.models import read_config, read_tokenizer
from pathlm.models.brillm.configuration import BrillmConfig
from pathlm.models.brillm.edges import Edges
from pathlm.models.brillm.mapped import SAFE_TYPES, Mapped
from pathlm.models.brillm.modeling import BrillmForCausalLM
from pathlm.models.brillm.released import Released, open_released, require_files

UNKNOWN = "<unk>"
FILES = ("model.bin", "vocab.json", "word_frequency.json")
"""What a released model is written as."""


def from_brillm(weights: Path | str, vocab: Path | str, word_frequency: Path | str) -> BrillmForCausalLM:
    """Return a released BriLLM, which computes what the released code does. Memory is that of the weights and a small part more.

    `weights` is a state dict of `weights` (rows, d, d), `biases` (rows, 1, d), `node_bias` (nodes, 1, d) and `positions` (1, P, 1); `vocab`
    a JSON object token → number; `word_frequency` a JSON object source → target → count of all pairs, which says whose the rows are.
    Raises `ValueError` naming the file and what is wrong in it or does not fit.
    """
    found = open_released(weights, vocab, word_frequency)
    with torch.device("meta"):
        model: Any = BrillmForCausalLM(_config(found))
    model = model.to(found.dtype).to_empty(device="cpu")
    graph = model.graph
    graph.set_edges(found.edges)
    with torch.no_grad():
        graph.node_bias.copy_(found.node_bias_VD)
        graph.position_weight.copy_(found.position_P)
        for parameter, slabs in ((graph.weight, found.weights()), (graph.bias, found.biases())):
            for first, slab in slabs:
                parameter[first : first + len(slab)] = slab
    found_model: BrillmForCausalLM = model.eval()
    return found_model


def import_released(
    weights: Path | str, vocab: Path | str, word_frequency: Path | str, out: Path | str, *, tokenizer: Path | str | None = None
) -> Path:
    """Write a released BriLLM to the new folder `out` as a model of ours with its tokenizer, and return `out`. No model is held in memory.

    A vocabulary of single characters and `<unk>` is its own tokenizer; for another one, `tokenizer` is the JSON file of its byte-level BPE.
    Raises `ValueError` as `from_brillm` does, and then leaves nothing behind.
    """
    folder = _new(out)
    if tokenizer is not None:
        require_files(tokenizer=tokenizer)  # the word frequencies take long
    found = open_released(weights, vocab, word_frequency)
    words = _tokenizer(found.vocabulary, tokenizer, vocab)
    config = _config(found, words.pad_token_id)
    with _whole(folder) as part:
        config.save_pretrained(part)
        GenerationConfig.from_model_config(config).save_pretrained(part)
        words.save_pretrained(str(part))
        _write_safetensors(part / "model.safetensors", _tensors(found))
    return folder


def export_released(folder: Path | str, out: Path | str) -> Path:
    """Write a model in `folder` to the new folder `out` in the released layout, and return `out`; what was imported has its bits again.

    Counts are not kept by a model: the word frequencies written are 1 for a pair with an edge of its own, and 0. Raises `ValueError` for a
    model that the released code would compute otherwise, and for one without a tokenizer.
    """
    target, place = _new(out), Path(folder)
    config = _exportable(place)
    if not (place / "tokenizer.json").is_file():
        raise ValueError(f"folder={str(folder)!r}: has no tokenizer.json, and so its nodes have no names")
    numbers = read_tokenizer(place).get_vocab()
    vocabulary = sorted(numbers, key=numbers.__getitem__)
    if [numbers[token] for token in vocabulary] != list(range(config.vocab_size)):
        raise ValueError(
            f"folder={str(folder)!r}: its tokenizer has {len(numbers)} tokens, must name the {config.vocab_size} nodes of its model"
        )
    with Mapped(place) as mapped, _whole(target) as part:
        tensors = mapped.tensors
        weight = torch.empty_like(tensors["graph.weight"])
        step = max(1, 2**26 // (config.signal_size**2 * weight.element_size()))
        for first in range(0, len(weight), step):
            weight[first : first + step] = tensors["graph.weight"][first : first + step].transpose(1, 2)
            mapped.release()
        state = {
            "weights": weight,
            "biases": tensors["graph.bias"][:, None],
            "node_bias": tensors["graph.node_bias"][:, None],
            "positions": tensors["graph.position_weight"][None, :, None],
        }
        torch.save({name: tensor.clone() if name != "weights" else tensor for name, tensor in state.items()}, part / FILES[0])
        table = {token: number for number, token in enumerate(vocabulary)}
        (part / FILES[1]).write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
        _write_frequency(part / FILES[2], vocabulary, Edges(tensors["graph.key"], tensors["graph.start"]))
    return target


def _config(found: Released, pad: int | None = None) -> BrillmConfig:
    config = build_strict(
        BrillmConfig,
        {
            "vocab_size": len(found.vocabulary),
            "signal_size": found.width,
            "edges": found.rows - 1,
            "arithmetic": "released",
            "positions": "multiplied",
            "trained_positions": found.position_P.numel(),
            "beyond": "continue",
            "pad_token_id": pad,
        },
    )
    config.architectures, config.dtype = ["BrillmForCausalLM"], found.dtype
    return config


def _tensors(found: Released) -> dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Iterable[Tensor]]]]:
    """Return our names for what a released model holds: types, shapes, and the values in pieces. Whole numbers first, as they need more."""
    nodes, width, rows, dtype = len(found.vocabulary), found.width, found.rows, found.dtype
    return {
        "graph.key": (torch.int64, (rows - 1,), lambda: [found.edges.key_E]),
        "graph.start": (torch.int64, (nodes + 1,), lambda: [found.edges.start_V1]),
        "graph.weight": (dtype, (rows, width, width), lambda: (slab for _, slab in found.weights())),
        "graph.bias": (dtype, (rows, width), lambda: (slab for _, slab in found.biases())),
        "graph.node_bias": (dtype, (nodes, width), lambda: [found.node_bias_VD]),
        "graph.position_weight": (dtype, (found.position_P.numel(),), lambda: [found.position_P]),
    }


def _write_safetensors(file: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[], Iterable[Tensor]]]]) -> None:
    """Write a safetensors file whose tensors come in pieces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {
            "dtype": next(text for text, kind in SAFE_TYPES.items() if kind == dtype),
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in tensors.values():
            for piece in pieces():
                out.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
        assert out.tell() == 8 + len(text) + end


def _write_frequency(file: Path, vocabulary: list[str], edges: Edges) -> None:
    with file.open("w", encoding="utf-8") as out:
        for source, name in enumerate(vocabulary):
            own = set(edges.targets(source).tolist())
            counts = {target: int(number in own) for number, target in enumerate(vocabulary)}
            before = "{" if source == 0 else ",\n"
            out.write(f"{before}{json.dumps(name, ensure_ascii=False)}: {json.dumps(counts, ensure_ascii=False)}")
        out.write("}")


def _tokenizer(vocabulary: tuple[str, ...], bpe: Path | str | None, vocab: Path | str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a vocabulary: characters, or the BPE in a file, whose tokens and numbers must be the vocabulary's."""
    if bpe is None:
        if strange := next((token for token in vocabulary if len(token) != 1 and token != UNKNOWN), None):
            raise ValueError(
                f"vocab={str(vocab)!r}: {strange!r} is no single character; give --tokenizer, the JSON file of its byte-level BPE"
            )
        if UNKNOWN not in vocabulary:
            raise ValueError(f"vocab={str(vocab)!r}: has no {UNKNOWN} for characters that it does not know")
        backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, unk_token=UNKNOWN)
    try:
        backend = Tokenizer.from_file(str(bpe))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer={str(bpe)!r}: is no tokenizer's JSON file ({error})") from None
    numbers = backend.get_vocab(with_added_tokens=True)
    if sorted(numbers, key=numbers.__getitem__) != list(vocabulary):
        strange = next((token for number, token in enumerate(vocabulary) if numbers.get(token) != number), None)
        said = f"{len(numbers)} tokens for {len(vocabulary)}" if strange is None else f"another number than the vocabulary for {strange!r}"
        raise ValueError(f"tokenizer={str(bpe)!r}: has {said}; it is not that of vocab={str(vocab)!r}")
    special = {name: token for name in ("pad", "unk", "cls", "sep", "mask") if (token := f"[{name.upper()}]") in numbers}
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _exportable(folder: Path) -> BrillmConfig:
    config = read_config(folder)
    if config.model_type != "brillm":
        raise ValueError(f"folder={str(folder)!r}: holds a {config.model_type} model; only a BriLLM has a released layout")
    released: dict[str, Any] = {"arithmetic": "released", "positions": "multiplied", "position_scale": 1.0, "initial_signal": None}
    for name, value in released.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: the released code computes {name}={value!r} only, so it cannot run this model"
            )
    return config


def _new(out: Path | str) -> Path:
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out={str(out)!r}: already holds something; name a new folder")
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write to that becomes `folder` at the end, and is removed where something fails."""
    part = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
