"""Signs packed block by block against NumPy's packbits, at the edges of blocks and bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import Signs, SignSGD
from lightning_lbgm.core.blocks import block_size
from lightning_lbgm.payloads import bits
from lightning_lbgm.payloads.base import Dense

BLOCK = block_size(torch.empty(0))
SIZES = st.sampled_from([1, 7, 8, 9, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 13])
seeds = st.integers(0, 2**32 - 1)


def signed(size, seed):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(size) < 0.2, rng.choice([0.0, -0.0], size=size), rng.normal(size=size))


@given(size=SIZES, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=40)
def test_signs_are_packed_as_numpy_packs_them(size, seed, dtype):
    values = torch.tensor(signed(size, seed), dtype=dtype)
    expected = np.packbits(values.double().numpy() >= 0, bitorder="little")  # minus zero counts as positive too
    np.testing.assert_array_equal(bits.pack_signs(values).numpy(), expected)


@given(size=SIZES, seed=seeds, alpha=st.sampled_from([1.0, -1.0, 0.013]))
@settings(max_examples=40)
def test_signs_decode_and_add_to_the_bit_as_plain_operations(size, seed, alpha):
    values = torch.tensor(signed(size, seed), dtype=torch.float32)
    payload = Signs.pack(values, torch.tensor(0.3), (size,))
    expected = torch.where(values >= 0, 1.0, -1.0) * torch.tensor(0.3)
    assert torch.equal(payload.dense(), expected)
    out = torch.randn(size, generator=torch.Generator().manual_seed(1))
    total = out.clone()
    payload.add_to(total, alpha)
    assert torch.equal(total, out.add(expected, alpha=alpha))
    wide = torch.zeros(size, dtype=torch.float64)
    payload.add_to(wide, alpha)
    torch.testing.assert_close(wide, alpha * expected.double())


@given(size=SIZES, seed=seeds)
@settings(max_examples=30)
def test_the_scale_is_the_mean_magnitude(size, seed):
    values = torch.tensor(signed(size, seed), dtype=torch.float32)
    payload = SignSGD().encode(Dense(values), {}).payload
    exact = np.abs(values.double().numpy()).mean()
    assert float(payload.scale) == pytest.approx(exact, rel=2e-6)
    large = SignSGD().encode(Dense(values * 1e37), {}).payload  # whose sum is beyond float32
    assert float(large.scale) == pytest.approx(exact * 1e37, rel=2e-6)


def test_the_ways_of_other_devices_pack_alike():
    values = torch.tensor([True, False, True, True, False, False, False, True, True])
    assert bits.pack_bits(values).tolist() == [0b10001101, 1]
    assert bits.unpack_bits(bits.pack_bits(values), 9).tolist() == values.int().tolist()
    assert bits.count_bits(bits.pack_bits(values)) == 5
