"""An MPS device that is not there: its tensors live on the CPU, and whatever MPS could not do, or not alone, fails.

Within :func:`fake_mps` the engine runs with ``device="mps"`` exactly as it would on a Mac: tensors say that they are on
"mps", torch says that there is one, and ``torch.mps`` has what the engine asks of it. Every operation on such a tensor
passes through :class:`FakeMps`, which runs it on the CPU and raises :class:`MpsError` for

- an operator that is not in ``OPERATORS``: those that the engine uses and that the MPS of torch 2.6 has;
- float64, complex numbers, and what an operator is known to get wrong there (``_check_rules``);
- a tensor of the host among those of the device, which torch refuses, or copies while everything waits;
- memory of the host that is let go before the device has read it, or read before the device has written it: copies
  that are queued (``non_blocking``) happen when an event recorded after them has passed, and not before.

It also notes in ``waits`` whatever makes the host wait for the device.
"""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MPS = torch.device("mps:0")
# What the C++ side of torch is told: it has no MPS here, and must not take these tensors for the CPU's.
STAND_IN = torch.device("meta")

# The operators that the engine uses, less those that are made of others, each found in native_functions.yaml of torch
# 2.6.0 with an implementation for MPS or one for all devices.
NAMES = """
    __rshift__.Scalar _local_scalar_dense _softmax _unsafe_view abs add.Tensor add_.Tensor addcmul_ addmm alias
    all.dim amax arange arange.start argmax bitwise_and.Scalar bitwise_and.Tensor bitwise_not bitwise_or.Scalar
    bitwise_or.Tensor bitwise_xor.Scalar bitwise_xor.Tensor bitwise_xor_.Tensor bmm cat clamp clamp_ clone
    constant_pad_nd cos cumsum detach div.Tensor embedding empty.memory_format empty_like eq.Scalar eq.Tensor exp2_
    exp_ expand fill_.Scalar floor_divide gather ge.Tensor gt.Scalar gt.Tensor index.Tensor index_put_ index_select
    le.Tensor linalg_vector_norm log log_ lt.Scalar lt.Tensor masked_fill.Scalar masked_fill_.Scalar mm mul.Tensor
    mul_.Tensor ne.Scalar neg new_empty ones permute pow.Tensor_Scalar reciprocal remainder.Scalar rsqrt rsub.Scalar
    scalar_tensor select.int silu slice.Tensor split.Tensor split_with_sizes stack sub.Tensor sub.out
    sum.dim_IntList t topk transpose.int unbind.int unsqueeze view view.dtype where.self zero_ zeros zeros_like
"""
OPERATORS = frozenset(NAMES.split())

# What may write to tensors that begin inside their storage, or have gaps: before macOS 15, most other operators compute
# into a copy of such a tensor, which nobody sees.
SCATTERING = frozenset({"copy_", "fill_", "zero_", "index_put_", "_index_put_impl_"})
WAITING = frozenset({"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"})
DIVISIONS = frozenset({"floor_divide", "floor_divide_", "remainder", "remainder_", "fmod", "div.Tensor_mode"})


class MpsError(AssertionError):
    """Something that MPS would not do, or not as the CPU does."""


class MpsTensor(torch.Tensor):
    """A tensor that says it is on MPS; ``on_cpu`` is what it holds."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> "MpsTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=STAND_IN,
        )

    def __init__(self, on_cpu: torch.Tensor) -> None:
        self.on_cpu = on_cpu

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise MpsError(f"{func} of a tensor on MPS, outside of fake_mps()")

    @property
    def device(self) -> torch.device:
        return MPS

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"MpsTensor({self.on_cpu})"


class QueuedCopy:
    """A copy between host and device that the device makes later, with the host's memory as it is by then."""

    def __init__(self, host: torch.Tensor, values: torch.Tensor, to_host: bool) -> None:
        self.memory = StorageWeakRef(host.untyped_storage())
        self.offset = host.storage_offset()
        self.values, self.to_host = values, to_host

    def make(self) -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if storage is None:
            what = "written" if self.to_host else "read"
            raise MpsError(f"memory of the host was let go before the device had {what} it")
        host = torch.empty(0, dtype=self.values.dtype).set_(storage, self.offset, self.values.shape)
        if self.to_host:
            host.copy_(self.values)
        elif not torch.equal(host.view(-1).view(torch.uint8), self.values.view(-1).view(torch.uint8)):
            raise MpsError("memory of the host was changed before the device had read it")


