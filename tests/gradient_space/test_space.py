"""The gradients on disk and their inner products: against numpy on stacks that fit in memory."""

from __future__ import annotations

import itertools
import tempfile
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from lightning_lbgm.gradient_space import space as gradient_space
from lightning_lbgm.gradient_space.space import GradientSpace

LAYOUT = [(5, 4), 7, (), (3, 1, 2)]
BOUNDS = [0, 20, 27, 28, 34]


def draw_gradients(count, seed=0):
    return torch.randn(count, 34, generator=torch.Generator().manual_seed(seed))


def fill(folder, gradients, **settings):
    space = GradientSpace(folder, LAYOUT, **settings)
    for gradient in gradients:
        space.add(gradient)
    return space


def test_the_gram_matrices_are_those_of_the_stack_and_of_its_parts(tmp_path):
    gradients = draw_gradients(6)
    space = fill(tmp_path, gradients)
    whole = gradients.double()
    torch.testing.assert_close(space.gram(), whole @ whole.T, rtol=1e-12, atol=1e-12)
    for layer, (begin, end) in enumerate(itertools.pairwise(BOUNDS)):
        part = whole[:, begin:end]
        torch.testing.assert_close(space.gram(layer), part @ part.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(space.gram(layer) for layer in range(4)), space.gram())


@given(st.integers(1, 200), st.integers(1, 40))
def test_the_size_of_the_blocks_changes_nothing(mapped, block):
    gradients = draw_gradients(5)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_space, "_MAPPED", mapped)
        patch.setattr(gradient_space, "_BLOCK", block)
        space = fill(folder, gradients)
    torch.testing.assert_close(space.gram(), gradients.double() @ gradients.double().T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("center", ["entries", "epochs", None])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_components_after_each_gradient_equal_those_of_a_decomposition_of_the_stack(tmp_path, center, momentum):
    gradients = draw_gradients(8) * torch.logspace(0, -2, 8)[torch.randperm(8)][:, None] + 0.1
    space = GradientSpace(tmp_path, LAYOUT, center=center, momentum=momentum)
    stack, last = [], np.zeros(34)
    for gradient in gradients:
        space.add(gradient)
        last = momentum * last + gradient.double().numpy()
        stack.append(last)
        want = []
        for begin, end in [(0, 34), *itertools.pairwise(BOUNDS)]:
            part = np.array(stack)[:, begin:end]
            if center is not None:
                part = part - part.mean(1 if center == "entries" else 0, keepdims=True)
            variances = np.linalg.svd(part, compute_uv=False) ** 2
            total = variances.sum()
            want.append(int((np.cumsum(variances) < 0.95 * total).sum() + 1) if total > 1e-12 else 0)
        assert space.components(0.95) == want
        assert space.num_components(0.95) == want[0]


def test_the_default_centering_is_that_of_the_authors_code(tmp_path):
    gradients = draw_gradients(6) + 3
    space = fill(tmp_path, gradients)
    ratios = np.cumsum(PCA().fit(gradients[:, :20].numpy().T).explained_variance_ratio_)
    assert space.components(0.9)[1] == int((ratios < 0.9).sum() + 1)


def test_cosines_by_hand(tmp_path):
    space = GradientSpace(tmp_path, [2, 1], center=None)
    for gradient in ([3.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 2.0]):
        space.add(torch.tensor(gradient))
    assert space.cosines().tolist() == [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]]
    # The tensor of one entry has a gradient in the last epoch only.
    assert space.cosines(1).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert space.last_cosines().tolist() == [0, 0, 0]
    assert space.last_norms().tolist() == [2, 0, 2]
    # Its one principal direction is parallel to the last gradient alone, up to its sign.
    assert space.principal_cosines(0.99, 1).abs().tolist() == [[0, 0, 1]]


