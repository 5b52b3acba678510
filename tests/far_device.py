"""An emulated second device: CPU tensors that say they are elsewhere, and refuse to be mixed with others.

What an accelerator refuses is refused here: operations on tensors of both devices, random numbers of the other device's
generator, ``numpy()`` without ``cpu()``. The numbers are those of the CPU, to the bit. So a machine without an
accelerator notices code that would break on one.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_lbgm.compression import Context
from lightning_lbgm.strategy import execution

FAR = torch.device("lazy")  # a name that every build of torch knows and for which it starts no driver

_MOVES = ("_to_copy", "copy_", "set_")
_INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_")  # indices may lie on the CPU
_far_seeds: set[int] = set()  # of the generators on the device


class FarTensor(torch.Tensor):
    """A tensor on the emulated device; ``near`` holds its numbers."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, **layout, device=FAR)
        far.near = near
        return far

    def tolist(self):
        return self.near.tolist()

    def new_tensor(self, data, **options):
        return FarTensor(torch.tensor(data, dtype=options.get("dtype", self.dtype)))

    def data_ptr(self):
        return self.near.data_ptr()

    def untyped_storage(self):
        return self.near.untyped_storage()

    def numpy(self, *args, **options):
        raise TypeError("can't convert a tensor of the emulated device to numpy: use Tensor.cpu() first.")

    def __repr__(self):
        return f"FarTensor({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes tensors where ``device=`` says so."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    name = function.overloadpacket.__name__
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    if far and name not in _MOVES:
        _refuse_mixture(function, name, tensors, leaves)
    is_far, device = bool(far), kwargs.get("device")
    if device is not None:
        is_far, kwargs = torch.device(device) == FAR, {**kwargs, "device": torch.device("cpu")}

    def near(value):
        return value.near if isinstance(value, FarTensor) else value

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        same = next((tensor for tensor in far if tensor.near is value), None)  # changed in place
        return same if same is not None else FarTensor(value) if is_far else value

    result = function(*tree_map(near, args), **tree_map(near, kwargs))
    return args[0] if name == "copy_" else tree_map(wrapped, result)


def _refuse_mixture(function, name, tensors, leaves):
    others = [tensor for tensor in tensors if not isinstance(tensor, FarTensor)]
    is_index = name in _INDEXES and isinstance(tensors[0], FarTensor)
    if any(tensor.ndim for tensor in others) and not is_index:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} found two devices.")
    if name.endswith("_") and not isinstance(tensors[0], FarTensor):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} changes one on the CPU.")
    generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    if any(generator.initial_seed() not in _far_seeds for generator in generators):
        raise RuntimeError(f"Expected a generator of the emulated device for {function}, found one of the CPU.")


class FarAccelerator(CPUAccelerator):
    """What a ``Trainer`` takes to train on the emulated device."""

    @staticmethod
    def get_parallel_devices(devices):
        return [FAR]

    def setup_device(self, device):
        pass


@contextmanager
def far_device():
    """Let torch know the emulated device; the package's own choices by device are those for a GPU."""
    make_tensor, make_generator, find = torch.tensor, Context.generator, execution.find_obstacle

    def tensor(data, *, device=None, **options):
        made = make_tensor(data, **options)
        return made if device is None else made.to(device)

    def generator(context, device):
        made = make_generator(context, torch.device("cpu"))
        if device == FAR:
            _far_seeds.add(made.initial_seed())
        return made

    def find_obstacle(trainer, module, optimizer, flat, personal=()):
        known = SimpleNamespace(device=torch.device("cpu"), parameters=flat.parameters)
        return find(trainer, module, optimizer, known, personal)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        stack.enter_context(mock.patch.object(Context, "generator", generator))
        stack.enter_context(mock.patch.object(execution, "find_obstacle", find_obstacle))
        stack.enter_context(_Mode())
        try:
            yield
        finally:
            _far_seeds.clear()
