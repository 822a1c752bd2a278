"""A second device without a GPU: tensors that say they are on CUDA, and do not meet the CPU's where CUDA refuses it.

Their memory is the CPU's, so arithmetic, autograd and optimizers are torch's own. What is told apart is the memory: views,
parameters and gradients share it or get their label when they are looked at. Rules are applied to every call that Python
makes to torch; what torch does inside of one call is trusted.
"""

import contextlib
import functools
import types
from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
INDEXED = ("__getitem__", "__setitem__", "index_put", "index_put_")
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
FACTORIES = {*FROM_DATA, torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones}
FACTORIES |= {torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor, torch.zeros}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as}
ANYWHERE = {Tensor.copy_, torch._has_compatible_shallow_copy_type, torch.result_type}  # tensors of two devices may meet here
TO_NUMPY = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
SPELLINGS = {"true_divide": "div", "mod": "remainder", "floordiv": "floor_divide", "truediv": "div", "and": "bitwise_and"}
SPELLINGS |= {"or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}
NETWORK = ("conv2d", "linear")  # what every network in the notebook is made of
GROUPED = torch._C._group_tensors_by_device_and_dtype  # by what C++ takes for the device


def tensors_in(*values):
    """Every tensor in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(*value)
        elif isinstance(value, dict):
            yield from tensors_in(*value.values())


def a_device(value):
    """The device that an argument names, or None."""
    if isinstance(value, str):
        return torch.device(value)
    if isinstance(value, torch.device):
        return value
    return CUDA if type(value) is int else None


@functools.cache
def pointwise(name):
    """Does torch tag an operation as pointwise? In these CUDA takes a CPU tensor without dimensions as a number."""
    plain = name.strip("_")
    names = {SPELLINGS.get(n, n) for n in ([plain, plain[1:]] if name.startswith("__") else [plain])}
    packets = [getattr(torch.ops.aten, n) for n in names if hasattr(torch.ops.aten, n)]
    return any(torch.Tag.pointwise in getattr(packet, o).tags for packet in packets for o in packet.overloads())


def in_place(name):
    """Does an operation write into its first argument?"""
    if name.endswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__iter__", "__int__", "__index__")
    return name.endswith("_")


def layer(func, args, kwargs):
    """conv2d or linear; under autocast on rounded numbers, but by float32's arithmetic: many CPUs take minutes for others."""
    if not torch.is_autocast_enabled("cpu"):
        return func(*args, **kwargs)
    half = torch.get_autocast_dtype("cpu")
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(half).float(), (args, kwargs))
    with torch.autocast("cpu", enabled=False):
        return func(*args, **kwargs).to(half)


