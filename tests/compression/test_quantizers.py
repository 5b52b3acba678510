"""Fewer bits a value and random entries: exact levels, true means, sizes by hand."""

import hashlib
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lbgm.compression import (
    ATOMO,
    QSGD,
    Cast,
    Context,
    ErrorFeedback,
    LookBack,
    PowerSGD,
    RandK,
    Ternary,
    TopK,
    as_chain,
    quantize,
)
from lightning_lbgm.compression.quantize import _Draws, _round_by_bytes
from lightning_lbgm.payloads.base import Dense
from lightning_lbgm.payloads.blocks import Blocks
from lightning_lbgm.payloads.coefficients import Coefficients
from lightning_lbgm.payloads.levels import Levels
from lightning_lbgm.payloads.rounded import Rounded
from lightning_lbgm.payloads.sparse import Sparse

seeds = st.integers(0, 2**32 - 1)
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def encode(stages, values, context=None, layout=None):
    chain = as_chain(stages)
    arguments = () if context is None else (context,)
    return chain.encode(Dense(values, layout), chain.init(), *arguments).payload


def drawn(stages, values, draws, seed=0):
    """Decoded updates of that many independent draws, shape (draws, M)."""
    return torch.stack([encode(stages, values, Context(index, seed=seed)).dense().double() for index in range(draws)])


def assert_mean(samples, expected, variance):
    """The mean over the rows is the expected one within five standard errors, entry by entry."""
    error = (samples.mean(0) - expected.double()).abs()
    assert bool((error <= 5 * (variance / len(samples)).sqrt() + 1e-6 * expected.double().abs()).all())


def scales_of(values, bucket_size, norm=False):
    """Scale of each entry: the largest magnitude of its bucket, or its Euclidean norm."""
    buckets = values.double().split(len(values) if bucket_size is None else bucket_size)
    scales = [bucket.norm() if norm else bucket.abs().max() for bucket in buckets]
    return torch.cat([scale.repeat(len(bucket)) for scale, bucket in zip(scales, buckets)])


# QSGD and Ternary


@pytest.mark.parametrize("scale", ["max", "norm"])
@pytest.mark.parametrize(
    ("levels", "bucket_size", "size"), [(1, 7, 20), (1, None, 30), (3, 512, 20), (7, 1, 6), (7, 5, 21), (127, 16, 33)]
)
def test_the_mean_of_qsgd_is_the_update(levels, bucket_size, size, scale):
    # Both dtypes with either scale, and with and without buckets.
    dtype = torch.float32 if (scale == "max") == (size in (20, 33)) else torch.float64
    values = torch.tensor(np.random.default_rng(levels).normal(size=size), dtype=dtype)
    steps = scales_of(values, bucket_size, scale == "norm") / levels
    # An entry between two levels goes up with the probability of its fraction: a Bernoulli variable times the step.
    fraction = (values.double() / steps) % 1
    samples = drawn([QSGD(levels, bucket_size, scale)], values, 1500)
    variance = fraction * (1 - fraction) * steps**2
    assert_mean(samples, values, variance)
    # The variance is what rounding at random must have, no less: nothing is rounded to the nearest.
    if bucket_size != 1:
        assert float(samples.var(0).sum()) == pytest.approx(float(variance.sum()), rel=0.1)


