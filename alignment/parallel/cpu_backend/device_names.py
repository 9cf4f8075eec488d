"""Code of Paddle that asks for the device's name before it does what a CPU can do as well.

Such a module gets, in place of its global ``paddle`` or ``core``, a :class:`Facade` of it in which the CPU goes by the
name of a custom device, ``"cpu:0"``: the branch for such devices copies tensors by place and assumes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Facade:
    """A module with some names exchanged.

    Args:
        module: what stands behind.
        own: the names that are answered here.
    """

    def __init__(self, module: Any, **own: Any) -> None:
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def cpu_named_paddle(paddle: Any) -> Facade:
    """``paddle`` for modules that look at ``get_device()``, make a ``CustomPlace`` or list the custom devices."""
    return Facade(
        paddle,
        get_device=lambda: "cpu:0",
        CustomPlace=lambda device, index: paddle.CPUPlace(),
        device=Facade(paddle.device, get_all_custom_device_type=lambda: ["cpu"]),
    )


def cpu_named_core(core: Any) -> Facade:
    """``paddle.base.core`` for modules that list the custom devices and ask for their memory alignment (bytes)."""
    return Facade(
        core,
        get_all_custom_device_type=lambda: ["cpu"],
        libpaddle=Facade(core.libpaddle, _get_device_min_chunk_size=lambda device: 256),
    )


def aligned_cpu(alignment: dict[str, int]) -> dict[str, int]:
    """The alignment (bytes) of fused buffers by device type, with the CPU's."""
    return {**alignment, "cpu": 256}


def cpu_type(_: Any) -> str:
    """The device type that the fused buffers' module has found."""
    return "cpu"


def first_device(_: Any = None) -> int:
    """The number of the device when there is only the CPU."""
    return 0


def add_rank_params(
    original: Callable[..., None], storage: Any, parameters: Any, alignments: Any, convert_gpu: bool = False
) -> None:
    """Take the place of ``ParamStorage.add_rank_params``: the parameters are on the CPU already, so none is moved."""
    original(storage, parameters, alignments, False)


def averaging_nccl(_: Any = None) -> Callable[[], int]:
    """A function that names the first version of NCCL which averages by itself (2.10), as our collectives do."""
    return lambda: 21000
