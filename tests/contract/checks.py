"""The contract itself: what must hold for every family and option. Each check raises AssertionError when the model breaks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def same_routes(mine: Any, theirs: Any, places: Any = slice(None)) -> None:
    torch.testing.assert_close(mine.block_BTS[places], theirs.block_BTS[places])


@torch.no_grad()
def decode(model: Any, tokens: Tensor, chunks: Sequence[int], **masks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and routes of reading `tokens` in chunks with a memory; masks cover all that was read so far."""
    memory, start, logits, routes = None, 0, [], []
    for size in chunks:
        stop = start + size
        seen = {name: mask[:, :stop] for name, mask in masks.items()}
        out = model(tokens[:, start:stop], past_key_values=memory, use_cache=True, trace=True, **seen)
        assert out.past_key_values.get_seq_length() == stop
        memory, start = out.past_key_values, stop
        logits.append(out.logits)
        routes.append(out.trace.block_BTS)
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1), torch.cat(routes, dim=1)


@torch.no_grad()
def the_past_cannot_see_the_future(model: Any) -> None:
    tokens = ids(3)
    before = model(tokens, trace=True)
    for t in (1, LENGTH // 2, LENGTH - 1):
        other = tokens.clone()
        other[:, t:] = 1 + other[:, t:] % (model.config.vocab_size - 1)
        after = model(other, trace=True)
        equal(after.logits[:, :t], before.logits[:, :t])
        same_routes(after.trace, before.trace, (slice(None), slice(t)))
        assert (after.logits[:, t:] - before.logits[:, t:]).abs().amax(-1).min() > 1e-3, "the check must change something that matters"
        equal(model(tokens[:, :t]).logits, before.logits[:, :t])


@torch.no_grad()
def decoding_in_any_chunks_is_one_forward_pass(model: Any) -> None:
    tokens = ids(3)
    whole = model(tokens, trace=True)
    for chunks in ([1] * LENGTH, [5, 1, 3, 3], [LENGTH - 1, 1], [LENGTH]):
        logits, routes = decode(model, tokens, chunks)
        equal(logits, whole.logits)
        assert torch.equal(routes, whole.trace.block_BTS)


@torch.no_grad()
def a_long_decode_outgrows_the_first_buffer(model: Any) -> None:
    tokens = ids(2, 150)
    equal(decode(model, tokens, [1] * 70 + [30] + [1] * 50)[0], model(tokens).logits)


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
        by_document = model(tokens, document_ids=mask - 1)
        for i, place in enumerate(places):
            for logits in (whole.logits, by_document.logits, *(s[0] for s in stepwise)):
                equal(logits[i, place], alone[i].logits[0])
            for routes in (whole.trace.block_BTS, *(s[1] for s in stepwise)):
                assert torch.equal(routes[i, place], alone[i].trace.block_BTS[0])
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
    logits, _ = decode(model, tokens, [max(lengths)] + [1] * more, attention_mask=mask)
    for i, n in enumerate(lengths):
        equal(logits[i][mask[i].bool()], model(rows[i][None]).logits[0])
        assert n + more == mask[i].sum()


@torch.no_grad()
def neighbours_and_their_order_change_nothing(model: Any) -> None:
    tokens = ids(4)
    together = model(tokens, trace=True)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = model(tokens[order], trace=True)
    equal(shuffled.logits, together.logits[order])
    same_routes(shuffled.trace, together.trace, slice(0, 0))
    assert torch.equal(shuffled.trace.block_BTS, together.trace.block_BTS[order])
    other = tokens.clone()
    other[1:] = ids(3, seed=9)
    equal(model(other).logits[0], together.logits[0])
    equal(model(tokens[:1]).logits[0], together.logits[0])


@torch.no_grad()
def documents_in_a_row_do_not_see_each_other(model: Any) -> None:
    tokens = ids(2)
    documents = torch.tensor([[7, 7, 7, 3, 3, 3, 3, 3, 9, -1, -1, -1], [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]])
    whole = model(tokens, document_ids=documents, trace=True)
    stepwise = [decode(model, tokens, chunks, document_ids=documents) for chunks in ([1] * LENGTH, [2, 5, 5])]
    for row, start, stop in ((0, 0, 3), (0, 3, 8), (0, 8, 9), (1, 0, 12)):
        alone = model(tokens[row : row + 1, start:stop], trace=True)
        for logits in (whole.logits, *(s[0] for s in stepwise)):
            equal(logits[row, start:stop], alone.logits[0])
        for routes in (whole.trace.block_BTS, *(s[1] for s in stepwise)):
            assert torch.equal(routes[row, start:stop], alone.trace.block_BTS[0])
    assert whole.logits.isfinite().all()


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
    before = model(tokens).logits
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert loaded.dtype == model.dtype
    assert torch.equal(loaded(tokens).logits, before)
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
    a_long_decode_outgrows_the_first_buffer,
    padding_on_either_side_changes_nothing,
    rows_of_different_length_continue_together,
    neighbours_and_their_order_change_nothing,
    documents_in_a_row_do_not_see_each_other,
    the_loss_counts_each_label_once,
    generation_with_and_without_memory_agrees,
    streaming_tells_what_generate_returns,
    memory_can_be_cropped_repeated_and_reordered,
)
