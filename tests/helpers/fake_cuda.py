"""A CUDA device without one: tensors that have sizes and no values, and rules for what a host may do with them.

Under :func:`fake_cuda` whatever is asked for on ``DEVICE`` is made on the meta device, and a meta tensor says that it
is on ``DEVICE``. (FakeTensorMode's own CUDA tensors can be neither indexed nor copied by a torch built without CUDA.)
An operation that would make the host wait for a GPU raises :class:`HostWait`:

* one that reads a value, or whose result has a size that depends on values;
* a copy between host and device, but one to the device, out of pinned memory, that is asked not to block;
* one that takes tensors of both, and so copies behind the scenes; a scalar of the host in an elementwise operation is
  an argument of the kernel, and fine;
* a tensor made on the device out of Python's numbers, which is such a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mopo_kernels import backends
from mopo_kernels.fused import linear_logprob, linear_mopo_loss, mopo_loss

DEVICE = torch.device("cuda", 0)
_META = torch.device("meta")
_FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_BY_INDEX = ("index", "index_put", "_unsafe_index", "_unsafe_index_put", "_index_put_impl")


class HostWait(AssertionError):
    """The host would wait for the device; the message names the operation."""


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _renamed(value: Any) -> Any:
    if isinstance(value, torch.device):
        return _META if value.type == DEVICE.type else value
    return _META if isinstance(value, str) and value.partition(":")[0] == DEVICE.type else value


class _Names(TorchFunctionMode):
    """``DEVICE`` among arguments means the meta device, and the meta device as an answer is ``DEVICE``."""

    def __init__(self, rules: _Rules) -> None:
        super().__init__()
        self.rules = rules

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == Tensor.device.__get__:
            device = function(*args)
            return DEVICE if device == _META else device
        if function == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return args[0].is_meta
        if function == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
            return False
        if function is Tensor.pin_memory:
            return self.rules.pinned(*args)
        kwargs = kwargs or {}
        if function in (torch.autograd.backward, Tensor.backward):
            return self._backward(_tensors(args[0]), bool(kwargs.get("retain_graph")))
        args, kwargs = tree_map(_renamed, (args, kwargs))
        result = function(*args, **kwargs)
        if function in _FROM_NUMBERS and result.is_meta and not any(t.is_meta for t in _tensors(args[-1:])):
            raise HostWait(f"{function.__name__} of Python's numbers on the device")
        return result

    def _backward(self, losses: list[Tensor], keep: bool) -> None:
        """Of scalars, under this mode, which is off inside of what it is asked about."""
        seeds = tuple(map(torch.ones_like, losses))
        with self:
            _engine_run_backward(tuple(losses), seeds, keep, False, (), allow_unreachable=True, accumulate_grad=True)


class _Rules(TorchDispatchMode):
    """Raises :class:`HostWait`, see the module."""

    def __init__(self, answered: str | None) -> None:
        super().__init__()
        self._answered = answered
        self._pinned: list[Tensor] = []

    def pinned(self, tensor: Tensor) -> Tensor:
        """A copy in what passes for pinned memory."""
        assert _on_host(tensor), "only the host's memory can be pinned"
        self._pinned.append(tensor.clone())
        return self._pinned[-1]

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == known.untyped_storage()._cdata for known in self._pinned)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if reason := self._wait(function, args, kwargs):
            if self._is_answered(function):
                return True
            raise HostWait(f"{function} {reason}")
        if function is torch.ops.aten.addmm.dtype_out:
            # Only torch 2.11 and newer know its sizes, which are those of what it writes to.
            return kwargs["out"]
        return function(*args, **kwargs)

    def _is_answered(self, function: Any) -> bool:
        frame = sys._getframe() if self._answered and function is torch.ops.aten._local_scalar_dense.default else None
        while frame is not None and not frame.f_code.co_filename.endswith(self._answered or ""):
            frame = frame.f_back
        return frame is not None

    def _wait(self, function: Any, args: Any, kwargs: Any) -> str | None:
        """Why the host would wait, or None."""
        tensors = _tensors((args, kwargs))
        from_host, from_device = [t for t in tensors if _on_host(t)], [t for t in tensors if not _on_host(t)]
        name = function.overloadpacket.__name__.rstrip("_")
        if name in ("_to_copy", "copy"):
            source, onto = (args[1], args[0].device) if name == "copy" else (args[0], kwargs.get("device"))
            onto = source.device if onto is None else onto
            if _on_host(source) == (onto.type == "cpu"):
                return None
            if onto.type == "cpu":
                return "copies from the device"
            blocks = not (kwargs.get("non_blocking") or (name == "copy" and len(args) > 2 and args[2]))
            return "copies to the device and blocks" if blocks or not self._is_pinned(source) else None
        if not from_device:
            return None
        if name in _BY_INDEX:
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                return "counts a mask"
        elif _READING & set(function.tags) and (name != "repeat_interleave" or kwargs.get("output_size") is None):
            return "reads values"
        if from_host and (torch.Tag.pointwise not in function.tags or any(t.dim() for t in from_host)):
            return "takes a tensor of the host"
        return None


class Launches(TorchDispatchMode):
    """Within :func:`fake_cuda`, the operations of torch that launch a kernel on the device or copy to it, by name, one
    each: all but those that make a view, or a tensor that nothing is written to, or one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name, returned = function.overloadpacket.__name__, _tensors(result)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        nothing = bool(returned) and not any(t.numel() for t in returned)
        on_device = any(not _on_host(t) for t in [*_tensors((args, kwargs)), *returned])
        if on_device and not (view or nothing or name.lstrip("_").startswith(("empty", "new_empty", "unsafe_view"))):
            self.names.append(name)
        return result


@contextmanager
def fake_cuda(answered: str | None = None) -> Iterator[None]:
    """Here the meta device is called ``DEVICE``, and the host must not wait for it. Where a module whose path ends in
    ``answered`` asks whether something is so, it is."""
    rules = _Rules(answered)
    with _Names(rules), rules:
        yield


def run_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the custom ops run what they run on a GPU, as on the meta device they would run their registered fakes, and
    stop Triton's kernels where they would be launched. Returns the list of what is launched, which grows."""
    for module, name in (
        (linear_logprob, "linear_logprob"),
        (mopo_loss, "segment_sum"),
        (mopo_loss, "mopo_loss"),
        (linear_mopo_loss, "linear_mopo_loss"),
    ):
        monkeypatch.setattr(module, name, _opened(getattr(module, name)))
    backward = linear_logprob.linear_logprob_backward._init_fn
    monkeypatch.setattr(linear_logprob, "linear_logprob_backward", backward)
    launches: list[str] = []
    if backends.availability()["triton"] is None:
        from triton.runtime.jit import KernelInterface

        def launch(kernel: Any, grid: Any) -> Callable[..., None]:
            def run(*arguments: Any, **options: Any) -> None:
                assert all(x.device == DEVICE for x in arguments if isinstance(x, Tensor)), kernel
                launches.append(kernel.fn.__name__)

            return run

        monkeypatch.setattr(KernelInterface, "__getitem__", launch)
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
    return launches


def _opened(op: Any) -> Callable[..., Any]:
    """A custom op's own function and its own backward, without the dispatcher between."""

    class Opened(torch.autograd.Function):
        forward = staticmethod(lambda *arguments: op._init_fn(*arguments))
        setup_context = staticmethod(op._setup_context_fn)
        backward = staticmethod(op._backward_fn)

    return Opened.apply