@pytest.mark.parametrize("share", [2.0**-12, 2.0**-6, 0.3, 1 - 2.0**-10])
@pytest.mark.parametrize("size", [3000, 300_000])
@pytest.mark.parametrize("levels", [1, 3])
def test_the_chance_of_an_entry_is_its_share_of_a_level_to_the_last_digit(levels, size, share):
    values = torch.full((size,), -share / levels)
    values[size // 3] = 1.0
    draws = 40
    sent = 0
    for index in range(draws):
        decoded = encode([QSGD(levels)], values, Context(index, seed=1)).dense()
        assert float(decoded[size // 3]) == 1.0
        others = torch.cat([decoded[: size // 3], decoded[size // 3 + 1 :]])
        multiples = (others * levels).round()
        assert bool(((multiples == -1) | (multiples == 0)).all())
        sent += int((others != 0).sum())
    number = draws * (size - 1)
    assert abs(sent - share * number) < 5 * math.sqrt(number * share * (1 - share)) + 1


@pytest.mark.parametrize("share", [2.0**-10, 0.05])
def test_entries_of_ternary_are_sent_as_if_independently(share):
    # Entries share fractions of a byte, 32 of these each. Were a pair's chances dependent, the number sent would vary
    # by more than a binomial one: at most by 1 + 32 / 256 times as much, because a byte of their own comes first.
    size, draws = 65_536, 600
    values = torch.full((size,), share)
    values[0] = 1.0
    payloads = [encode([Ternary()], values, Context(index, seed=3)) for index in range(draws)]
    sent = [payload.integers.levels.numel() - 1 for payload in payloads]
    assert 0.75 < np.var(sent) / (size * share * (1 - share)) < 1.35
    apart = torch.stack([payload.dense()[1:33] for payload in payloads])
    assert float(apart.mean(1).var() / (share * (1 - share) / 32)) == pytest.approx(1, abs=0.3)


def test_zeros_are_never_sent():
    values = torch.zeros(300_000)
    values[7], values[200_000] = -2.0, 1e-30
    for stage in (Ternary(), QSGD(7), QSGD(7, 512)):
        for index in range(10):
            assert set(encode([stage], values, Context(index, seed=0)).dense().nonzero().view(-1).tolist()) <= {
                7,
                200_000,
            }


@pytest.mark.parametrize("scale", ["max", "norm"])
@given(
    size=st.integers(1, 60),
    levels=st.integers(1, 127),
    bucket_size=st.one_of(st.none(), st.integers(1, 70)),
    seed=seeds,
    draw=seeds,
)
@settings(deadline=None, max_examples=60)
def test_qsgd_decodes_to_multiples_of_a_step_next_to_the_entry(scale, size, levels, bucket_size, seed, draw):
    values = torch.tensor(np.random.default_rng(seed).normal(size=size), dtype=torch.float32)
    payload = encode([QSGD(levels, bucket_size, scale)], values, Context(seed=draw))
    assert isinstance(payload, Levels)
    steps = scales_of(values, bucket_size, scale == "norm") / levels
    decoded = payload.dense()
    assert decoded.dtype == torch.float32
    multiples = decoded.double() / steps
    torch.testing.assert_close(multiples, multiples.round(), rtol=0, atol=1e-4)
    assert bool((multiples.abs().round() <= levels).all())
    below = (values.double() / steps - 1e-4).floor()
    above = (values.double() / steps + 1e-4).ceil()
    assert bool(((below <= multiples.round()) & (multiples.round() <= above)).all())


@pytest.mark.parametrize("levels", [1, 3, 7, 15, 31, 63, 127])
def test_entries_on_a_level_are_not_rounded(levels):
    values = torch.arange(-levels, levels + 1).float()
    for index in range(20):
        assert encode([QSGD(levels)], values, Context(index, seed=0)).dense().tolist() == values.tolist()
    few = torch.cat([values, torch.zeros(30 * len(values))])
    for index in range(20):
        assert encode([QSGD(levels)], few, Context(index, seed=0)).dense().tolist() == few.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["max", "norm"])
def test_every_dtype_keeps_its_largest_entry_and_sends_scales_of_its_own(dtype, scale):
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    for levels in (1, 5, 127):
        payload = encode([QSGD(levels, 50, scale)], values, Context(seed=levels))
        assert payload.scales.dtype == payload.dense().dtype == dtype
        assert len(payload.scales) == 4
        expected = [float(b.double().norm() if scale == "norm" else b.abs().max()) for b in values.split(50)]
        assert payload.scales.tolist() == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)
        if scale == "max":
            for before, after in zip(values.split(50), payload.dense().split(50)):
                largest = before.abs().argmax()
                assert float(after[largest]) == float(before[largest])


def test_buckets_of_zeros_stay_zero_and_do_not_touch_their_neighbours():
    values = torch.tensor([0.0, 0.0, 0.0, 4.0, -4.0, 0.0, 0.0])
    for index in range(20):
        assert encode([QSGD(7, 3)], values, Context(index, seed=0)).dense().tolist() == values.tolist()
    for stage in (QSGD(3), QSGD(3, scale="norm"), Ternary()):
        assert encode([stage], torch.zeros(5)).dense().tolist() == [0.0] * 5
        assert encode([stage], torch.zeros(0)).dense().tolist() == []
        assert not bool(encode([stage], torch.tensor([-0.0, -0.0])).scales.signbit())


@pytest.mark.parametrize("stage", [QSGD(1), QSGD(7), QSGD(127, 2), QSGD(5, scale="norm"), Ternary()], ids=repr)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 1e38])
def test_huge_and_tiny_updates_are_quantized_as_well(scale, stage):
    values = (torch.tensor([3.0, -1.0, 0.5, -2.9], dtype=torch.float64) * scale).float()
    decoded = drawn([stage], values, 200)
    assert bool(torch.isfinite(decoded.float()).all())
    step = 4.4 * scale / getattr(stage, "levels", 1)  # the norm is 4.33
    assert float((decoded - values.double()).abs().max()) <= step + 1e-44
    if getattr(stage, "scale", "max") == "max":
        assert decoded[:, 0].tolist() == [float(values[0])] * 200


@pytest.mark.parametrize("levels", [1, 7, 127])
@pytest.mark.parametrize("scale", ["max", "norm"])
def test_the_largest_number_of_the_dtype_stays_finite(levels, scale):
    largest = torch.finfo(torch.float32).max
    decoded = encode([QSGD(levels, scale=scale)], torch.tensor([largest, -largest])).dense()
    assert decoded.tolist() == pytest.approx([largest, -largest], rel=1e-6)


@pytest.mark.parametrize("stage", [QSGD(7), QSGD(7, 2), Ternary(), QSGD(3, scale="norm")], ids=repr)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_finite(wrong, stage):
    payload = encode([stage], torch.tensor([1.0, wrong, 2.0]))
    assert not payload.is_finite()
    assert payload.num_bits == 8 * len(payload.to_bytes())


@pytest.mark.parametrize("stage", [QSGD(3), QSGD(3, 100), Ternary()], ids=repr)
def test_qsgd_draws_alike_for_the_same_round_and_client_alone(stage):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))

    def decoded(**settings):
        return encode([stage], values, Context(**settings)).dense()

    first = decoded(round_index=4, seed=1, path=(2,))
    assert torch.equal(first, decoded(round_index=4, seed=1, path=(2,)))
    others = [
        decoded(round_index=5, seed=1, path=(2,)),
        decoded(round_index=4, seed=2, path=(2,)),
        decoded(round_index=4, seed=1, path=(3,)),
    ]
    for other in others:
        assert not torch.equal(first, other)