class FakeMps(TorchDispatchMode):
    """The device, and what it noted: see the module's text.

    Args:
        any_operator: Take operators that are not in ``OPERATORS``.
    """

    def __init__(self, any_operator: bool = False) -> None:
        super().__init__()
        self.any_operator = any_operator
        self.operators: Counter[str] = Counter()  # by name, how often it was called
        self.waits: list[str] = []  # for what the host waited, other than events
        self.events: list[tuple[str, int]] = []  # ("record" or "wait", number of the event)
        self._queue: deque[QueuedCopy] = deque()
        self._made = 0  # copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in leaves([*args, *kwargs.values()]) if isinstance(leaf, torch.Tensor)]
        device = kwargs.get("device")
        if not any(isinstance(tensor, MpsTensor) for tensor in tensors) and not is_ours(device):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **kwargs)
        name = func.name().removeprefix("aten::")
        self.operators[name] += 1
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name == "_to_copy":
            return self._to_copy(*args, **kwargs)
        self._check(func, name, tensors, args, kwargs)
        if is_ours(device):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = func(*[unwrap(value) for value in args], **{name: unwrap(value) for name, value in kwargs.items()})
        return wrap(result, {id(tensor.on_cpu): tensor for tensor in tensors if isinstance(tensor, MpsTensor)})

    def _check(self, func: Any, name: str, tensors: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> None:
        """Raise if MPS would not do this, and note if the host waits for it."""
        base = name.partition(".")[0]
        hosts = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, MpsTensor)]
        if hosts:
            raise MpsError(f"{name}: tensors of the host {hosts} among those of MPS")
        if name not in OPERATORS and not self.any_operator:
            raise MpsError(f"{name} is not among the operators that MPS is known to have")
        arguments = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            tensor = arguments.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            is_part = isinstance(tensor, MpsTensor) and bool(tensor.storage_offset() or not tensor.is_contiguous())
            if written and is_part and base not in SCATTERING:
                raise MpsError(f"{name} into a part of a tensor, of which MPS may keep nothing")
        if base == "topk" and args[0].dtype not in (torch.float32, torch.float16, torch.int32):
            raise MpsError(f"{name} of {args[0].dtype}, which MPS cuts to 32 bits")
        if base == "cumsum" and not args[0].dtype.is_floating_point:
            raise MpsError(f"{name} of {args[0].dtype}, which depends on the version of macOS")
        if (base in DIVISIONS or name in DIVISIONS) and not (isinstance(args[1], int) and args[1].bit_count() == 1):
            raise MpsError(f"{name}: MPS divides integers as float32, which is exact by powers of two only")
        masks = [leaf for leaf in leaves(args[1:2]) if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool]
        if base in WAITING or (base in ("index", "index_put_") and masks):
            self._wait(name)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if not isinstance(target, MpsTensor):
            assert isinstance(source, MpsTensor)
            self._to_host(target, source.on_cpu, non_blocking)
            return target
        if not isinstance(source, MpsTensor):
            self._from_host(source, non_blocking)
        target.on_cpu.copy_(unwrap(source))
        return target

    def _to_copy(
        self,
        source: torch.Tensor,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format | None = None,
    ) -> torch.Tensor:
        copy = unwrap(source).to(dtype=dtype or source.dtype, copy=True)
        if device is not None and not is_ours(device):
            target = torch.empty_like(copy)
            self._to_host(target, copy, non_blocking)
            return target
        result = wrap(copy, {})
        if not isinstance(source, MpsTensor):
            self._from_host(source, non_blocking)
        return result

    def _from_host(self, host: torch.Tensor, non_blocking: bool) -> None:
        if not host.numel():
            return
        if not non_blocking:
            self._wait("copy from the host")
        elif not host.is_contiguous():
            raise MpsError("a queued copy from the host of a tensor with gaps, of which nobody keeps the copy")
        else:
            self._queue.append(QueuedCopy(host, host.clone(), to_host=False))

    def _to_host(self, host: torch.Tensor, values: torch.Tensor, non_blocking: bool) -> None:
        if not host.numel():
            return
        if not non_blocking:
            self._wait("copy to the host")
            host.copy_(values)
        elif not values.is_contiguous() or not host.is_contiguous() or values.dtype != host.dtype:
            raise MpsError("a queued copy to the host that is not of one piece: it would be read before it is made")
        else:
            host.view(-1).view(torch.uint8).fill_(0xA5)  # what is read before the device has written it
            self._queue.append(QueuedCopy(host, values.clone(), to_host=True))

    def _wait(self, why: str) -> None:
        self.waits.append(why)
        self.run_until(self.num_queued)

    @property
    def num_queued(self) -> int:
        """Copies that were ever queued."""
        return self._made + len(self._queue)

    def has_run_until(self, number: int) -> bool:
        """Whether the first ``number`` copies have been made."""
        return self._made >= number

    def run_until(self, number: int) -> None:
        """Make the first ``number`` copies, if they have not been made."""
        while self._made < number:
            self._made += 1
            self._queue.popleft().make()


