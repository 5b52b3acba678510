"""Randomness: derived seeds differ, generators repeat, and the global ones are given back."""

import hashlib
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.core.rng import derive_seed, generator, isolated_rng, seed_global_rng

FAST = settings(deadline=None, max_examples=50)


def global_states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()


def draw():
    """One number from each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_derived_seeds_are_all_distinct():
    # The boundaries between seed, round and client are part of what is hashed: (1, 23) is not (12, 3).
    seeds = {
        derive_seed(seed, purpose, *indices)
        for seed in (0, 1, 2, 12, 123)
        for purpose in ("cohort", "batches", "client", "1")
        for indices in [(), (0,), (23,), *itertools.product(range(30), range(20))]
    }
    assert len(seeds) == 5 * 4 * (3 + 30 * 20)


@given(seed=st.integers(0, 2**64), purpose=st.text(max_size=9), indices=st.lists(st.integers(0, 2**40), max_size=3))
@FAST
def test_a_derived_seed_is_a_function_of_its_arguments_and_fits_torch(seed, purpose, indices):
    derived = derive_seed(seed, purpose, *indices)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, purpose, *indices)
    torch.Generator().manual_seed(derived)


def test_a_derived_seed_is_the_same_on_every_machine():
    # BLAKE2b of the arguments as text, its 64 little-endian bits shifted right by one: no salted hash().
    digest = hashlib.blake2b(b"(7, 'cohort', (3, 11))", digest_size=8).digest()
    assert derive_seed(7, "cohort", 3, 11) == sum(byte << (8 * i) for i, byte in enumerate(digest)) // 2


def test_derived_seeds_use_all_their_bits():
    seeds = [derive_seed(0, "bits", i) for i in range(400)]
    for bit in range(63):  # binomial(400, 1/2): 120 to 280 is 8 standard deviations
        assert 120 < sum(seed >> bit & 1 for seed in seeds) < 280


def test_generators_repeat_and_leave_the_global_ones_alone():
    before = global_states()
    one = torch.rand(5, generator=generator(0, "batches", 3, 4))
    assert torch.equal(one, torch.rand(5, generator=generator(0, "batches", 3, 4)))
    for other in [generator(1, "batches", 3, 4), generator(0, "cohort", 3, 4), generator(0, "batches", 4, 3)]:
        assert not torch.equal(one, torch.rand(5, generator=other))
    np.testing.assert_equal(global_states(), before)


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**63 - 1])
def test_seeding_makes_all_global_generators_repeat(seed):
    with isolated_rng():
        seed_global_rng(seed)
        first = draw()
        draw()
        seed_global_rng(seed)
        assert draw() == first
        seed_global_rng(seed + 1 if seed < 2**63 - 1 else seed - 1)
        assert all(a != b for a, b in zip(draw(), first))


def test_seeding_is_the_libraries_own_seeding():
    with isolated_rng():
        seed_global_rng(11, torch.device("cpu"))
        expected_torch = torch.rand((), generator=torch.Generator().manual_seed(11))
        assert draw() == (random.Random(11).random(), np.random.RandomState(11).rand(), float(expected_torch))


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_isolated_rng_gives_the_global_generators_back(device):
    before = global_states()
    with isolated_rng(device):
        draw()
        seed_global_rng(3)
        torch.manual_seed(4)
        draw()
    np.testing.assert_equal(global_states(), before)


def test_isolated_rng_gives_them_back_after_an_exception():
    before = global_states()

    @isolated_rng()
    def draw_and_fail():
        draw()
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        draw_and_fail()
    np.testing.assert_equal(global_states(), before)


def test_what_runs_inside_does_not_change_what_is_drawn_after():
    with isolated_rng():
        seed_global_rng(1)
        undisturbed = [draw(), draw()]
        seed_global_rng(1)
        disturbed = [draw()]
        with isolated_rng():
            seed_global_rng(99)
            draw()
        disturbed.append(draw())
    assert disturbed == undisturbed


def test_inside_the_global_generators_continue_from_where_they_were():
    with isolated_rng():
        seed_global_rng(1)
        with isolated_rng():
            inside = draw()
        assert draw() == inside