@pytest.mark.parametrize("stages", [[QSGD(3)], [RandK(0.3)]], ids=repr)
def test_without_a_context_each_call_draws_afresh_from_torchs_generator(stages):
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    one, two = encode(stages, values).dense(), encode(stages, values).dense()
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    assert torch.equal(encode(stages, values).dense(), one)


def test_two_stages_of_one_chain_do_not_draw_alike():
    # Were both seeded alike, the entries kept by the second would all stem from the first's.
    values = torch.arange(1.0, 101.0)
    first = encode([RandK(0.5, unbiased=False)], values, Context(seed=0)).dense() != 0
    both = encode([RandK(0.5, unbiased=False), RandK(0.5, unbiased=False)], values, Context(seed=0)).dense() != 0
    assert int(both.sum()) < int(first.sum())


@pytest.mark.parametrize(
    ("stage", "bits", "digest"),
    [
        (Ternary(), 35_072, "a7132a9c70f430c7"),
        (Ternary(8192), 43_768, "f966019ccca840ab"),
        (QSGD(7), 150_104, "c834a2dba4fb146b"),
        (QSGD(7, 512), 223_128, "a3576230a707a5e6"),
        (QSGD(100, 77), 696_680, "6e6830535b73f080"),
        (QSGD(3, 100_000), 83_400, "67575089eb4ac7ee"),
    ],
    ids=repr,
)
def test_a_seed_gives_the_same_bytes_in_every_version(stage, bits, digest):
    rng = np.random.default_rng(0)
    values = torch.tensor(rng.normal(size=150_001) * rng.random(150_001) ** 6, dtype=torch.float32)
    payload = encode([stage], values, Context(2, seed=1))
    assert payload.num_bits == bits
    assert hashlib.sha256(payload.to_bytes()).hexdigest()[:16] == digest


