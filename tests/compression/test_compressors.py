"""TopK and SignSGD against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import Signs, SignSGD, TopK
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.sparse import Sparse

FAST = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)


def encode(stage, values, sizes=None):
    result = stage.encode(Dense(values, sizes), stage.init())
    assert result.decision is None
    return result.payload


@given(seed=seeds, size=st.integers(1, 60), fraction=st.floats(1e-3, 1))
@FAST
def test_topk_keeps_what_a_numpy_argsort_keeps(seed, size, fraction):
    # Magnitudes are distinct: a permutation of 1 ... size, with random signs.
    rng = np.random.default_rng(seed)
    values = (rng.permutation(size) + 1.0) * rng.choice([-1.0, 1.0], size=size)
    payload = encode(TopK(fraction), torch.tensor(values, dtype=torch.float32))
    k = max(1, int(np.rint(fraction * size)))
    kept = np.sort(np.argsort(-np.abs(values))[:k])
    assert isinstance(payload, Sparse)
    np.testing.assert_array_equal(payload.indices.numpy(), kept)
    np.testing.assert_array_equal(payload.values.numpy(), values[kept])
    np.testing.assert_array_equal(payload.dense().numpy(), np.where(np.isin(np.arange(size), kept), values, 0.0))
    assert payload.num_bits == 8 * len(payload.to_bytes())
    # At most a bitmap; where the sizes are below 128, 4 bytes of framing.
    assert 32 * (k + 1) < payload.num_bits <= 8 * (4 + -(-size // 8)) + 32 * k


@given(values=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=30))
@FAST
def test_topk_keeps_the_largest_magnitudes_whatever_the_ties(values):
    payload = encode(TopK(0.5), torch.tensor(values))
    k = max(1, round(len(values) / 2))
    assert sorted(payload.values.abs().tolist()) == sorted(map(abs, values))[-k:]
    indices = payload.indices.tolist()
    assert indices == sorted(set(indices))
    assert payload.values.tolist() == [values[index] for index in indices]


@pytest.mark.parametrize(
    ("fraction", "size", "k"),
    [
        (0.1, 10, 1),
        (0.01, 10, 1),  # at least one
        (1e-9, 1, 1),
        (0.26, 10, 3),
        (0.24, 10, 2),
        (0.25, 10, 2),  # 2.5, half to even
        (0.35, 10, 4),  # 3.5, half to even
        (0.99, 10, 10),
        (1, 7, 7),
    ],
)
def test_topk_rounds_the_number_of_entries(fraction, size, k):
    assert encode(TopK(fraction), torch.arange(1.0, size + 1)).indices.tolist() == list(range(size - k, size))


def test_topk_chooses_over_the_whole_update_not_in_each_tensor():
    payload = encode(TopK(0.5), torch.tensor([1.0, 2.0, -30.0, 40.0]), (2, 2))
    assert payload.dense().tolist() == [0.0, 0.0, -30.0, 40.0]
    assert payload.sizes == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_sends_values_in_the_updates_dtype_and_compact_indices(dtype):
    payload = encode(TopK(0.5), torch.tensor([1.0, -4.0, 3.0, 0.5], dtype=dtype))
    assert payload.values.dtype == dtype
    assert payload.indices.dtype == torch.int32
    assert payload.num_bits == 8 * (4 + 1 + 2 * dtype.itemsize)  # framing, a byte of indices, two values


def test_topk_decodes_whatever_payload_came_before():
    sparse = encode(TopK(0.75), torch.tensor([1.0, -4.0, 3.0, 0.5]))
    assert TopK(0.25).encode(sparse, {}).payload.dense().tolist() == [0.0, -4.0, 0.0, 0.0]


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.01, 10, float("nan")])
def test_a_fraction_outside_its_range_is_refused_by_name_and_value(fraction):
    with pytest.raises(ValueError, match=r"TopK\(fraction=") as info:
        TopK(fraction)
    assert repr(fraction) in str(info.value)


@pytest.mark.parametrize("fraction", ["0.1", None, True, [0.1]])
def test_a_fraction_that_is_no_number_is_refused_by_name_and_value(fraction):
    with pytest.raises(TypeError, match=r"TopK\(fraction=") as info:
        TopK(fraction)
    assert repr(fraction) in str(info.value)


@given(seed=seeds, size=st.integers(1, 40))
@FAST
def test_signsgd_decodes_to_the_mean_magnitude_times_the_sign(seed, size):
    values = np.random.default_rng(seed).normal(size=size)
    payload = encode(SignSGD(), torch.tensor(values))
    assert isinstance(payload, Signs)
    expected = np.abs(values).sum() / size * np.sign(values)
    np.testing.assert_allclose(payload.dense().numpy(), expected, rtol=1e-12)
    assert payload.num_bits == 8 * -(-size // 8) + 64  # the scale is a float64 here


def test_signsgd_by_hand():
    # Mean magnitude (1 + 2 + 0 + 5) / 4 = 2; zero counts as positive.
    payload = encode(SignSGD(), torch.tensor([1.0, -2.0, 0.0, -5.0]), (3, 1))
    assert payload.dense().tolist() == [2.0, -2.0, 2.0, -2.0]
    assert payload.sizes == (3, 1)
    assert payload.num_bits == 8 + 32


def test_signsgd_sends_a_zero_update_as_zeros():
    assert encode(SignSGD(), torch.zeros(11)).dense().tolist() == [0.0] * 11


@pytest.mark.parametrize("stage", [TopK(0.3), SignSGD()])
def test_a_compressors_payload_does_not_alias_the_callers_buffer(stage):
    buffer = torch.arange(-6.0, 7.0)
    before = buffer.clone()
    payload = encode(stage, buffer)
    assert torch.equal(buffer, before)
    decoded = payload.dense().clone()
    buffer.fill_(99.0)
    assert torch.equal(payload.dense(), decoded)


def test_representations_show_the_settings():
    assert repr(TopK(0.1)) == "TopK(fraction=0.1)"
    assert repr(SignSGD()) == "SignSGD()"
