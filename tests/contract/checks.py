"""The contract itself: what must hold for every family and option. Each check raises AssertionError when the model breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import LENGTH, ids
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def equal(mine: Tensor, theirs: Tensor) -> None:
    """Logits agree to 1e-10 in float64, to 1e-4 in float32."""
    assert mine.shape == theirs.shape and mine.isfinite().all()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[mine.dtype])


def routes(output: Any) -> Tensor:
    """The blocks of every token (B, T, S): those visited first at each step, then those visited beside them, 0 for none.

    Of a signal, the edge that led to each token and the node that it would have gone to next.
    """
    trace = output.trace
    if hasattr(trace, "row_BT"):
        return torch.stack((trace.row_BT, trace.node_BTK[..., 0]), dim=-1)
    second = getattr(trace, "second_BTR", None)
    return trace.block_BTS if second is None else torch.cat((trace.block_BTS, second), dim=-1)


def same(mine: Tensor, theirs: Tensor) -> None:
    """Routes are identical, token by token."""
    assert mine.shape == theirs.shape and torch.equal(mine, theirs), f"{(mine != theirs).any(-1).sum()} tokens took another route"


@torch.no_grad()
def decode(model: Any, tokens: Tensor, chunks: Sequence[int], **masks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and routes of reading `tokens` in chunks with a memory; masks cover all that was read so far."""
    memory, start, logits, paths = None, 0, [], []
    for size in chunks:
        stop = start + size
        seen = {name: mask[:, :stop] for name, mask in masks.items()}
        out = model(tokens[:, start:stop], past_key_values=memory, use_cache=True, trace=True, **seen)
        assert out.past_key_values.get_seq_length() == stop
        memory, start = out.past_key_values, stop
        logits.append(out.logits)
        paths.append(routes(out))
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1), torch.cat(paths, dim=1)


@torch.no_grad()
def the_past_cannot_see_the_future(model: Any) -> None:
    tokens = ids(3)
    before = model(tokens, trace=True)
    for t in (1, LENGTH // 2, LENGTH - 1):
        other = tokens.clone()
        other[:, t:] = 1 + other[:, t:] % (model.config.vocab_size - 1)
        after = model(other, trace=True)
        equal(after.logits[:, :t], before.logits[:, :t])
        same(routes(after)[:, :t], routes(before)[:, :t])
        assert (after.logits[:, t:] - before.logits[:, t:]).abs().amax(-1).min() > 1e-3, "the check must change something that matters"
        short = model(tokens[:, :t], trace=True)
        equal(short.logits, before.logits[:, :t])
        same(routes(short), routes(before)[:, :t])


@torch.no_grad()
def decoding_in_any_chunks_is_one_forward_pass(model: Any) -> None:
    tokens = ids(3)
    whole = model(tokens, trace=True, use_cache=False)
    for chunks in ([1] * LENGTH, [5, 1, 3, 3], [LENGTH - 1, 1], [LENGTH]):
        logits, paths = decode(model, tokens, chunks)
        same(paths, routes(whole))
        equal(logits, whole.logits)


@torch.no_grad()
def one_row_is_decoded_as_many_are(model: Any) -> None:
    """One row alone, token by token, with a trace and without: generation asks for none, and may take a way of its own."""
    tokens = ids(3)
    whole = model(tokens)
    for row, trace in product(range(3), (False, True)):
        memory, logits = None, []
        for t in range(LENGTH):
            out = model(tokens[row : row + 1, t : t + 1], past_key_values=memory, use_cache=True, trace=trace)
            memory = out.past_key_values
            logits.append(out.logits[0])
        equal(torch.cat(logits), whole.logits[row])


@torch.no_grad()
def rows_are_written_together_as_they_are_read(model: Any) -> None:
    """Several rows, token by token without a trace, alike or padded on the left: logits, and how many rows visit each block when."""
    tokens, padded = ids(4), torch.ones(4, LENGTH, dtype=torch.long)
    padded[1, :5] = padded[3, :2] = 0
    for mask in (torch.ones_like(padded), padded):
        whole = model(tokens, attention_mask=mask, trace=True)
        visits_BTS = routes(whole)
        for first in (1, 4):
            memory, start = None, 0
            for stop in range(first, LENGTH + 1):
                with counting(model) as counts:
                    out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=memory, use_cache=True)
                memory, present = out.past_key_values, mask[:, start:stop].bool()
                equal(out.logits[present], whole.logits[:, start:stop][present])
                if present.all() and getattr(model.config, "route_beams", 1) == 1:
                    expected = [int((visits_BTS[:, start:stop] == 1 + number).sum()) for number in range(len(counts))]
                    assert counts == expected, f"visits of each block {counts}, with a trace {expected}"
                elif present.all():  # a trace names the blocks of the best branch, and counts those of all
                    pool = slice(model.config.pre_blocks, model.config.pre_blocks + model.config.pool_blocks)
                    visits = int(whole.trace.visits_BT[:, start:stop].sum())
                    assert sum(counts[pool]) == visits, f"{sum(counts[pool])} visits in the pool, with a trace {visits}"
                start = stop