@given(
    size=st.integers(1, 3000),
    levels=st.integers(1, 127),
    bucket_size=st.one_of(st.just(0), st.integers(1, 300)),
    exponent=st.sampled_from([-20, -3, 0, 28]),
    on_levels=st.booleans(),
    seed=seeds,
)
@settings(deadline=None, max_examples=60)
def test_rounding_by_bytes_goes_up_if_the_byte_says_so(size, levels, bucket_size, exponent, on_levels, seed):
    rng = np.random.default_rng(seed)
    values = torch.tensor(rng.normal(size=size), dtype=torch.float32)
    if on_levels:
        values = values.mul_(64).round_() / 64
    values *= 10.0**exponent
    bucket_size = bucket_size if bucket_size < size else 0
    scales = torch.stack([bucket.abs().max() for bucket in values.split(bucket_size or size)])
    drawn_bytes = []

    class Recorded(_Draws):
        def bytes(self, count):
            drawn_bytes.append(super().bytes(count).copy())
            return drawn_bytes[-1]

    with mock.patch.object(quantize, "_Draws", Recorded):
        found = _round_by_bytes(values, scales, levels, bucket_size, torch.Generator().manual_seed(seed))
    # The uniform number of an entry is between its byte and the next, in 256ths; an entry goes up if it is below the
    # entry's fraction. Numbers in double precision, but rounded to single precision twice.
    wide = scales.repeat_interleave(bucket_size or size)[:size].clamp(min=1e-37)
    numbers = (values / wide * levels).double().numpy()
    first = np.concatenate(drawn_bytes).astype(float)
    least, most = (np.floor(numbers + 1 - (first + end) / 256 - 1e-12) for end in (1, 0))
    got = found.everywhere().numpy()
    assert ((least <= got) & (got <= most + 1)).all()
    assert (np.abs(got - numbers) < 1).all()
    is_whole = numbers == np.floor(numbers)
    assert (got[is_whole] == numbers[is_whole]).all()
    is_known = (least == most) & ~is_whole
    assert (got[is_known] == most[is_known]).all()


def test_ternary_is_qsgd_of_one_level():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for bucket_size in (None, 64):
        one = encode([Ternary(bucket_size)], values, Context(seed=0))
        assert torch.equal(one.dense(), encode([QSGD(1, bucket_size)], values, Context(seed=0)).dense())


@given(seed=seeds, levels=st.integers(1, 127), bucket_size=st.one_of(st.none(), st.integers(1, 12)))
@settings(deadline=None, max_examples=40)
def test_after_topk_only_what_is_kept_is_quantized(seed, levels, bucket_size):
    values = torch.tensor(np.random.default_rng(seed).normal(size=40), dtype=torch.float32)
    payload = encode([TopK(0.25), QSGD(levels, bucket_size)], values, Context(seed=seed))
    kept = np.sort(np.argsort(-values.abs().numpy())[:10])
    assert isinstance(payload, Sparse)
    assert isinstance(payload.body, Levels)
    assert payload.indices.tolist() == kept.tolist()
    steps = scales_of(values[kept], bucket_size) / levels
    assert bool(((payload.dense()[kept] - values[kept]).abs() <= 1.001 * steps).all())
    dropped = np.setdiff1d(np.arange(40), kept)
    assert payload.dense()[dropped].tolist() == [0.0] * 30
    # Ten codes of no more than the fixed width, their scales and four or five bytes instead of ten floats.
    plain = encode([TopK(0.25)], values).num_bits
    width = (2 * levels).bit_length()
    scales = 1 if bucket_size is None or bucket_size >= 10 else math.ceil(10 / bucket_size)
    framing = 3 if bucket_size is None or bucket_size >= 10 else 4
    assert payload.num_bits <= plain - 10 * 32 + 8 * (framing + math.ceil(10 * width / 8)) + 32 * scales


