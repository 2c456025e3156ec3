"""An MLP whose ReLU² is computed within the matrix products around it, by a kernel in Triton.

The hidden layer is the largest tensor of a block. With ReLU² where it is made, and its gradient
where that of the next layer is made, it is read and written once instead of five times. Source of
the idea: github.com/KellerJordan/modded-nanogpt.

Shapes: N tokens, D width, F hidden size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIDE, _DEPTH = 128, 32  # of a tile: rows and columns, and what is read at a time
_GROUP_SIZE = 8  # rows of tiles that share columns of the weights in the cache


@triton.jit
def _kernel(
    x_ptr,
    w_ptr,
    hidden_ptr,
    out_ptr,
    rows,
    columns: tl.constexpr,
    inner: tl.constexpr,
    w_column_stride: tl.constexpr,
    w_inner_stride: tl.constexpr,
    backward: tl.constexpr,
    side: tl.constexpr,
    depth: tl.constexpr,
    group_size: tl.constexpr,
):
    """A tile of x (rows, inner) times w (inner, columns): its ReLU², or times the slope of that."""
    tile, tiles = tl.program_id(0), tl.cdiv(columns, side)
    first = tile // (group_size * tiles) * group_size
    group = tl.minimum(tl.cdiv(rows, side) - first, group_size)
    row = (first + tile % (group_size * tiles) % group) * side + tl.arange(0, side)
    column = tile % (group_size * tiles) // group * side + tl.arange(0, side)
    k = tl.arange(0, depth)
    x = x_ptr + (row % rows)[:, None].to(tl.int64) * inner + k[None, :]
    w = w_ptr + (column % columns)[None, :] * w_column_stride + k[:, None] * w_inner_stride
    total = tl.zeros((side, side), dtype=tl.float32)
    for start in range(0, inner, depth):
        if inner % depth == 0:
            total = tl.dot(tl.load(x), tl.load(w), total)
        else:
            left = k < inner - start
            part = tl.load(x, mask=left[None, :], other=0.0)
            total = tl.dot(part, tl.load(w, mask=left[:, None], other=0.0), total)
        x += depth
        w += depth * w_inner_stride
    place = row[:, None].to(tl.int64) * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if backward:  # the slope of ReLU² is 2 ReLU, and ReLU is the root of what was kept
        hidden = tl.load(hidden_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total *= 2 * tl.sqrt(hidden)
    else:
        total = tl.where(total < 0, 0.0, total)  # keeps NaN, unlike `tl.maximum`
        total *= total
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.triton_op("hlbgpt::relu_squared_product", mutates_args=())
def _product(x: Tensor, w: Tensor, hidden: Tensor | None) -> Tensor:
    """ReLU² of x (N, D) @ w (D, F), or times the slope of ReLU² at `hidden` (N, F), its value."""
    out = x.new_empty(len(x), w.shape[1])
    grid = (triton.cdiv(out.shape[0], _SIDE) * triton.cdiv(out.shape[1], _SIDE),)
    torch.library.wrap_triton(_kernel)[grid](
        x,
        w,
        out if hidden is None else hidden,
        out,
        *out.shape,
        x.shape[1],
        w.stride(1),
        w.stride(0),
        backward=hidden is not None,
        side=_SIDE,
        depth=_DEPTH,
        group_size=_GROUP_SIZE,
        num_warps=8,
        num_stages=4,
    )
    return out


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = _product(x, up.T, None)
        ctx.save_for_backward(x, up, down, hidden)
        return hidden @ down.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, up, down, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = _product(grad, down, hidden)
        return grad_hidden @ up, grad_hidden.T @ x, grad.T @ hidden


def fused_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """ReLU²(x @ upᵀ) @ downᵀ of x (..., D) in bf16, with weights (F, D) and (D, F)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return _FusedMLP.apply(flat, up.to(x.dtype), down.to(x.dtype)).view(x.shape)
