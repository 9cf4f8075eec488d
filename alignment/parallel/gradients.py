"""Where the gradient of a parameter is: Paddle's own, which has the parameter's dtype, or for half precision one in
float32 to which every backward adds, so that late micro batches keep their bits (Micikevicius et al. 2018, "Mixed
Precision Training", section 3; paddlenlp calls it the main gradient).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_MAIN = "main_grad"


def gradient(parameter: Any) -> Any:
    """The gradient of a parameter; None where there is none."""
    return getattr(parameter, _MAIN) if hasattr(parameter, _MAIN) else parameter.grad


def set_gradient(parameter: Any, value: Any) -> None:
    """Replace the gradient of a parameter by a tensor of its shape, or forget it (None)."""
    # clear_gradient() would leave zeros, which the optimizer takes for a gradient.
    setattr(parameter, _MAIN if hasattr(parameter, _MAIN) else "grad", value)


def gradient_dtype(parameter: Any) -> Any:
    """What :func:`set_gradient` wants a gradient in."""
    return "float32" if hasattr(parameter, _MAIN) else parameter.dtype


def add_up_in_float32(parameters: Iterable[Any]) -> None:
    """From now on, add the gradients of half-precision parameters to float32 ones, which :func:`gradient` returns."""
    for parameter in parameters:
        if not hasattr(parameter, _MAIN):
            setattr(parameter, _MAIN, None)
            parameter._register_grad_hook(_adder(parameter))


def _adder(parameter: Any) -> Any:
    import paddle

    @paddle.no_grad()
    def hook(grad: Any) -> None:
        if grad is None or not grad._is_initialized():
            return
        if getattr(parameter, _MAIN) is None:
            setattr(parameter, _MAIN, grad.astype("float32"))
        else:
            getattr(parameter, _MAIN).add_(grad.astype("float32"))
        grad._clear_data()

    return hook