@pytest.mark.parametrize("stage", [ATOMO(1), PowerSGD(1)], ids=repr)
def test_qsgd_after_a_factorization_errs_alike_at_any_scale(stage):
    rng = np.random.default_rng(0)
    values = torch.tensor(np.outer(rng.normal(size=20), rng.normal(size=16)).reshape(-1), dtype=torch.float32)

    def mean_error(factor):
        errors = [
            encode([stage, QSGD(31)], factor * values, Context(i, seed=0), [(20, 16)]).dense() / factor - values
            for i in range(60)
        ]
        return float(torch.stack(errors).norm(dim=1).mean() / values.norm())

    expected = mean_error(1.0)
    for scale in (1e-4, 1e-2, 1e2):
        assert mean_error(scale) == pytest.approx(expected, rel=0.5)


def test_parts_of_a_quantized_update_decode_to_its_parts():
    layout = [(3, 5), (4,), (), (2, 3), (0,), (400,)]
    values = torch.randn(426, generator=torch.Generator().manual_seed(1))
    values[40:] *= 0.01  # few of the last part are sent
    for levels in (1, 15, 127):
        for bucket_size in (None, 1, 4, 7, 100):
            payload = encode([QSGD(levels, bucket_size)], values, Context(seed=0), layout)
            parts = payload.split()
            assert [part.layout.shapes for part in parts] == [(shape,) for shape in layout]
            assert torch.equal(torch.cat([part.dense() for part in parts]), payload.dense())
            ends = np.cumsum([0, 15, 4, 1, 6, 0, 400])
            for part, begin, end in zip(parts, ends, ends[1:]):
                touched = {i // (bucket_size or 426) for i in range(begin, end)}
                assert len(part.scales) == len(touched)
                assert part.num_bits == 8 * len(part.to_bytes())


@pytest.mark.parametrize("stages", [[QSGD(3)], [Cast()]], ids=repr)
def test_after_topk_a_look_back_by_layer_still_sends_few_bits_a_value(stages):
    values = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    layout = [(40, 50), (2000,)]
    plain = encode([TopK(0.1), *stages], values, layout=layout).num_bits
    by_layer = encode([TopK(0.1), *stages, LookBack(0.5, "layer")], values, layout=layout).num_bits
    assert by_layer < 1.2 * plain


@pytest.mark.parametrize("levels", [0, 128, 4.0, True, "7"])
def test_levels_out_of_range_are_refused(levels):
    error = ValueError if type(levels) is int else TypeError
    with pytest.raises(error, match=rf"QSGD\(levels=.*{levels!r}"):
        QSGD(levels)


@pytest.mark.parametrize("stage", [QSGD, Ternary])
@pytest.mark.parametrize(("bucket_size", "error"), [(0, ValueError), (-3, ValueError), ("many", TypeError)])
def test_bucket_sizes_out_of_range_are_refused(stage, bucket_size, error):
    with pytest.raises(error, match=rf"{stage.__name__}\(bucket_size=.*{bucket_size!r}"):
        stage(bucket_size=bucket_size)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"QSGD\(scale=.*'max'.*'norm'.*'mean'"):
        QSGD(scale="mean")


@pytest.mark.parametrize(("bits", "levels"), [(2, 1), (4, 7), (8, 127)])
def test_bits_are_an_old_name_of_levels(bits, levels):
    with pytest.warns(FutureWarning, match=rf"write `QSGD\({levels}, bucket_size=512\)`"):
        stage = QSGD(bits=bits)
    assert repr(stage) == f"QSGD(levels={levels}, bucket_size=512)"
    with pytest.warns(FutureWarning, match="bucket_size=8"):
        assert repr(QSGD(bits=bits, bucket_size=8)) == f"QSGD(levels={levels}, bucket_size=8)"
    with pytest.raises(TypeError, match="leave `bits` out"):
        QSGD(3, bits=4)
    with pytest.raises(ValueError, match=r"QSGD\(bits=.*9"):
        QSGD(bits=9)