@contextmanager
def counting(model: Any) -> Iterator[list[int]]:
    """Count the tokens that visit each block; a signal graph has none."""
    blocks = getattr(model, "blocks", ())
    counts = [0] * len(blocks)

    def counter(number: int) -> Any:
        def count(module: Any, given: Any, output: Tensor) -> None:
            counts[number] += output.numel() // output.shape[-1]

        return count

    handles = [block.down_proj.register_forward_hook(counter(number)) for number, block in enumerate(blocks)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def a_long_decode_outgrows_the_first_buffer(model: Any) -> None:
    tokens = ids(2, 150)
    whole = model(tokens, trace=True)
    logits, paths = decode(model, tokens, [60] + [1] * 10 + [25] + [1] * 10 + [40] + [1] * 5)
    same(paths, routes(whole))
    equal(logits, whole.logits)


@torch.no_grad()
def padding_on_either_side_changes_nothing(model: Any) -> None:
    lengths = (LENGTH, LENGTH - 4, 2)
    rows = [ids(1, n, seed=n) for n in lengths]
    alone = [model(row, trace=True) for row in rows]
    for left in (True, False):
        tokens = torch.full((len(rows), LENGTH), model.config.pad_token_id)
        mask = torch.zeros_like(tokens)
        places = [slice(LENGTH - n, None) if left else slice(0, n) for n in lengths]
        for i, place in enumerate(places):
            tokens[i, place], mask[i, place] = rows[i][0], 1
        whole = model(tokens, attention_mask=mask, trace=True)
        stepwise = [decode(model, tokens, chunks, attention_mask=mask) for chunks in ([1] * LENGTH, [5, 1, 6])]
        by_document = model(tokens, document_ids=mask - 1, trace=True, use_cache=False)
        for i, place in enumerate(places):
            for paths in (routes(whole), routes(by_document), *(s[1] for s in stepwise)):
                same(paths[i, place], routes(alone[i])[0])
            for logits in (whole.logits, by_document.logits, *(s[0] for s in stepwise)):
                equal(logits[i, place], alone[i].logits[0])
        assert all(s[0].isfinite().all() for s in stepwise) and whole.logits.isfinite().all(), "padding must not make NaN"


@torch.no_grad()
def rows_of_different_length_continue_together(model: Any) -> None:
    """A right-padded prompt is read at once, then every row goes on token by token."""
    lengths, more = (6, 3), 4
    rows = [ids(1, n + more, seed=n)[0] for n in lengths]
    tokens = torch.full((2, max(lengths) + more), model.config.pad_token_id)
    mask = torch.zeros_like(tokens)
    for i, n in enumerate(lengths):
        tokens[i, :n], mask[i, :n] = rows[i][:n], 1
        tokens[i, max(lengths) :], mask[i, max(lengths) :] = rows[i][n:], 1
    logits, paths = decode(model, tokens, [max(lengths)] + [1] * more, attention_mask=mask)
    for i, n in enumerate(lengths):
        alone = model(rows[i][None], trace=True)
        same(paths[i][mask[i].bool()], routes(alone)[0])
        equal(logits[i][mask[i].bool()], alone.logits[0])
        assert n + more == mask[i].sum()


@torch.no_grad()
def neighbours_and_their_order_change_nothing(model: Any) -> None:
    tokens = ids(4)
    together = model(tokens, trace=True)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(tokens[order], trace=True)
    same(routes(shuffled), routes(together)[order])
    equal(shuffled.logits, together.logits[order])
    other = tokens.clone()
    other[1:] = ids(3, seed=9)
    for beside in (model(other, trace=True), model(tokens[:1], trace=True)):
        same(routes(beside)[0], routes(together)[0])
        equal(beside.logits[0], together.logits[0])


@torch.no_grad()
def documents_in_a_row_do_not_see_each_other(model: Any) -> None:
    tokens = ids(2)
    documents = torch.tensor([[7, 7, 7, 3, 3, 3, 3, 3, 9, -1, -1, -1], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]])
    whole = model(tokens, document_ids=documents, trace=True)
    stepwise = [decode(model, tokens, chunks, document_ids=documents) for chunks in ([1] * LENGTH, [2, 5, 5])]
    for row, start, stop in ((0, 0, 3), (0, 3, 8), (0, 8, 9), (1, 0, 12)):
        alone = model(tokens[row : row + 1, start:stop], trace=True)
        for paths in (routes(whole), *(s[1] for s in stepwise)):
            same(paths[row, start:stop], routes(alone)[0])
        for logits in (whole.logits, *(s[0] for s in stepwise)):
            equal(logits[row, start:stop], alone.logits[0])
    assert whole.logits.isfinite().all()