class NamedMps(TorchFunctionMode):
    """Takes the name of the device out of calls before torch, which has none, can object to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: stand_in(value) for name, value in (kwargs or {}).items()}
        return func(*[stand_in(value) for value in args], **kwargs)


def is_ours(device: Any) -> bool:
    """Whether a device is what stands for MPS."""
    return device is not None and torch.device(device).type == STAND_IN.type


def stand_in(value: Any) -> Any:
    """MPS replaced by what torch has without it."""
    return STAND_IN if isinstance(value, torch.device) and value.type == MPS.type else value


def leaves(values: Any) -> Iterator[Any]:
    """The arguments of an operator, those in lists too."""
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def unwrap(value: Any) -> Any:
    """What a tensor on MPS, or each of a list of them, holds."""
    if isinstance(value, (list, tuple)):
        return [unwrap(one) for one in value]
    return value.on_cpu if isinstance(value, MpsTensor) else value


def wrap(value: Any, known: dict[int, MpsTensor]) -> Any:
    """A result as tensors on MPS: of those known by the identities of what they hold, or new ones."""
    if isinstance(value, (list, tuple)):
        return type(value)([wrap(one, known) for one in value])
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.float64 or value.dtype.is_complex:
        raise MpsError(f"a tensor of {value.dtype}, which MPS does not have")
    if id(value) in known:
        return known[id(value)]
    with torch.inference_mode(False):  # a view of a tensor that was made outside of that mode must not be of it
        return MpsTensor(value)


@contextmanager
def fake_mps(memory: int = 1 << 32, macos: tuple[int, int] = (15, 0), any_operator: bool = False) -> Iterator[FakeMps]:
    """A machine with MPS, as far as this thread sees.

    Args:
        memory: Bytes that Metal recommends to use at most.
        macos: Version of the system.
        any_operator: Take operators that are not in ``OPERATORS``.
    """
    mps = FakeMps(any_operator)

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.number = self.until = -1

        def record(self) -> None:
            self.number, self.until = sum(kind == "record" for kind, _ in mps.events), mps.num_queued
            mps.events.append(("record", self.number))

        def query(self) -> bool:
            return self.until >= 0 and mps.has_run_until(self.until)

        def synchronize(self) -> None:
            mps.events.append(("wait", self.number))
            mps.run_until(self.until)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= macos)
        patch.setattr(torch.mps, "recommended_max_memory", lambda: memory)
        patch.setattr(torch.mps, "driver_allocated_memory", lambda: 0)
        patch.setattr(torch.mps, "empty_cache", lambda: None)
        patch.setattr(torch.mps, "synchronize", lambda: mps._wait("synchronize"))
        patch.setattr(torch.mps, "Event", Event)
        with mps, NamedMps():
            yield mps
        mps.run_until(mps.num_queued)