# Cast


@given(name=st.sampled_from(list(FORMATS)), size=st.integers(1, 50), seed=seeds, double=st.booleans())
@settings(deadline=None, max_examples=60)
def test_cast_rounds_as_torch_does_and_decodes_in_the_updates_dtype(name, size, seed, double):
    dtype = torch.float64 if double else torch.float32
    values = torch.tensor(np.random.default_rng(seed).normal(size=size) * 100, dtype=dtype)
    payload = encode([Cast(FORMATS[name])], values)
    assert payload.dtype == payload.dense().dtype == dtype
    assert torch.equal(payload.dense(), values.to(FORMATS[name]).to(dtype))
    if name == "float32" and not double:
        assert isinstance(payload, Dense)  # nothing to take away
        assert payload.num_bits == 32 * size
    else:
        assert payload.num_bits == 8 + (32 if name == "float32" else 16) * size
    assert encode([Cast(name)], values).to_state().keys() == payload.to_state().keys()
    assert torch.equal(encode([Cast(f"torch.{name}")], values).dense(), payload.dense())


def test_cast_to_the_range_of_the_format_and_no_further():
    # 65519 is nearer to 65504 than to 65536, 65521 is not, and float16 has no 65536: its largest is taken.
    values = torch.tensor([65504.0, 65519.0, 65521.0, -65535.0, 1e-10])
    assert encode([Cast("float16")], values).dense().tolist() == [65504, 65504, 65504, -65504, 0]
    # From 65536 on all are divided by two: steps are twice as wide, also for 7 * 2^-24.
    values = torch.tensor([65536.0, -70000.0, 65504.0, 7 * 2.0**-24])
    assert encode([Cast("float16")], values).dense().tolist() == [65536, -70016, 65504, 8 * 2.0**-24]
    largest = torch.finfo(torch.float32).max
    decoded = encode([Cast("bfloat16")], torch.tensor([largest, -largest])).dense()
    expected = (2 - 2**-7) * 2.0**127  # eight bits of precision
    assert decoded.tolist() == [expected, -expected]
    decoded = encode([Cast("float32")], torch.tensor([1e300, -1e300, 0.1], dtype=torch.float64)).dense()
    assert decoded.tolist() == pytest.approx([1e300, -1e300, 0], rel=2**-24)


def test_cast_after_topk_rounds_what_is_kept():
    values = torch.tensor([0.1, -3.001, 0.2, 5.003])
    payload = encode([TopK(0.5), Cast("bfloat16")], values)
    assert isinstance(payload.body, Rounded)
    assert payload.dense().tolist() == [
        0.0,
        float(torch.tensor(-3.001).bfloat16()),
        0.0,
        float(torch.tensor(5.003).bfloat16()),
    ]
    # Two values of 16 bits and a byte for the format, instead of 64 bits.
    assert payload.num_bits == encode([TopK(0.5)], values).num_bits - 64 + 32 + 8


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_a_look_back_after_cast_keeps_half_the_memory_and_sends_coefficients_of_32_bits(seed):
    values = torch.tensor(np.random.default_rng(seed).normal(size=100), dtype=torch.float32)
    chain = as_chain([Cast(), LookBack(0.1)])
    client, server = chain.init(), chain.init()
    chain.decode(chain.encode(Dense(values), client).payload, server)
    for state in (client, server):
        kept = state["stages"][1]["lbgs"][0]["payloads"][0]["values"]
        assert kept.dtype == torch.bfloat16
        assert kept.untyped_storage().nbytes() == 200
    second = chain.encode(Dense(3 * values), client).payload
    assert isinstance(second, Coefficients)
    assert second.num_bits == 32
    # <g, l> / |l|^2 with g = the rounded 3 v and l = the rounded v; 3 is exact up to the rounding of bfloat16.
    update, lbg = (3 * values).bfloat16().double(), values.bfloat16().double()
    assert second.values.tolist() == pytest.approx([float(update @ lbg / (lbg @ lbg))], rel=1e-6)
    assert chain.decode(second, server).dense().tolist() == pytest.approx((3 * values).tolist(), rel=0.02)


