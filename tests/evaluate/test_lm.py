"""Language-model scores: equal to one forward pass per token, every token counted once, records that join with their corpus."""

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from arrays import ArrayCorpus, make_llama, random_documents

from pathlm import build, preset
from pathlm.evaluate import lm
from pathlm.evaluate.lm import choose, score, token_losses, windows
from pathlm.evaluate.records import LossFile, LossWriter, TokenLosses, read_token_losses


def make_brian():
    torch.manual_seed(0)
    return build(preset("plain-tiny", vocab_size=40, max_position_embeddings=16, initializer_range=0.3)).double().eval()


@pytest.fixture(scope="module", params=[make_llama, make_brian], ids=["llama", "brian"])
def model(request):
    return request.param()


@torch.no_grad()
def naive(model, document, *, context, stride):
    """Score token by token: each from its own forward pass over the history that the stated rule gives it."""
    losses = []
    for target in range(1, len(document)):
        moves = 0 if target <= context else math.ceil((target - context) / stride)
        history = document[moves * stride : target]
        assert len(history) <= context and (len(history) == target or len(history) > context - stride)
        logits = model(input_ids=torch.tensor([list(history)])).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[document[target]]))
    return losses


@pytest.mark.parametrize(("context", "stride"), [(16, 8), (16, 16), (16, 1), (7, 3), (1, 1)])
def test_scores_equal_one_forward_pass_per_token(model, context, stride):
    documents = random_documents([1, 3, 5, 15, 16, 17, 29, 40, 0])
    losses = token_losses(model, [np.array(d) for d in documents], context=context, stride=stride, batch_tokens=64)
    for document, found in zip(documents, losses, strict=True):
        np.testing.assert_allclose(found, naive(model, document, context=context, stride=stride), rtol=0, atol=1e-10)


def test_the_score_adds_up_over_all_documents(model):
    corpus = ArrayCorpus(validation=random_documents([4, 30, 11, 2]))
    result = score(model, corpus, context=10, stride=4)
    every = [loss for document in corpus.data["validation"] for loss in naive(model, document.tolist(), context=10, stride=4)]
    assert (result.tokens, result.documents, result.bytes) == (len(every), 4, 3 * (len(every) + 4))
    assert result.loss == pytest.approx(sum(every) / len(every), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.loss), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(sum(every) / math.log(2) / result.bytes, rel=1e-12)


@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 4), (8, 3), (8, 1), (5, 2)])
def test_windows_count_every_token_but_the_first_exactly_once(context, stride):
    for length in range(2, 40):
        found = windows(length, context=context, stride=stride)
        counted = [token for window in found for token in range(window.first, window.stop + 1)]
        assert counted == list(range(1, length))
        assert all(0 < window.stop - window.start <= context for window in found)
        assert all(window.first - window.start > context - stride for window in found[1:])


def test_neither_batches_nor_groups_change_a_score(model, monkeypatch):
    corpus = ArrayCorpus(test=random_documents([4, 30, 11, 2, 16, 16]))
    whole = score(model, corpus, "test")
    for batch_tokens in (1, 33, 10_000):
        assert score(model, corpus, "test", batch_tokens=batch_tokens).loss == pytest.approx(whole.loss, rel=1e-12)
    monkeypatch.setattr(lm, "GROUP_TOKENS", 20)
    assert score(model, corpus, "test").loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_model_that_cannot_keep_fewer_logits_scores_the_same(model, monkeypatch):
    corpus = ArrayCorpus(validation=random_documents([40, 3]))
    expected = score(model, corpus).loss
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask=None, use_cache=None: forward(input_ids, attention_mask))
    assert score(model, corpus).loss == pytest.approx(expected, rel=1e-12)


def test_progress_reaches_the_number_of_tokens(model):
    steps = []
    result = score(model, ArrayCorpus(validation=random_documents([40, 3, 9])), progress=steps.append)
    assert sum(steps) == result.tokens and len(steps) > 1


def test_limits_keep_the_first_whole_documents():
    corpus = ArrayCorpus(validation=random_documents([4, 30, 11]))
    assert [r.number for r in choose(corpus, "validation")] == [0, 1, 2]
    assert [r.number for r in choose(corpus, "validation", max_documents=2)] == [0, 1]
    assert [r.number for r in choose(corpus, "validation", max_tokens=5 + 31)] == [0, 1]
    assert [r.number for r in choose(corpus, "validation", max_tokens=5 + 30)] == [0]
    assert [r.number for r in choose(corpus, "validation", max_tokens=1)] == [0]