def test_principal_directions_explain_the_gradients(tmp_path):
    """Of gradients in a plane two directions explain all: the squared cosines of each gradient add up to 1."""
    plane = draw_gradients(2, seed=3)
    gradients = torch.randn(7, 2, generator=torch.Generator().manual_seed(1)) @ plane
    space = fill(tmp_path, gradients, center=None)
    cosines = space.principal_cosines(0.999999)
    assert cosines.shape == (2, 7)
    torch.testing.assert_close(cosines.square().sum(0), torch.ones(7, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_stored_as_float32(tmp_path, dtype):
    gradients = draw_gradients(2).to(dtype)
    space = fill(tmp_path, gradients)
    np.testing.assert_array_equal(space.gradients, gradients.float().numpy())
    assert space.gradients.dtype == np.float32


def test_the_gradients_lie_in_a_file_that_is_mapped(tmp_path):
    space = fill(tmp_path, draw_gradients(3))
    assert isinstance(space.gradients, np.memmap)
    assert not space.gradients.flags.writeable
    assert (tmp_path / "gradients.f32").stat().st_size == 3 * 34 * 4


def test_memory_holds_a_few_vectors_and_never_all(tmp_path):
    """12 gradients of a million entries are 48 MB; what Python allocates stays below a vector and some blocks."""
    space = GradientSpace(tmp_path, [600_000, 400_000])
    tracemalloc.start()
    for k in range(12):
        space.add(torch.full((1_000_000,), float(k + 1)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    assert space.gram()[3, 11] == 4 * 12 * 1_000_000


def test_state_and_file_continue_the_analysis(tmp_path):
    gradients = draw_gradients(6)
    unbroken = fill(tmp_path / "a", gradients)
    first = fill(tmp_path / "b", gradients[:4])
    state = first.state_dict()
    for gradient in draw_gradients(4, seed=9):  # the run went on after the checkpoint
        first.add(gradient)
    resumed = GradientSpace(tmp_path / "b", LAYOUT)
    resumed.load_state_dict(state)
    assert resumed.count == 4
    for gradient in gradients[4:]:
        resumed.add(gradient)
    assert torch.equal(resumed.gram(), unbroken.gram())
    assert resumed.components(0.99) == unbroken.components(0.99)
    assert (tmp_path / "b" / "gradients.f32").read_bytes() == (tmp_path / "a" / "gradients.f32").read_bytes()


def test_the_state_is_of_builtins_and_tensors(tmp_path):
    torch.save(fill(tmp_path / "a", draw_gradients(3)).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["products"].shape == (4, 3 * 4 // 2)


@pytest.mark.parametrize("count", [0, 1])
def test_a_state_of_few_gradients_continues(tmp_path, count):
    space = fill(tmp_path, draw_gradients(count))
    resumed = GradientSpace(tmp_path, LAYOUT)
    resumed.load_state_dict(space.state_dict())
    resumed.add(draw_gradients(1, seed=5)[0])
    assert resumed.gram().shape == (count + 1, count + 1)


def test_another_runs_file_is_refused(tmp_path):
    state = fill(tmp_path / "a", draw_gradients(3)).state_dict()
    fill(tmp_path / "b", draw_gradients(3, seed=1))
    with pytest.raises(ValueError, match=r"gradients\.f32 holds the gradients of another run"):
        GradientSpace(tmp_path / "b", LAYOUT).load_state_dict(state)


def test_a_file_that_is_too_short_is_refused(tmp_path):
    state = fill(tmp_path / "a", draw_gradients(3)).state_dict()
    fill(tmp_path / "b", draw_gradients(2))
    with pytest.raises(ValueError, match=r"holds 2 gradients of 3 earlier epochs"):
        GradientSpace(tmp_path / "b", LAYOUT).load_state_dict(state)
    with pytest.raises(ValueError, match=r"holds 0 gradients of 3 earlier epochs"):
        GradientSpace(tmp_path / "c", LAYOUT).load_state_dict(state)
    with pytest.raises(ValueError, match="the trainable parameters have changed"):
        GradientSpace(tmp_path / "a", [34]).load_state_dict(state)


def test_the_first_gradient_replaces_an_earlier_file(tmp_path):
    fill(tmp_path, draw_gradients(5))
    space = fill(tmp_path, draw_gradients(1, seed=1))
    assert (tmp_path / "gradients.f32").stat().st_size == 34 * 4
    assert space.gram().shape == (1, 1)


def test_discarding_deletes_the_file_and_leaves_what_else_is_there(tmp_path):
    space = fill(tmp_path / "a", draw_gradients(2))
    gram = space.gram()
    space.discard()
    assert not (tmp_path / "a").exists()
    assert torch.equal(space.gram(), gram)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").touch()
    fill(tmp_path / "b", draw_gradients(2)).discard()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["notes.txt"]


def test_what_does_not_fit_is_refused(tmp_path):
    space = GradientSpace(tmp_path, LAYOUT)
    with pytest.raises(ValueError, match=r"must have the shape \(34,\), got \(5,\)"):
        space.add(torch.zeros(5))
    with pytest.raises(ValueError, match="not finite in float32"):
        space.add(torch.full((34,), 1e300, dtype=torch.float64))
    with pytest.raises(ValueError, match="No gradient was added yet"):
        space.num_components(0.95)
    assert space.count == 0
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="`layout` has no entries"):
        GradientSpace(tmp_path, [])
    with pytest.raises(ValueError, match="`center` must be 'entries', 'epochs' or None, got 'mean'"):
        GradientSpace(tmp_path, LAYOUT, center="mean")
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got 1"):
        GradientSpace(tmp_path, LAYOUT, momentum=1)
