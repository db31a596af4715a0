"""The two parts of the chunked delta rule that are no plain products: a triangular inverse, a walk over chunks."""
import torch

try:
    import triton
    import triton.language as tl
except ImportError:     # without a GPU
    triton = None


if triton:
    @triton.jit
    def invert_kernel(source, target, SIZE: tl.constexpr, STEPS: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * SIZE * SIZE
        row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
        lower = tl.load(source + at + row * SIZE + column)
        lower = tl.where(row > column, lower, 0.0)
        inverse = tl.where(row == column, 1.0, 0.0)
        for step in tl.static_range(STEPS):
            pairs = ((row >> (step + 1)) == (column >> (step + 1))) & ((row >> step) != (column >> step))
            corner = tl.where(pairs, lower, 0.0)
            if step == 0:
                inverse -= corner
            else:
                product = tl.dot(inverse, corner, input_precision="tf32x3")
                inverse -= tl.dot(product, inverse, input_precision="tf32x3")
        tl.store(target + at + row * SIZE + column, inverse)


@torch.library.custom_op("minillama::inverse_of_unit_lower", mutates_args=())
def inverse_of_unit_lower(lower: torch.Tensor) -> torch.Tensor:
    """(I + lower)^-1, blocks on the diagonal doubling in each step (see minillama/delta_net.py)."""
    size = lower.shape[-1]
    if lower.is_cuda and triton:
        inverse = torch.empty_like(lower)
        invert_kernel[(lower.numel() // size ** 2,)](lower, inverse, size, size.bit_length() - 1)
        return inverse
    index = torch.arange(size, device=lower.device)
    row, column = index[:, None], index
    inverse, width = torch.eye(size, device=lower.device).expand(lower.shape), 1
    while width < size:
        pairs = (row // (2 * width) == column // (2 * width)) & (row // width != column // width)
        corner = torch.where(pairs, lower, 0.0)
        inverse = inverse - (corner if width == 1 else inverse @ corner @ inverse)
        width *= 2
    return inverse.contiguous()


@inverse_of_unit_lower.register_fake
def _(lower):
    return torch.empty_like(lower)


def _inverse_backward(ctx, grad):
    (inverse,) = ctx.saved_tensors
    turned = inverse.transpose(-1, -2)
    return -(turned @ grad @ turned).tril(-1)


def _keep_inverse(ctx, inputs, output):
    ctx.save_for_backward(output)


inverse_of_unit_lower.register_autograd(_inverse_backward, setup_context=_keep_inverse)


@torch.library.custom_op("minillama::states", mutates_args=())
def states(step: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """S[0] = 0, S[n + 1] = step[n] S[n] + more[n]; all (chunks, batch, heads, dim, dim)."""
    flat_step, flat_more = step.flatten(1, 2), more.flatten(1, 2)
    out = torch.zeros_like(flat_more)
    for n in range(out.shape[0] - 1):
        torch.baddbmm(flat_more[n], flat_step[n], out[n], out=out[n + 1])
    return out.reshape(more.shape)


@states.register_fake
def _(step, more):
    return torch.empty_like(more)


@torch.library.custom_op("minillama::states_backward", mutates_args=())
def states_backward(grad: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """The gradient of `more`: what S[n + 1] is worth, gathered from the last chunk to the first."""
    flat_grad, turned = grad.flatten(1, 2).contiguous(), step.flatten(1, 2).transpose(-1, -2)
    out = torch.zeros_like(flat_grad)
    count = out.shape[0]
    if count > 1:
        out[count - 2].copy_(flat_grad[count - 1])
    for n in range(count - 3, -1, -1):
        torch.baddbmm(flat_grad[n + 1], turned[n + 1], out[n + 1], out=out[n])
    return out.reshape(step.shape)


@states_backward.register_fake
def _(grad, step):
    return torch.empty_like(step)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _states_grad(ctx, grad):
    step, state = ctx.saved_tensors
    of_more = states_backward(grad, step)
    return of_more @ state.transpose(-1, -2), of_more


states.register_autograd(_states_grad, setup_context=_keep)