class Generator(torch.Generator):
    """A CPU generator that knows which device it is said to be for."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.said = a_device(device)
        return made

    device = property(lambda self: self.said)


class Autocast(torch.autocast):
    """The CPU's autocast in the place of CUDA's."""

    def __init__(self, device_type, *args, **kwargs):
        super().__init__("cpu" if torch.device(device_type).type == "cuda" else device_type, *args, **kwargs)


class FakeCuda(TorchFunctionMode):
    """While it is entered, "cuda" is such a device. `network` counts the networks' layers by where and in which precision.

    Not followed: tensors that other code makes on "cuda" by itself (torch.load, safetensors), torch.compile, other threads.
    """

    def __init__(self):
        super().__init__()
        self.labels, self.full, self.network = {}, 1000, Counter()
        properties = types.SimpleNamespace(name="fake", total_memory=2**34, major=8, minor=0, multi_processor_count=1)
        said = {"get_device_name": "fake", "get_device_properties": properties, "get_device_capability": (8, 0)}
        said |= {"mem_get_info": (2**33, 2**34), "synchronize": None, "empty_cache": None, "current_device": 0}
        said |= {"is_bf16_supported": True, "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None}
        self.patches = [mock.patch.object(torch.cuda, name, mock.Mock(return_value=value)) for name, value in said.items()]
        for place, name, new in (
            *((place, "autocast", Autocast) for place in (torch, torch.amp, torch.amp.autocast_mode)),
            (torch, "Generator", Generator),
            (torch._C, "_group_tensors_by_device_and_dtype", self.grouped),
        ):
            self.patches.append(mock.patch.object(place, name, new))

    def __enter__(self):
        self.patched = contextlib.ExitStack()
        for patch in self.patches:
            self.patched.enter_context(patch)
        return super().__enter__()

    def __exit__(self, *failure):
        self.patched.close()
        return super().__exit__(*failure)

    # ------------------------------------------------------------------------------------------------------- labels

    def has(self, tensor):
        """Is a tensor on the device? Its memory tells; a weak reference keeps the address from being given to another."""
        try:
            return tensor.untyped_storage()._cdata in self.labels
        except (NotImplementedError, RuntimeError):  # sparse, or of functorch: no memory of its own
            return False

    def label(self, *results):
        """Put the tensors in results on the device."""
        for tensor in tensors_in(*results):
            if tensor.device == CPU and not self.has(tensor):
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    reference = StorageWeakRef(tensor.untyped_storage())
                    self.labels[reference.cdata] = reference
        if len(self.labels) > self.full:
            self.labels = {k: reference for k, reference in self.labels.items() if not reference.expired()}
            self.full = 2 * len(self.labels) + 1000

    def placed(self, result, here, shared=()):
        """A new tensor of a call, on the device or not; copied if it shares memory with what is elsewhere."""
        if result.device == CPU and here != self.has(result) and (shared or not here):
            result = result.clone()
        if here:
            self.label(result)
        return result

    def where(self, tensor):
        return CUDA if self.has(tensor) else tensor.device

    def grouped(self, lists, with_indices=False):
        """What torch.optim and clip_grad_norm_ ask C++: tensors by device and dtype."""
        found = {}
        for (_, dtype), (groups, indices) in GROUPED(lists, True).items():
            for k in range(len(indices)):
                key = next(self.where(group[k]) for group in groups if group and group[k] is not None), dtype
                columns, places = found.setdefault(key, ([[] for _ in groups], []))
                for column, group in zip(columns, groups, strict=True):
                    column.extend(group[k : k + 1])
                places.append(indices[k])
        return {key: (columns, places if with_indices else []) for key, (columns, places) in found.items()}

    # -------------------------------------------------------------------------------------------------------- rules

    def refuse_to_mix(self, name, args, kwargs):
        """RuntimeError, as of CUDA, where tensors of both devices meet; whether there is one on the device."""
        here = there = False
        for tensor in tensors_in(args, kwargs):
            if self.has(tensor):
                here = True
            elif tensor.device == CPU:
                there = True
        if here and there:
            direct = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            numbers = all(v.dim() == 0 for v in tensors_in(args, kwargs) if not self.has(v))
            nested = sum(1 for _ in tensors_in(args, kwargs)) > len(direct)
            if not numbers or nested or not pointwise(name) or (in_place(name) and not self.has(args[0])):
                raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({name})")
        return here

    def refuse_index(self, name, args):
        """The rules of indexing: an index may be on the CPU, a number on both, a written value where the tensor is."""
        tensor, index, *values = args
        steps = [*index] if isinstance(index, (tuple, list)) else [index]
        masks = [t for t in tensors_in(steps) if t.dim() or t.dtype in (torch.bool, torch.uint8)]
        if not self.has(tensor) and any(map(self.has, masks)):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        advanced = (
            masks or name.startswith("index_put") or any(isinstance(s, (list, range)) or hasattr(s, "__array__") for s in steps)
        )
        if advanced and any(v.dim() and self.has(v) != self.has(tensor) for v in tensors_in(values)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({name})")
        return self.has(tensor)

    def move(self, func, args, kwargs):
        """to, cpu, cuda, type_as."""
        tensor, *rest = args
        here = func is Tensor.cuda or (func is Tensor.to and self.has(tensor))
        if func is Tensor.cuda:
            func, rest, kwargs = Tensor.to, [], {k: v for k, v in kwargs.items() if k == "memory_format"}
        for value in (*rest, kwargs.get("device"), kwargs.get("other")):
            if isinstance(value, Tensor):
                here = self.has(value)
            elif (device := a_device(value)) is not None and func is not Tensor.cpu:
                here = device.type == "cuda"
        rest = [CPU if (device := a_device(v)) is not None and device.type == "cuda" else v for v in rest]
        if (device := a_device(kwargs.get("device"))) is not None and device.type == "cuda":
            kwargs = kwargs | {"device": CPU}
        return self.placed(func(tensor, *rest, **kwargs), here, shared=True)

    def make(self, func, args, kwargs):
        """A new tensor, or one from data."""
        device = next((v for v in args if isinstance(v, torch.device)), a_device(kwargs.get("device")))
        here = device.type == "cuda" if device else func in FROM_DATA and isinstance(args[0], Tensor) and self.has(args[0])
        self.refuse_generator(args, kwargs, here)
        if device is not None and device.type == "cuda":
            args = [CPU if isinstance(v, torch.device) else v for v in args]
            kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
        return self.placed(func(*args, **kwargs), here, shared=func in FROM_DATA)

    def refuse_generator(self, args, kwargs, here):
        """RuntimeError where random numbers are to be drawn on one device with the other's generator."""
        for generator in (v for v in (*args, *kwargs.values()) if isinstance(v, torch._C.Generator)):
            if (generator.device.type == "cuda") != here:
                wanted = "cuda" if here else "cpu"
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device.type}'")

    def attribute(self, func, args):
        """An attribute read (the device, a gradient) or written."""
        tensor = args[0]
        name = func.__self__.__name__
        if func.__name__ == "__get__":
            if name in ("device", "is_cuda", "is_cpu") and self.has(tensor):
                return {"device": CUDA, "is_cuda": True, "is_cpu": False}[name]
            result = func(*args)
            if isinstance(result, Tensor) and self.has(tensor):
                self.label(result)
            return result
        if name == "grad" and isinstance(args[1], Tensor) and self.has(tensor) != self.has(args[1]):
            raise RuntimeError("assigned grad has data located on a different device")
        return func(*args)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self.attribute(func, args)
        if func in MOVES:
            return self.move(func, args, kwargs)
        if func in FACTORIES:
            return self.make(func, args, kwargs)
        if func is Tensor.get_device:
            return 0 if self.has(args[0]) else -1
        if func in TO_NUMPY and self.has(args[0]):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if name in INDEXED:
            here = self.refuse_index(name, args)
        elif func in ANYWHERE:
            here = self.has(args[0])
        else:
            here = self.refuse_to_mix(name, args, kwargs)
        if (device := a_device(kwargs.get("device"))) is not None:  # zeros_like, new_zeros ...
            here = device.type == "cuda"
            kwargs = kwargs | ({"device": CPU} if here else {})
        self.refuse_generator(args, kwargs, here)
        result = layer(func, args, kwargs) if name in NETWORK else func(*args, **kwargs)
        if name in NETWORK:
            self.network["cuda" if here else "cpu", result.dtype] += 1
        if here:
            self.label(result)
        return result