@pytest.mark.parametrize("dtype", ["float64", "int8", "nothing", torch.float64, torch.int32, 16, None, "finfo"])
def test_formats_that_are_none_are_refused_by_name_and_value(dtype):
    with pytest.raises(ValueError, match=rf"Cast\(dtype=.*{dtype!r}"):
        Cast(dtype)


def test_cast_names_its_format():
    assert repr(Cast("float16")) == repr(Cast(torch.float16)) == "Cast(dtype=torch.float16)"


# RandK


@pytest.mark.parametrize(
    ("fraction", "size", "k", "dtype"),
    [
        (0.1, 31, 3, torch.float32),
        (0.5, 9, 4, torch.float64),
        (0.9, 10, 9, torch.float32),
        (0.01, 7, 1, torch.float64),
        (1.0, 6, 6, torch.float32),
    ],
)
def test_the_mean_of_randk_is_the_update(fraction, size, k, dtype):
    values = torch.tensor(np.random.default_rng(k).normal(size=size), dtype=dtype)
    samples = drawn([RandK(fraction)], values, 2500)
    assert (samples != 0).sum(1).tolist() == [k] * 2500
    # An entry is kept with probability p = k / M, and then is v / p: the variance is v^2 (1 - p) / p.
    share = k / size
    assert_mean(samples, values, values.double() ** 2 * (1 - share) / share)
    assert bool((((samples * share - values.double()).abs() < 1e-6) | (samples == 0)).all())


def test_randk_draws_pairs_without_replacement():
    # Each of the 10 pairs of 5 entries has probability 1 / 10.
    samples = drawn([RandK(0.4, unbiased=False)], torch.ones(5), 2000)
    together = (samples.T @ samples) / 2000
    expected = torch.full((5, 5), 0.1, dtype=torch.float64).fill_diagonal_(0.4)
    assert float((together - expected).abs().max()) <= 5 * math.sqrt(0.4 * 0.6 / 2000)


def test_randk_indices_follow_from_the_seed_alone():
    one = encode([RandK(0.3)], torch.ones(50), Context(3, seed=1, path=(2,)))
    other = encode([RandK(0.3)], -5 * torch.ones(50, dtype=torch.float64), Context(3, seed=1, path=(2,)))
    assert one.seed == other.seed
    assert torch.equal(one.dense() != 0, other.dense() != 0)
    seen = {one.seed}
    for changed in (Context(4, seed=1, path=(2,)), Context(3, seed=2, path=(2,)), Context(3, seed=1, path=(3,))):
        seen.add(encode([RandK(0.3)], torch.ones(50), changed).seed)
    assert len(seen) == 4
    # The payload carries nothing else that says where its values stand.
    assert [tensor.tolist() for tensor in one.tensors()] == [[1.0] * 15]
    # 8 bytes of seed; whether scaled, how many, which kind: a byte each.
    assert one.num_bits == 8 * 11 + 15 * 32


@given(seed=seeds, size=st.integers(1, 40), fraction=st.floats(0.01, 1.0))
@settings(deadline=None, max_examples=50)
def test_biased_randk_sends_entries_as_they_are(seed, size, fraction):
    values = torch.tensor(np.random.default_rng(seed).normal(size=size), dtype=torch.float32)
    payload = encode([RandK(fraction, unbiased=False)], values, Context(seed=seed))
    kept = payload.dense() != 0
    assert int(kept.sum()) == max(1, round(fraction * size))
    assert torch.equal(payload.dense(), torch.where(kept, values, 0.0))
    scaled = encode([RandK(fraction)], values, Context(seed=seed)).dense()
    torch.testing.assert_close(scaled, payload.dense() * size / int(kept.sum()))


