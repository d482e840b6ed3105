"""The branches of `SelfAttention` and `MLP` on torch on a CPU, each as one operation with its backward by hand.

They compute what the layers compose and save what a chain of small operations costs: biases are added inside the
products, the attention's transposes happen once for queries, keys and values together, and the backward writes its
parts where the next product reads them. Weights are cast to the tokens' dtype once and kept for the backward.
docs/performance.md has the gains; tests hold values and gradients against the composed layers.
"""

from typing import Any

import keras
import torch
from torch.autograd.function import once_differentiable

_LAYER_NORM = torch.ops.aten.native_layer_norm
_LAYER_NORM_BACKWARD = torch.ops.aten.native_layer_norm_backward


def can_compute(x: Any) -> bool:
    """Whether `x` is real numbers on a CPU: no symbol, no proxy of an export, no tensor of a function transform."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


def _values(*weights: Any) -> list[Any]:
    """Returns the tensors of weights; a kernel with a low-rank update comes as their sum already, no variable."""
    return [weight.value if isinstance(weight, keras.Variable) else weight for weight in weights]


def attend(layer: Any, x: Any) -> Any:
    """Returns the branch (B * N, D) of a `SelfAttention`."""
    return AttentionBranch.apply(
        x,
        *_values(layer.norm.gamma, layer.norm.beta, layer.qkv.kernel, layer.qkv.bias),
        *_values(layer.projection.kernel, layer.projection.bias),
        layer.num_heads,
        layer.options["epsilon"],
    )


def transform(layer: Any, x: Any) -> Any:
    """Returns the branch (B * N, D) of an `MLP`."""
    return MLPBranch.apply(
        x,
        *_values(layer.norm.gamma, layer.norm.beta, layer.hidden.kernel, layer.hidden.bias),
        *_values(layer.output_dense.kernel, layer.output_dense.bias),
        "tanh" if layer.activation == "gelu_tanh" else "none",
        layer.options["epsilon"],
    )


def _normalize(x: Any, gamma: Any, beta: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """Returns the normalised tokens (B * N, D), and what the backward needs."""
    normed, mean, scale = _LAYER_NORM(x, [x.shape[-1]], gamma, beta, epsilon)
    return normed.view(-1, x.shape[-1]), mean, scale


def _dense_backward(gradient: Any, x: Any, kernel: Any) -> tuple[Any, Any, Any]:
    """Returns the gradients of `x @ kernel + bias` by x, by kernel and by bias, the last two in float32."""
    return gradient @ kernel.t(), (x.t() @ gradient).float(), gradient.sum(0).float()


class AttentionBranch(torch.autograd.Function):
    """`projection(attention(norm(x)))` for tokens (B, N, D) and kernels as `SelfAttention` keeps them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        gamma: Any,
        beta: Any,
        qkv_kernel: Any,
        qkv_bias: Any,
        projection_kernel: Any,
        projection_bias: Any,
        num_heads: int,
        epsilon: float,
    ) -> Any:
        """Returns the branch (B * N, D)."""
        batch, num_tokens, dim = x.shape
        head_dim = dim // num_heads
        normed, mean, scale = _normalize(x, gamma, beta, epsilon)
        qkv_kernel, projection_kernel = qkv_kernel.to(x.dtype), projection_kernel.to(x.dtype)
        qkv = torch.addmm(qkv_bias.to(x.dtype), normed, qkv_kernel)
        qkv = qkv.view(batch, num_tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).contiguous()
        qkv = qkv.view(3, batch * num_heads, num_tokens, head_dim)
        query, key, value = qkv
        scores = x.new_empty(batch * num_heads, num_tokens, num_tokens)
        torch.baddbmm(scores, query, key.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=scores)
        attention = torch.softmax(scores, -1)
        heads = torch.bmm(attention, value).view(batch, num_heads, num_tokens, head_dim)
        heads = heads.transpose(1, 2).reshape(-1, dim)
        ctx.save_for_backward(x, gamma, beta, mean, scale, normed, qkv_kernel, qkv, attention, heads, projection_kernel)
        return torch.addmm(projection_bias.to(x.dtype), heads, projection_kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        """Returns the gradients by `forward`'s arguments."""
        x, gamma, beta, mean, scale, normed, qkv_kernel, qkv, attention, heads, projection_kernel = ctx.saved_tensors
        batch, num_tokens, dim = x.shape
        _, pairs, _, head_dim = qkv.shape
        num_heads = pairs // batch
        query, key, value = qkv
        d_heads, d_projection_kernel, d_projection_bias = _dense_backward(gradient, heads, projection_kernel)
        d_heads = d_heads.view(batch, num_tokens, num_heads, head_dim).transpose(1, 2).reshape(value.shape)
        d_qkv = torch.empty_like(qkv)
        torch.bmm(attention.transpose(1, 2), d_heads, out=d_qkv[2])
        d_attention = torch.bmm(d_heads, value.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_attention, attention, -1, attention.dtype)
        alpha = head_dim**-0.5
        torch.baddbmm(d_qkv[0], d_scores, key, beta=0, alpha=alpha, out=d_qkv[0])
        torch.baddbmm(d_qkv[1], d_scores.transpose(1, 2), query, beta=0, alpha=alpha, out=d_qkv[1])
        d_qkv = d_qkv.view(3, batch, num_heads, num_tokens, head_dim).permute(1, 3, 0, 2, 4).reshape(-1, 3 * dim)
        d_normed, d_qkv_kernel, d_qkv_bias = _dense_backward(d_qkv, normed, qkv_kernel)
        d_x, d_gamma, d_beta = _LAYER_NORM_BACKWARD(
            d_normed.view(x.shape), x, [dim], mean, scale, gamma, beta, [True, True, True]
        )
        return d_x, d_gamma, d_beta, d_qkv_kernel, d_qkv_bias, d_projection_kernel, d_projection_bias, None, None


class MLPBranch(torch.autograd.Function):
    """`output(gelu(hidden(norm(x))))` for tokens (B, N, D) and kernels as `MLP` keeps them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        gamma: Any,
        beta: Any,
        hidden_kernel: Any,
        hidden_bias: Any,
        output_kernel: Any,
        output_bias: Any,
        approximate: str,
        epsilon: float,
    ) -> Any:
        """Returns the branch (B * N, D)."""
        normed, mean, scale = _normalize(x, gamma, beta, epsilon)
        hidden_kernel, output_kernel = hidden_kernel.to(x.dtype), output_kernel.to(x.dtype)
        hidden = torch.addmm(hidden_bias.to(x.dtype), normed, hidden_kernel)
        activated = torch.nn.functional.gelu(hidden, approximate=approximate)
        ctx.save_for_backward(x, gamma, beta, mean, scale, normed, hidden_kernel, hidden, activated, output_kernel)
        ctx.approximate = approximate
        return torch.addmm(output_bias.to(x.dtype), activated, output_kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        """Returns the gradients by `forward`'s arguments."""
        x, gamma, beta, mean, scale, normed, hidden_kernel, hidden, activated, output_kernel = ctx.saved_tensors
        d_activated, d_output_kernel, d_output_bias = _dense_backward(gradient, activated, output_kernel)
        d_hidden = torch.ops.aten.gelu_backward(d_activated, hidden, approximate=ctx.approximate)
        d_normed, d_hidden_kernel, d_hidden_bias = _dense_backward(d_hidden, normed, hidden_kernel)
        d_x, d_gamma, d_beta = _LAYER_NORM_BACKWARD(
            d_normed.view(x.shape), x, [x.shape[-1]], mean, scale, gamma, beta, [True, True, True]
        )
        return d_x, d_gamma, d_beta, d_hidden_kernel, d_hidden_bias, d_output_kernel, d_output_bias, None, None
