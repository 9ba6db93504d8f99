"""Samples are functions of (task, seed, split, index), and splits never share one where there are enough."""

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from pathlm.text.synthetic import TASKS, SampleStream, samples
from pathlm.text.synthetic.draws import Draws

FIRST = {  # fixed for ever: a change here changes every run that trains on tasks
    "copy": "copy : r w w g w f n c j f u x m c a k = r w w g w f n c j f u x m c a k",
    "arithmetic": "arithmetic mod 11 : ( ( ( ( ( 7 * 2 ) + 3 ) * 5 ) + 7 ) * 6 ) - 5 = 8",
    "pointer": "pointer a > p p > b f > r u > k n > x x > y b > s i > c r > m g > u k > f h > i c > a y > g m > h s > n : s times 4 = g",
}


def prompts(spec, count, *, split="train", seed=0, k=None):
    stream = samples(spec, split, seed=seed)
    return {stream.sample(i, k=k).prompt for i in range(count)}


@pytest.mark.parametrize("name", FIRST)
def test_the_first_sample_of_a_seed_never_changes(name):
    assert samples(name, "train", seed=7).sample(0).text == FIRST[name]


def test_another_process_draws_the_same_samples():
    code = "from pathlm.text.synthetic import *; print([samples(n, 'test', seed=3).sample(10**12).text for n in TASKS])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}).stdout
    assert other.strip() == str([samples(n, "test", seed=3).sample(10**12).text for n in TASKS])


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_does_not_depend_on_what_was_drawn_before(name):
    forward, backward = samples(name), samples(name)
    first = [forward.sample(i) for i in range(20)]
    assert [backward.sample(i) for i in reversed(range(20))] == first[::-1]
    assert list(islice(samples(name), 20)) == first


@pytest.mark.parametrize("name", TASKS)
def test_seeds_splits_and_options_give_different_samples(name):
    streams = [samples(name), samples(name, seed=1), samples(name, "validation"), samples(name, "test")]
    texts = [tuple(stream.sample(i).text for i in range(5)) for stream in streams]
    assert len(set(texts)) == 4


@pytest.mark.parametrize(
    ("spec", "k"), [("copy:alphabet=4,min_length=7,max_length=7", 1), ("arithmetic", 3), ("arithmetic:modulus=5", 6), ("compose", 2)]
)
def test_held_out_samples_are_never_trained_on_under_any_seed(spec, k):
    """The spaces are small enough here for random draws to collide."""
    train = SampleStream(samples(spec).task, "train", seed=0)
    assert train.task.held_out(k)
    trained = prompts(spec, 2500, k=k)
    again = prompts(spec, 2500, seed=1, k=k)
    assert trained & again, "the space is too large for this test to mean anything"
    for split in ("validation", "test"):
        held_out = prompts(spec, 400, split=split, k=k) | prompts(spec, 400, split=split, seed=1, k=k)
        assert not held_out & (trained | again)


def test_small_spaces_are_shared_and_say_so():
    stream = samples("arithmetic", "validation")
    assert not stream.task.held_out(1)
    everything = prompts("arithmetic", 4000, k=1)
    assert len(everything) == 11 * (20 + 9)
    assert {stream.sample(i, k=1).prompt for i in range(50)} <= everything


@pytest.mark.parametrize(
    "spec",
    [
        "arithmetic:modulus=5",
        "brackets:kinds=2,max_open=1,length=9,max_k=4",
        "compose:size=3",
        "rewrite:untouched=1,alphabet=14",
        "pointer:max_k=1,nodes=3,alphabet=4",
        "pointer:max_k=2,nodes=5,alphabet=5,order=sorted",
    ],
)
def test_the_declared_number_of_prompts_is_not_more_than_there_are(spec):
    """Checked where all of them can be met: an overstated count would hold samples out of a space that has none."""
    task = samples(spec).task
    for k in task.ks:
        if task.prompts(k) <= 200:
            met = prompts(spec, 4000, k=k)
            assert len(met) >= task.prompts(k)


@pytest.mark.parametrize(
    ("split", "seed", "message"), [("shift", 0, "split='shift': tasks have the splits train"), ("train", -1, "seed=-1: must not")]
)
def test_unknown_splits_and_seeds_are_refused(split, seed, message):
    with pytest.raises(ValueError, match=message):
        samples("copy", split, seed=seed)


def test_draws_are_uniform_and_permutations_fair():
    draws = Draws("test")
    draws.seek(0)
    counts = np.bincount([draws.below(7) for _ in range(70_000)], minlength=7)
    assert np.abs(counts - 10_000).max() < 500
    orders = [tuple(draws.several("abc", 3)) for _ in range(6000)]
    assert len(set(orders)) == 6 and max(map(orders.count, set(orders))) < 1150


def test_a_large_draw_takes_more_than_one_buffer():
    draws = Draws("test")
    draws.seek(1)
    assert sorted(draws.several(range(700), 700)) == list(range(700))
    assert len(set(draws.several(range(700), 200))) == 200
