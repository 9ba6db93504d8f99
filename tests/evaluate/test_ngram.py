"""Kneser–Ney n-grams: equal to the textbook recursion written with dictionaries, summing to one, blind across documents."""

import math
from collections import defaultdict

import numpy as np
import pytest

from pathlm.evaluate import ngram
from pathlm.evaluate.ngram import KneserNey

VOCAB = 12
START = 0


class Textbook:
    """Chen & Goodman's interpolated Kneser–Ney of one order, with a dictionary entry per n-gram and recursion over orders."""

    def __init__(self, documents, *, vocab_size, order, single=False):
        self.vocab_size, self.order = vocab_size, order
        self.counts = {}
        for m in range(1, order + 1):
            plain, lefts, starting = defaultdict(int), defaultdict(set), defaultdict(int)
            for document in documents:
                for end in range(1, len(document)):
                    begin = end - m + 1
                    if begin < 0:
                        continue
                    gram = tuple(document[begin : end + 1])
                    plain[gram] += 1
                    if begin == 0:
                        starting[gram] += 1
                    else:
                        lefts[gram].add(document[begin - 1])
            self.counts[m] = dict(plain) if m == order else {gram: len(lefts[gram]) + starting[gram] for gram in plain}
        self.discounts = {m: self.estimate(counts.values(), single) for m, counts in self.counts.items()}

    @staticmethod
    def estimate(counts, single):
        counts = list(counts)
        n = [None] + [counts.count(c) for c in range(1, 5)]
        if single:
            return [n[1] / (n[1] + 2 * n[2])] * 3 if n[1] and n[2] else [0.5] * 3
        if not all(n[1:]):
            return [0.5, 1.0, 1.5]
        y = n[1] / (n[1] + 2 * n[2])
        d = [c - (c + 1) * y * n[c + 1] / n[c] for c in (1, 2, 3)]
        return d if all(0 < value <= c for c, value in enumerate(d, start=1)) else [0.5, 1.0, 1.5]

    def discount(self, m, count):
        return self.discounts[m][min(count, 3) - 1] if count else 0.0

    def p(self, token, history):
        """Return p(token | history), the history being all the tokens before it in its document."""
        return self.recurse(token, tuple(history[-(self.order - 1) :]) if self.order > 1 else ())

    def recurse(self, token, history):
        m = len(history) + 1
        lower = 1 / self.vocab_size if not history else self.recurse(token, history[1:])
        followers = [count for gram, count in self.counts[m].items() if gram[:-1] == history]
        if not followers:
            return lower
        total = sum(followers)
        count = self.counts[m].get((*history, token), 0)
        gamma = sum(self.discount(m, c) for c in followers) / total
        return max(count - self.discount(m, count), 0) / total + gamma * lower


def make_documents(seed, *, documents=6, length=60, vocab=VOCAB - 2, tail=1.2):
    """Draw documents from a Zipf-like bigram source, framed by the start token; the last two ids never occur."""
    draw = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab) ** tail
    table = np.stack([draw.permutation(weights) for _ in range(vocab)])
    table /= table.sum(axis=1, keepdims=True)
    rows = []
    for _ in range(documents):
        row = [START]
        for _ in range(int(draw.integers(1, length))):
            row.append(1 + int(draw.choice(vocab - 1, p=table[row[-1]])))
        rows.append([*row, START])
    return rows


def flat(documents):
    return np.concatenate(documents), np.cumsum([0, *map(len, documents)])[:-1]


@pytest.mark.parametrize("discounting", ["modified", "single"])
@pytest.mark.parametrize("seed", range(4))
def test_every_order_equals_the_textbook_recursion(seed, discounting):
    train, test = make_documents(seed, documents=4 + 4 * seed, length=30 * (seed + 1)), make_documents(seed + 100, vocab=VOCAB)
    losses = KneserNey(*flat(train), vocab_size=VOCAB, discounting=discounting).losses(*flat(test))
    assert losses.shape == (5, sum(len(document) - 1 for document in test))
    for order in range(1, 6):
        slow = Textbook(train, vocab_size=VOCAB, order=order, single=discounting == "single")
        expected = [-math.log(slow.p(document[t], document[:t])) for document in test for t in range(1, len(document))]
        np.testing.assert_allclose(losses[order - 1], expected, rtol=1e-12, atol=1e-12)


