"""Look into states and compare them bit for bit, for several tests."""

import io

import torch


def through_a_file(value):
    """Save and load, as a checkpoint is."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def leaves(value, path=()):
    """Yield every leaf of nested dicts and lists with its path; anything else is a leaf."""
    if type(value) is dict:
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif type(value) is list:
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def assert_same(one, other):
    """Equal bit for bit, tensors by their dtype and bytes."""
    one, other = dict(leaves(one)), dict(leaves(other))
    assert one.keys() == other.keys()
    for path, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[path].dtype, path
            assert torch.equal(value, other[path]), path
        else:
            assert repr(value) == repr(other[path]), path


def look_back_gradients(state):
    """All that a state remembers of the past, by test, however deep the stage lies."""
    if isinstance(state, list):
        return [found for item in state for found in look_back_gradients(item)]
    if not isinstance(state, dict):
        return []
    here = [state["lbgs"]] if "lbgs" in state else []
    here += [{0: state["basis"]}] if state.get("basis", {}).get("payloads") else []
    if isinstance(state.get("mean"), torch.Tensor):
        here += [{0: {"payloads": [state["mean"]], "gram": [[0.0]]}}]
    return here + [found for item in state.values() for found in look_back_gradients(item)]


def vectors(state):
    """The vectors of the past alone, without their inner products, which depend on where vectors lie in memory."""
    found = look_back_gradients(state)
    return [{index: basis["payloads"] for index, basis in tests.items()} for tests in found]
