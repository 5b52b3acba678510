"""Labels are found without loading an example, and are one class for each."""

import datetime

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_lbgm.data import NaturalPartitioner, find_labels, make_partitions


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


def test_real_valued_labels_are_refused():
    with pytest.raises(ValueError, match="real numbers, not classes"):
        find_labels(TensorDataset(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0])))


NAN = float("nan")
MISSING = {
    "None among integers": ([3, 1, None, 3, None], 2, 2),
    "None among strings": (["a", None, "b", "a", "b"], 1, 1),
    "NaN among strings": (["a", "b", NAN, "a", "b"], 1, 2),
    "NaN among integers": ([1, 2, 3, NAN, 1], 1, 3),
    "NumPy reals": (np.array([NAN, 1.0, NAN, NAN, 0.0]), 3, 0),
    "NumPy objects": (np.array(["a", "b", "a", None, "b"], dtype=object), 1, 3),
    "tensor": (torch.tensor([0.0, 1.0, 1.0, 0.0, NAN]), 1, 4),
    "half precision": (torch.tensor([0.0, 1.0, NAN, 0.0, 1.0], dtype=torch.bfloat16), 1, 2),
    "column": (torch.tensor([[0.0], [NAN], [1.0], [0.0], [1.0]]), 1, 1),
    "masked": (np.ma.masked_array([1, 2, 1, 2, 1], [0, 0, 0, 1, 1]), 2, 3),
    "dates": (np.array(["2020-01-01", "NaT", "2020-01-02", "NaT", "NaT"], dtype="datetime64[D]"), 3, 1),
    "series": (pandas.Series([1, None, 3, 1, 3], index=[9, 8, 7, 6, 5]), 1, 1),
    "series of strings": (pandas.Series(["a", "b", None, "a", "b"], dtype="string"), 1, 2),
    "series of nullable integers": (pandas.Series([1, 2, 1, 2, None], dtype="Int64"), 1, 4),
    "categorical": (pandas.Categorical(["a", None, "b", "a", "b"]), 1, 1),
    "series of times": (pandas.Series(pandas.to_datetime(["2020-01-01", None, None, None, None])), 4, 1),
}


def as_labels(values):
    find_labels(Unloadable(len(values)), values)


def as_targets(values):
    find_labels(Unloadable(len(values), targets=values))


def as_ids(values):
    make_partitions(Unloadable(len(values)), 2, NaturalPartitioner(values), seed=0)


USES = [as_labels, as_targets, as_ids]


@pytest.mark.parametrize(("values", "number", "position"), MISSING.values(), ids=MISSING.keys())
@pytest.mark.parametrize("use", USES)
def test_missing_labels_and_ids_are_counted_and_placed(use, values, number, position):
    message = rf"{number} of 5 are missing \(None or NaN\), the first at position {position}"
    with pytest.raises(ValueError, match=message):
        use(values)


@pytest.mark.parametrize("use", [as_labels, as_ids])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, "1"], "1 at position 0 of type int and '1' at position 2 of type str"),
        (["a", b"b", "c"], "'a' at position 0 of type str and b'b' at position 1 of type bytes"),
        ([object(), object(), object()], "type object, which cannot be sorted"),
    ],
)
def test_labels_and_ids_of_different_types_are_refused(use, values, message):
    with pytest.raises(ValueError, match=message):
        use(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pandas.Series(["b", "a", "b"], index=[5, 3, 9]), [1, 0, 1]),
        (pandas.Series([7, 5, 7], dtype="Int64"), [1, 0, 1]),
        (pandas.Categorical(["b", "a", "b"], categories=["b", "a"]), [1, 0, 1]),
        ([np.int64(4), 2, True], [2, 1, 0]),
        ([torch.tensor(4), torch.tensor(2), torch.tensor(4)], [1, 0, 1]),
        ([datetime.date(2021, 1, 2), datetime.date(2020, 1, 1), datetime.date(2021, 1, 2)], [1, 0, 1]),
        (np.array(["2021-01-02", "2020-01-01", "2021-01-02"], dtype="datetime64[D]"), [1, 0, 1]),
        (torch.tensor([4.0, 2.0, 4.0], requires_grad=True), [1, 0, 1]),
        (torch.tensor([4.0, 2.0, 4.0], dtype=torch.bfloat16), [1, 0, 1]),
        ([True, False, True], [1, 0, 1]),
        ([2**70, 1, 2**70], [1, 0, 1]),
        (range(2, -1, -1), [2, 1, 0]),
        (["nan", "None", "nan"], [1, 0, 1]),  # as strings they are names
    ],
)
def test_labels_and_ids_of_many_kinds_are_sorted(values, expected):
    assert find_labels(Unloadable(3), values).tolist() == expected
    parts = make_partitions(Unloadable(3), len(set(expected)), NaturalPartitioner(values), seed=0)
    assert [part.tolist() for part in parts] == [
        [i for i in range(3) if expected[i] == k] for k in sorted(set(expected))
    ]


def test_numbers_and_strings_of_two_parts_of_a_concatenation_are_not_mixed():
    parts = ConcatDataset([Unloadable(2, targets=[0, 1]), Unloadable(2, targets=["0", "1"])])
    with pytest.raises(ValueError, match="of different types, 0 at position 0 of type int and '0' at position 2"):
        find_labels(parts)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 3], torch.zeros(3, 2), np.zeros((3, 1, 1)), []])
def test_labels_that_are_not_one_for_each_example_are_refused(labels):
    with pytest.raises(ValueError, match="one class for each of the 3 examples"):
        find_labels(Unloadable(3), labels)