def test_error_feedback_around_biased_randk_sends_the_whole_sum():
    chain = as_chain([ErrorFeedback(RandK(0.2, unbiased=False))])
    state, sent, total = chain.init(), torch.zeros(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    rng = np.random.default_rng(0)
    for index in range(200):
        values = torch.tensor(rng.normal(size=30) + 1)
        total += values
        sent += chain.encode(Dense(values), state, Context(index, seed=0)).payload.dense()
        residual = state["stages"][0]["residual"]
        torch.testing.assert_close(sent + residual, total)
    # What is missing of 200 updates is what was not drawn lately: five rounds' worth in the mean.
    assert float((total - sent).abs().mean()) < 15
    assert float(total.abs().mean()) > 180


def test_values_of_randk_can_be_quantized_and_cast():
    values = torch.arange(1.0, 101.0)
    quantized = encode([RandK(0.2), QSGD(7)], values, Context(seed=0))
    plain = encode([RandK(0.2)], values, Context(seed=0))
    assert torch.equal(quantized.dense() == 0, (quantized.dense() == 0) | (plain.dense() == 0))
    step = 5 * float(plain.body.dense().max()) / 7
    assert float((quantized.dense() - plain.dense()).abs().max()) <= 1.001 * step
    # No more than 20 codes of 4 bits, a scale, three bytes of framing.
    assert quantized.num_bits <= 8 * 11 + 80 + 32 + 24
    cast = encode([RandK(0.2), Cast()], values, Context(seed=0))
    assert torch.equal(cast.dense(), encode([RandK(0.2)], values.bfloat16().float(), Context(seed=0)).dense())
    assert cast.num_bits == 8 * 11 + 20 * 16 + 8


def test_randk_splits_into_parts_that_need_no_seed():
    values = torch.arange(1.0, 25.0)
    payload = encode([RandK(0.5)], values, Context(seed=0), [(4, 3), (7,), (5,)])
    parts = payload.split()
    assert [part.size for part in parts] == [12, 7, 5]
    assert torch.equal(Blocks(parts).dense(), payload.dense())


@pytest.mark.parametrize(
    ("fraction", "error"), [(0, ValueError), (1.5, ValueError), ("half", TypeError), (True, TypeError)]
)
def test_fractions_out_of_range_are_refused(fraction, error):
    with pytest.raises(error, match=rf"RandK\(fraction=.*{fraction!r}"):
        RandK(fraction)


@pytest.mark.parametrize("dot_with", ["randk", "dense", "topk", "itself"])
@given(seed=seeds)
@settings(deadline=None, max_examples=10)
def test_inner_products_are_those_of_what_is_decoded(dot_with, seed):
    rng = np.random.default_rng(seed)
    one, two = (torch.tensor(rng.normal(size=30)) for _ in range(2))
    for stages in (
        [RandK(0.3)],
        [QSGD(7, 8)],
        [QSGD(1, scale="norm")],
        [Cast()],
        [RandK(0.5), QSGD(3)],
        [TopK(0.5), QSGD(3)],
    ):
        a = encode(stages, one, Context(seed=seed))
        others = {"randk": [RandK(0.6)], "dense": [], "topk": [TopK(0.3)]}
        b = a if dot_with == "itself" else encode(others[dot_with], two, Context(seed=seed + 1))
        assert a.dot(b) == pytest.approx(float(a.dense() @ b.dense()), rel=1e-9, abs=1e-9)
        assert b.dot(a) == pytest.approx(a.dot(b), rel=1e-12, abs=1e-12)


def test_levels_may_be_a_function_of_the_round():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    stage = QSGD(lambda round_index: 1 if round_index < 3 else 4)
    for index, levels in ((0, 1), (2, 1), (3, 4)):
        context = Context(index, seed=0)
        assert torch.equal(encode([stage], values, context).dense(), encode([QSGD(levels)], values, context).dense())
    with pytest.raises(ValueError, match=r"`QSGD\(levels=...\)` must be from 1 to 127; got 0"):
        encode([QSGD(lambda round_index: 0)], values, Context(0, seed=0))