def test_records_join_with_the_corpus_by_document_and_position(model, tmp_path):
    corpus = ArrayCorpus(validation=random_documents([4, 30, 11]))
    result = score(model, corpus, context=8, stride=4, records=tmp_path / "losses.safetensors", max_documents=2)
    found = read_token_losses(tmp_path / "losses.safetensors")
    assert len(found) == result.tokens
    for row in range(len(found)):
        assert corpus.data["validation"][found.document[row]][found.position[row]] == found.token[row]
    assert sorted(set(zip(found.document.tolist(), found.position.tolist(), strict=True))) == [(0, p) for p in range(1, 6)] + [
        (1, p) for p in range(1, 32)
    ]
    assert found.loss.dtype == np.float32
    assert found.loss.mean(dtype=np.float64) == pytest.approx(result.loss, rel=1e-6)
    np.testing.assert_allclose(found.of_document(1), naive(model, corpus.data["validation"][1].tolist(), context=8, stride=4), rtol=1e-6)
    assert len(found.of_document(2)) == 0
    assert (found.header["split"], found.header["corpus"], found.header["context"], found.header["stride"]) == (
        "validation",
        "a" * 64,
        8,
        4,
    )
    found.check(corpus)
    other = ArrayCorpus(validation=random_documents([4, 30, 11], seed=1))
    with pytest.raises(ValueError, match="do not belong to arrays: document 0, place 1"):
        found.check(other)
    with pytest.raises(ValueError, match="does not have"):
        found.check(ArrayCorpus(validation=random_documents([4])))


def test_losses_written_in_pieces_are_read_in_pieces_and_never_half_there(tmp_path):
    document, position = np.repeat([3, 4], [4, 6]), np.array([1, 2, 3, 4, 1, 2, 3, 4, 5, 6])
    whole = TokenLosses(document, position, position * 7, np.linspace(0, 1, 10, dtype=np.float32), {"split": "test"})
    columns = {name: getattr(whole, name) for name in ("document", "position", "token", "loss")}
    first, second = (
        TokenLosses(**{name: column[rows] for name, column in columns.items()}, header={}) for rows in (slice(4), slice(4, 10))
    )
    with LossWriter(tmp_path / "losses", whole.header, tokens=10) as out:
        out.add(first)
        assert not (tmp_path / "losses").exists()
        out.add(second)
    found = LossFile(tmp_path / "losses")
    assert len(found) == 10 and found.header == {"format": 1, "split": "test"}
    for name, column in columns.items():
        assert getattr(read_token_losses(tmp_path / "losses"), name).tolist() == column.tolist()
        assert getattr(found.rows(3, 99), name).tolist() == column[3:].tolist()
    with suppress(KeyboardInterrupt), LossWriter(tmp_path / "others", {}, tokens=10) as out:
        out.add(first)
        raise KeyboardInterrupt
    (tmp_path / "folder").mkdir()
    with suppress(OSError), LossWriter(tmp_path / "folder", {}, tokens=4) as out:
        out.add(first)
    (tmp_path / "folder").rmdir()
    assert [file.name for file in tmp_path.iterdir()] == ["losses"]


def test_a_file_that_holds_no_records_is_refused(tmp_path):
    file = tmp_path / "other.safetensors"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="holds no token losses"):
        read_token_losses(file)
    with pytest.raises(ValueError, match="different lengths"):
        TokenLosses(np.zeros(2), np.zeros(2), np.zeros(2), np.zeros(1), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 17}, "context=17: .*max_position_embeddings=16"),
        ({"context": 0}, "context=0"),
        ({"stride": 0}, "stride=0"),
        ({"context": 8, "stride": 9}, "stride=9: must lie between 1 and context=8"),
        ({"max_documents": 0}, "max_documents=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        score(model, ArrayCorpus(validation=random_documents([4])), **options)


def test_a_loss_that_is_not_finite_names_its_document():
    broken = make_llama()
    broken.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match=r"loss of document 'validation-0' is nan"):
        score(broken, ArrayCorpus(validation=random_documents([4])))


def test_training_mode_is_restored(model):
    model.train()
    score(model, ArrayCorpus(validation=random_documents([4])))
    assert model.training
    model.eval()
