"""TF32 on a CPU: what a graph loses where a GPU rounds the operands of fp32 products.

From Ampere on, NVIDIA's libraries compute fp32 matrix products and convolutions in TF32 unless
told otherwise: operands keep 10 of their 23 mantissa bits and the whole exponent, products and
sums are fp32 (NVIDIA A100 white paper, "TensorFloat-32"). Rounding the operands and then
multiplying in fp32 gives the same numbers up to the order of summation.

Left out, since torch does not show it: the hidden state of an LSTM between its steps, the softmax
inside a fused attention, and all of ``nn.MultiheadAttention``'s fast path. Graphs here write
attention out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

Rounding = Literal["nearest", "truncated"]

# fp32 has 23 mantissa bits, TF32 the upper 10 of them.
_DROPPED_BITS: Final = 13
# Products and convolutions as the dispatcher sees them, with and without decomposition.
_PRODUCT_NAMES: Final = """
    mm bmm matmul linear einsum mkldnn_rnn_layer lstm
    convolution _convolution conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d
    scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_attention_math
"""
_PRODUCTS: Final = frozenset(_PRODUCT_NAMES.split())
# Those whose first operand is added, not multiplied.
_SUMS_WITH_PRODUCTS: Final = frozenset({"addmm", "baddbmm", "addbmm"})


def round_to_tf32(values: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Round float32 to TF32, of the same shape and dtype; NaN and infinities stay.

    Args:
        values: float32.
        rounding: ``nearest``, halves away from zero, as PTX's ``cvt.rna.tf32.f32`` does; or
            ``truncated``, what a tensor core makes of operands that nobody converted.
    """
    bits = values.contiguous().view(torch.int32)
    half = 1 << (_DROPPED_BITS - 1) if rounding == "nearest" else 0
    rounded = ((bits + half) & ~((1 << _DROPPED_BITS) - 1)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values)


@contextmanager
def emulated_tf32(
    *,
    only: Sequence[type[nn.Module]] = (),
    leave_out: Sequence[type[nn.Module]] = (),
    rounding: Rounding = "nearest",
) -> Iterator[None]:
    """Compute fp32 matrix products and convolutions as a GPU does in TF32.

    Args:
        only: modules of these classes, with all that they call, are the only ones; everything if
            empty.
        leave_out: modules of these classes, with all that they call, stay fp32. They win over
            ``only``.
        rounding: see :func:`round_to_tf32`.
    """
    inside = {"only": 0, "leave_out": 0}
    classes = {"only": tuple(only), "leave_out": tuple(leave_out)}

    def count(step: int) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            for name, kinds in classes.items():
                inside[name] += step * isinstance(module, kinds)

        return hook

    def active() -> bool:
        return not inside["leave_out"] and (not only or inside["only"] > 0)

    handles = [
        register_module_forward_pre_hook(count(+1)),
        register_module_forward_hook(count(-1), always_call=True),
    ]
    try:
        with _RoundedProducts(active, rounding):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _RoundedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, active: Callable[[], bool], rounding: Rounding) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._active = active
        self._rounding = rounding

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if self._active():
            if name in _PRODUCTS:
                args = self._rounded(args)
            elif name in _SUMS_WITH_PRODUCTS:
                args = (args[0], *self._rounded(args[1:]))
        return func(*args, **(kwargs or {}))

    def _rounded(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._rounded(part) for part in value)
        # A vector is a bias, which is added.
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim > 1:
            return round_to_tf32(value, self._rounding)
        return value