@torch.no_grad()
def packed_documents_may_be_padded_on_either_side(model: Any) -> None:
    """Documents of a row and padding around them, given both ways, read at once and in chunks that cut documents."""
    lengths = ((4, 5), (2, 1, 3), (7,))
    documents = [[ids(1, n, seed=10 * i + j) for j, n in enumerate(row)] for i, row in enumerate(lengths)]
    alone = [[model(document, trace=True) for document in row] for row in documents]
    for left in (True, False):
        tokens = torch.full((len(lengths), LENGTH), model.config.pad_token_id)
        numbers = torch.full_like(tokens, -1)
        places = []
        for i, row in enumerate(lengths):
            stop = LENGTH - sum(row) if left else 0
            for j, n in enumerate(row):
                start, stop = stop, stop + n
                tokens[i, start:stop], numbers[i, start:stop] = documents[i][j][0], 5 - j
                places.append((i, slice(start, stop), alone[i][j]))
        masks = {"document_ids": numbers, "attention_mask": (numbers >= 0).long()}
        whole = model(tokens, trace=True, use_cache=False, **masks)
        chunked = [decode(model, tokens, chunks, **masks) for chunks in ([1] * LENGTH, [3, 4, 5], [LENGTH])]
        read = [(whole.logits, routes(whole)), *chunked]
        for logits, paths in read:
            for i, place, expected in places:
                same(paths[i, place], routes(expected)[0])
                equal(logits[i, place], expected.logits[0])
            assert logits.isfinite().all()


@torch.no_grad()
def the_loss_counts_each_label_once(model: Any) -> None:
    tokens = ids(3)
    labels = tokens.clone()
    labels[0, :5] = -100
    labels[2, 7] = -100
    out = model(tokens, labels=labels)
    scores = out.logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss.float(), -scores[counted].mean(), rtol=1e-5, atol=1e-5)
    lean = model(tokens, labels=labels, skip_logits=True)
    torch.testing.assert_close(lean.loss, out.loss)
    torch.testing.assert_close(out.metrics["loss/lm"], out.loss)
    halves = [model(tokens[i], labels=labels[i], num_items_in_batch=int(counted.sum())).loss for i in (slice(1), slice(1, 3))]
    torch.testing.assert_close(sum(halves), out.loss)


