"""Labels are found without loading an example, and are one class for each."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_lbgm.data import find_labels


class Unloadable(Dataset):
    """Examples cannot be loaded, so labels must be read off an attribute."""

    def __init__(self, size, **attributes):
        self.size = size
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        raise AssertionError("an example was loaded")


def indices_into_sorted(labels):
    """Class indices by the documented rule, computed without NumPy."""
    order = sorted(set(labels))
    return [order.index(label) for label in labels]


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize(
    "values",
    [
        [5, 2, 5, 9],
        (5, 2, 5, 9),
        np.array([5, 2, 5, 9], dtype=np.uint8),
        torch.tensor([5, 2, 5, 9]),
        torch.tensor([5.0, 2.0, 5.0, 9.0]),  # whole numbers stored as reals are classes
        torch.tensor([[5], [2], [5], [9]]),
    ],
    ids=["list", "tuple", "numpy", "tensor", "whole floats", "column"],
)
def test_labels_are_read_off_the_attribute_and_become_indices_into_the_sorted_labels(name, values):
    found = find_labels(Unloadable(4, **{name: values}))
    # Sorted distinct labels: 2, 5, 9.
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 0, 1, 2]


def test_targets_go_before_labels():
    assert find_labels(Unloadable(2, targets=[0, 1], labels=[1, 0])).tolist() == [0, 1]


def test_an_attribute_that_is_none_or_a_method_is_passed_over():
    class WithMethod(Unloadable):
        def targets(self):
            raise AssertionError("called")

    assert find_labels(WithMethod(2, labels=[1, 0])).tolist() == [1, 0]
    assert find_labels(Unloadable(2, targets=None, labels=[1, 0])).tolist() == [1, 0]


def test_tensor_dataset_labels_are_its_last_tensor():
    data = TensorDataset(torch.tensor([1, 1, 1]), torch.zeros(3, 2), torch.tensor([4, 8, 4]))
    assert find_labels(data).tolist() == [0, 1, 0]


def test_boolean_labels_are_two_classes():
    assert find_labels(Unloadable(3, targets=torch.tensor([True, False, True]))).tolist() == [1, 0, 1]


def test_labels_are_found_through_nested_subsets_and_concatenations():
    left = Unloadable(4, targets=[10, 11, 12, 13])
    right = TensorDataset(torch.zeros(3), torch.tensor([20, 21, 22]))
    both = ConcatDataset([Subset(left, [3, 1]), right])  # 13 11 20 21 22
    nested = Subset(Subset(both, [4, 0, 1, 2]), np.array([2, 0, 1]))  # of 22 13 11 20: 11 22 13
    assert find_labels(nested).tolist() == [0, 2, 1]
    assert find_labels(ConcatDataset([both, nested])).tolist() == indices_into_sorted([13, 11, 20, 21, 22, 11, 22, 13])


def test_absent_classes_of_a_subset_take_no_index():
    data = Unloadable(5, targets=[0, 1, 2, 3, 4])
    assert find_labels(Subset(data, [4, 2])).tolist() == [1, 0]


@pytest.mark.parametrize(
    "given_labels",
    [torch.tensor([3, 1, 3]), np.array([3, 1, 3]), ["dog", "cat", "dog"], torch.tensor([[3], [1], [3]])],
    ids=["tensor", "numpy", "strings", "column"],
)
def test_given_labels_are_used_instead_of_the_datasets(given_labels):
    assert find_labels(Unloadable(3, targets=[0, 1, 2]), given_labels).tolist() == [1, 0, 1]


def test_labels_that_need_a_gradient_are_read():
    values = torch.tensor([1.0, 0.0], requires_grad=True)
    assert find_labels(Unloadable(2, targets=values)).tolist() == [1, 0]


@given(st.lists(st.one_of(st.integers(-(2**40), 2**40)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
def test_integers_of_any_size_and_sign_are_indexed_in_sorted_order(labels):
    assert find_labels(Unloadable(len(labels), targets=labels)).tolist() == indices_into_sorted(labels)


@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=3), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_strings_are_indexed_in_sorted_order(labels):
    assert find_labels(Unloadable(len(labels)), labels).tolist() == indices_into_sorted(labels)


@pytest.mark.parametrize("data", [Unloadable(3), TensorDataset(torch.zeros(3, 2)), Subset(Unloadable(3), [0])])
def test_a_dataset_without_labels_is_refused_with_the_way_out(data):
    with pytest.raises(ValueError, match=r"cannot be found.*IIDPartitioner\(\)"):
        find_labels(data)


def test_the_error_names_the_dataset_that_has_no_labels():
    with pytest.raises(ValueError, match="Unloadable has no `targets`"):
        find_labels(ConcatDataset([Unloadable(2, targets=[0, 1]), Unloadable(2)]))


@pytest.mark.parametrize("values", [[0.5, 1.0, 2.0], [0.0, float("nan"), 1.0]])
def test_real_valued_labels_are_refused(values):
    with pytest.raises(ValueError, match="real numbers, not classes"):
        find_labels(TensorDataset(torch.zeros(3), torch.tensor(values)))


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3], torch.zeros(3, 2), np.zeros((3, 1, 1)), []])
def test_labels_that_are_not_one_for_each_example_are_refused(labels):
    with pytest.raises(ValueError, match="one class for each of the 3 examples"):
        find_labels(Unloadable(3), labels)