def test_the_estimated_discounts_are_used_when_the_counts_allow():
    train = make_documents(3, documents=40, length=80)
    model = KneserNey(*flat(train), vocab_size=VOCAB)
    assert any(tuple(discounts) != ngram.FALLBACK for discounts in model.discounts)
    np.testing.assert_allclose(model.discounts[2], Textbook(train, vocab_size=VOCAB, order=3).discounts[3], rtol=1e-12)


@pytest.mark.parametrize("discounting", ["modified", "single"])
def test_probabilities_sum_to_one_for_any_history(discounting):
    model = KneserNey(*flat(make_documents(7, documents=20)), vocab_size=VOCAB, discounting=discounting)
    draw = np.random.default_rng(0)
    for length in (0, 1, 2, 3, 4, 5, 9):
        for _ in range(5):
            history = draw.integers(0, VOCAB, size=length)
            probabilities = model.probabilities(history)
            assert probabilities.shape == (5, VOCAB)
            assert (probabilities > 0).all()
            np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)


def test_the_distribution_is_the_one_that_scores():
    documents = make_documents(5, documents=10)
    model = KneserNey(*flat(documents), vocab_size=VOCAB)
    losses = model.losses(*flat(documents[:1]))
    for t in range(1, len(documents[0])):
        np.testing.assert_allclose(losses[:, t - 1], -np.log(model.probabilities(documents[0][:t])[:, documents[0][t]]), rtol=1e-12)


def test_a_score_does_not_depend_on_the_documents_around_it():
    model = KneserNey(*flat(make_documents(1, documents=20)), vocab_size=VOCAB)
    first, second = make_documents(2, documents=2)
    together = model.losses(*flat([first, second]))
    np.testing.assert_array_equal(together[:, len(first) - 1 :], model.losses(*flat([second])))


def test_an_unseen_token_gets_the_uniform_share_of_order_zero():
    model = KneserNey(np.array([0, 1, 1, 2, 0]), np.array([0]), vocab_size=8, order=1)
    # Counts 2, 1, 1 are too few to estimate discounts, so 1.0, 0.5, 0.5 are set free and shared by all 8 tokens.
    freed = (1.0 + 0.5 + 0.5) / 4
    np.testing.assert_allclose(model.probabilities(np.array([], dtype=int))[0, 5], freed / 8)


def test_scoring_in_pieces_changes_nothing(monkeypatch):
    model = KneserNey(*flat(make_documents(1, documents=20)), vocab_size=VOCAB)
    test = flat(make_documents(2, documents=9))
    whole = model.losses(*test)
    monkeypatch.setattr(ngram, "SCORE_TOKENS", 7)
    np.testing.assert_array_equal(model.losses(*test), whole)


def test_documents_shorter_than_the_order_can_be_counted_and_scored():
    model = KneserNey(np.array([0, 0, 0, 3, 0]), np.array([0, 2]), vocab_size=4)
    assert np.isfinite(model.losses(np.array([0, 3, 0, 0, 1, 1, 1, 1, 1, 0]), np.array([0, 3]))).all()


def test_a_learnable_source_is_learned_better_by_higher_orders():
    train, test = make_documents(9, documents=200, tail=2.0), make_documents(9, documents=210, tail=2.0)[200:]
    losses = KneserNey(*flat(train), vocab_size=VOCAB, order=2).losses(*flat(test)).mean(axis=1)
    assert losses[1] < losses[0] - 0.3 < math.log(VOCAB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.array([0, 12, 0])}, "vocab_size=12"),
        ({"tokens": np.array([0, -1, 0])}, "tokens lie in -1"),
        ({"tokens": np.array([], dtype=int)}, "not empty"),
        ({"starts": np.array([1])}, "starts must rise from 0"),
        ({"starts": np.array([0, 2, 2])}, "starts must rise from 0"),
        ({"starts": np.array([0, 3])}, "starts must rise from 0"),
        ({"order": 0}, "order=0"),
        ({"discounting": "none"}, "discounting|Type-check"),
    ],
    ids=str,
)
def test_input_that_cannot_be_counted_is_refused(change, message):
    arguments = {"tokens": np.array([0, 1, 0]), "starts": np.array([0]), "vocab_size": VOCAB} | change
    with pytest.raises((ValueError, TypeError), match=message):
        KneserNey(**arguments)