@torch.no_grad()
def saved_and_loaded_it_is_the_same(model: Any, folder: Path) -> None:
    tokens = ids(2)
    before = model(tokens, trace=True)
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    for p in loaded.parameters():
        p.data = p.data.clone()  # a file's numbers lie at odd addresses, where matrix products may round otherwise
    after = model.prepared_by.prepare(loaded)(tokens, trace=True)
    assert loaded.dtype == model.dtype
    same(routes(after), routes(before))
    assert torch.equal(after.logits, before.logits)
    weights = loaded.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    mine, theirs = model.config.to_dict(), loaded.config.to_dict()
    assert {name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)} <= {"_name_or_path", "architectures"}


@torch.no_grad()
def generation_with_and_without_memory_agrees(model: Any) -> None:
    prompt = ids(2, 5)
    for options in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            results.append(model.generate(prompt, max_new_tokens=8, use_cache=use_cache, **options))
        assert torch.equal(*results)
        assert results[0].shape == (2 * options.get("num_return_sequences", 1), 13)
    greedy = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model(greedy).logits[:, 4:-1].argmax(-1), greedy[:, 5:])
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompt), dim=1)
    mask = (padded != 0).long()
    assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 3:], greedy)


class Heard:
    """A streamer that keeps what it was told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@torch.no_grad()
def streaming_tells_what_generate_returns(model: Any) -> None:
    prompt, heard = ids(1, 5), Heard()
    result = model.generate(prompt, max_new_tokens=6, do_sample=False, streamer=heard)
    assert heard.tokens == result[0].tolist() and heard.ended


@torch.no_grad()
def memory_can_be_cropped_repeated_and_reordered(model: Any) -> None:
    tokens, new = ids(3), ids(3, 2, seed=5)
    full = model(torch.cat((tokens, new), dim=1)).logits[:, -2:]

    def filled(length: int = LENGTH) -> Any:
        return model(tokens[:, :length], use_cache=True).past_key_values

    memory = filled()
    model(ids(3, 4, seed=8), past_key_values=memory, use_cache=True)
    memory.crop(-4)
    assert memory.get_seq_length() == LENGTH
    equal(model(new, past_key_values=memory, use_cache=True).logits, full)

    memory = filled()
    memory.batch_repeat_interleave(2)
    equal(model(new.repeat_interleave(2, 0), past_key_values=memory, use_cache=True).logits, full.repeat_interleave(2, 0))

    for method in ("reorder_cache", "batch_select_indices"):
        memory, order = filled(), torch.tensor([2, 0, 0, 1])
        getattr(memory, method)(order)
        equal(model(new[order], past_key_values=memory, use_cache=True).logits, full[order])

    memory = filled()
    memory.reset()
    assert memory.get_seq_length() == 0
    equal(model(tokens, past_key_values=memory, use_cache=True).logits, model(tokens).logits)


CHECKS: tuple[Callable[[Any], None], ...] = (
    the_past_cannot_see_the_future,
    decoding_in_any_chunks_is_one_forward_pass,
    one_row_is_decoded_as_many_are,
    rows_are_written_together_as_they_are_read,
    a_long_decode_outgrows_the_first_buffer,
    padding_on_either_side_changes_nothing,
    rows_of_different_length_continue_together,
    neighbours_and_their_order_change_nothing,
    documents_in_a_row_do_not_see_each_other,
    packed_documents_may_be_padded_on_either_side,
    the_loss_counts_each_label_once,
    generation_with_and_without_memory_agrees,
    streaming_tells_what_generate_returns,
    memory_can_be_cropped_repeated_and_reordered,
)
