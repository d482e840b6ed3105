"""An ONNX graph of a Vision Transformer, written node by node from its architecture and weights.

It computes what `VisionTransformer` computes and no more. Whatever is constant is worked into the weights: the
normalisation of the pixels (where no zeros are put around the image), the scale of attention's scores, LayerScale, the
tokens before the patches, the query of attention pooling. Where the head reads the class token alone, the last block
computes that token alone. Norms and GELU are one node each, which runtimes have kernels for.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from vitreous.errors import ConfigError, MissingDependencyError, WeightsError
from vitreous.patches import PatchGrid
from vitreous.positions import rope_tables, sincos_positions
from vitreous.spec import InputSpec, ViTConfig

OPSET = 20  # the first with Gelu; LayerNormalization is there since 17
INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"

_MAX_BYTES = 2**31 - 2**20  # of one protobuf message


def import_onnx() -> Any:
    """Returns the package onnx.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx", "onnx", "An export to ONNX or OpenVINO") from error
    return onnx


def build_graph(
    config: ViTConfig,
    weights: Mapping[str, np.ndarray],
    input_spec: InputSpec,
    *,
    temperature: float = 1.0,
    is_multi_label: bool = False,
    batch_size: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> Any:
    """Builds the ONNX model of a classifier.

    Args:
        config: The architecture.
        weights: {path: values}, as `vitreous.weights.load.variables` names them.
        input_spec: Size and normalisation of the images.
        temperature: Logits are divided by it before they become probabilities.
        is_multi_label: Whether probabilities are a sigmoid's, one label at a time.
        batch_size: B. Default: any.
        dtype: Of weights and of what is computed; logits and probabilities are float32 in any case.

    Returns:
        An `onnx.ModelProto`. Input: `images` uint8 (B, H, W, C). Outputs: `logits` and `probabilities`, float32 (B, K).

    Raises:
        ConfigError: If the model has no head, or weighs more than an ONNX file can.
        WeightsError: If a weight is missing, or one is left over.
        MissingDependencyError: If onnx is not installed.
    """
    onnx = import_onnx()
    if not config.num_classes:
        raise ConfigError(
            "Cannot export the model. Expected a classifier. Received: num_classes=0, a model without a head. "
            "Train it on labelled images first."
        )
    if (config.image_size, config.num_channels) != (input_spec.image_size, input_spec.num_channels):
        raise ConfigError(
            "Cannot export the model. Expected the image size and channels of its InputSpec. Received: "
            f"config.image_size={config.image_size}, input_spec.image_size={input_spec.image_size}, "
            f"config.num_channels={config.num_channels}, input_spec.num_channels={input_spec.num_channels}. "
            "Pass the InputSpec that belongs to the model."
        )
    num_bytes = sum(value.size for value in weights.values()) * np.dtype(dtype).itemsize
    if num_bytes > _MAX_BYTES:
        raise ConfigError(
            "Cannot export the model. Expected weights of less than 2 GB, the limit of an ONNX file. "
            f"Received: {num_bytes / 2**30:.1f} GB. Take a smaller model, or export to ONNX in fp16."
        )
    graph = _Graph(onnx, weights, dtype)
    _Builder(graph, config, input_spec).build(temperature, is_multi_label)
    if left := sorted(set(weights) - graph.used):
        raise WeightsError(
            f"Cannot export the model. Expected a place for every weight. Received: {left[0]}, and {len(left) - 1} "
            "more that no part of the graph reads. Report this as a bug."
        )
    helper, types = onnx.helper, onnx.TensorProto
    shape = ["B" if batch_size is None else batch_size, *config.image_size, config.num_channels]
    outputs = [
        helper.make_tensor_value_info(name, types.FLOAT, [shape[0], config.num_classes])
        for name in (LOGITS, PROBABILITIES)
    ]
    images = helper.make_tensor_value_info(INPUT, types.UINT8, shape)
    proto = helper.make_graph(graph.nodes, "vitreous", [images], outputs, graph.constants)
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="vitreous"
    )
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Nodes and constants in the making; values are called by their names."""

    def __init__(self, onnx: Any, weights: Mapping[str, np.ndarray], dtype: str):
        self.onnx = onnx
        self.weights = weights
        self.dtype = np.dtype(dtype)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.used: set[str] = set()
        self._shared: dict[tuple[Any, ...], str] = {}
        self._scope = ""

    def scope(self, name: str) -> None:
        """Names the part of the model that the next nodes belong to."""
        self._scope = name

    def weight(self, path: str) -> np.ndarray:
        """Returns a weight in float64, for exact arithmetic, and notes that it has its place."""
        if path not in self.weights:
            raise WeightsError(
                f"Cannot export the model. Expected a weight {path}. Received: none of that name. "
                "Pass the weights of a model with this config."
            )
        self.used.add(path)
        return np.asarray(self.weights[path], "float64")

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Returns the name of a constant: in the dtype of the model, or integers in int64."""
        array = np.asarray(value)
        array = array.astype(dtype or ("int64" if array.dtype.kind in "iu" else self.dtype))
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size < 64 else None
        if key in self._shared:
            return self._shared[key]
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        if key is not None:
            self._shared[key] = name
        return name

    def add(self, kind: str, *inputs: Any, count: int = 1, output: str | None = None, **attributes: Any) -> Any:
        """Adds a node; arrays and numbers among its inputs become constants. Returns its output or its outputs."""
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        stem = f"{self._scope}/{kind}_{len(self.nodes)}"
        outputs = [output] if output else [f"{stem}:{i}" if count > 1 else stem for i in range(count)]
        self.nodes.append(self.onnx.helper.make_node(kind, names, outputs, name=stem, **attributes))
        return outputs[0] if count == 1 else outputs

    def cast(self, x: str, dtype: Any) -> str:
        """Converts to another dtype."""
        return self.add("Cast", x, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshape(self, x: str, *shape: int) -> str:
        """Reshapes; -1 stands for what is left over, such as the batch."""
        return self.add("Reshape", x, np.array(shape))

    def transpose(self, x: str, *order: int) -> str:
        """Reorders axes."""
        return self.add("Transpose", x, perm=list(order))

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        """Returns x[start:stop] along an axis."""
        return self.add("Slice", x, np.array([start]), np.array([stop]), np.array([axis]))

    def dense(self, x: str, kernel: np.ndarray, bias: np.ndarray | None) -> str:
        """Returns x @ kernel + bias."""
        x = self.add("MatMul", x, kernel)
        return x if bias is None else self.add("Add", x, bias)


class _Builder:
    """Adds the parts of the model to a graph, in the order in which an image passes them."""

    def __init__(self, graph: _Graph, config: ViTConfig, input_spec: InputSpec):
        self.graph = graph
        self.config = config
        self.spec = input_spec
        # Tokens that the last block needs to compute: what the head reads, where those are the first ones.
        self.num_kept = {"class": 2 if config.use_distillation_head else 1}.get(config.pooling)

    def build(self, temperature: float, is_multi_label: bool) -> None:
        """Adds everything from the images to the probabilities."""
        config, graph = self.config, self.graph
        graph.scope("patches")
        x = self.add_prefix(self.patches())
        if config.use_pre_norm:
            x = self.norm(x, "pre_norm", config.norm)
        for index in range(config.num_blocks):
            is_last = index == config.num_blocks - 1
            x = self.block(x, f"block_{index}", self.num_kept if is_last else None)
        graph.scope("head")
        logits = graph.cast(self.logits(x), "float32") if graph.dtype != np.float32 else self.logits(x)
        graph.add("Identity", logits, output=LOGITS)
        scaled = logits
        if temperature != 1:
            scaled = graph.add("Mul", logits, graph.constant(1 / temperature, "float32"))
        if is_multi_label:
            graph.add("Sigmoid", scaled, output=PROBABILITIES)
        else:
            graph.add("Softmax", scaled, axis=-1, output=PROBABILITIES)

    # ---- images to tokens ----

    def patches(self) -> str:
        """Returns the projected patches (B, N, D), without prefix and positions."""
        config, graph, spec = self.config, self.graph, self.spec
        scale = 1 / (255 * np.array(spec.std))
        shift = -np.array(spec.mean) / np.array(spec.std)
        if config.stem == "convolution":
            return self.project(self.convolutional_stem(self.normalize(scale, shift)))
        grid = config.patch_grid
        pads = grid.pad_widths(config.image_size)
        if config.stem == "shifted":
            images = self.shifted_copies(self.normalize(scale, shift))
            return self.project(self.norm(self.cut(images, grid, 5), "patch_encoder/patch_norm", "layer"))
        kernel = graph.weight("patch_encoder/projection/kernel")  # (P_h * P_w * C, D)
        bias = graph.weight("patch_encoder/projection/bias") if config.use_patch_bias else None
        is_padded = any(sum(pad) for pad in pads)
        if not is_padded:  # the normalisation is linear: it becomes part of the projection
            pixels = kernel.reshape(-1, config.num_channels, kernel.shape[1])
            bias = (0 if bias is None else bias) + np.einsum("pcd,c->d", pixels, shift)
            kernel = (pixels * scale[:, None]).reshape(kernel.shape)
        if grid.is_tiling and not is_padded:
            return graph.dense(graph.cast(self.cut(INPUT, grid), graph.dtype), kernel, bias)
        images = self.normalize(scale, shift) if is_padded else graph.cast(INPUT, graph.dtype)
        filters = kernel.reshape(*grid.size, config.num_channels, -1).transpose(3, 2, 0, 1)
        inputs = [graph.transpose(images, 0, 3, 1, 2), filters, *([] if bias is None else [bias])]
        (top, bottom), (left, right) = pads
        x = graph.add("Conv", *inputs, strides=list(grid.strides), pads=[top, left, bottom, right])
        return graph.transpose(graph.reshape(x, -1, config.projection_dim, config.num_patches), 0, 2, 1)

    def project(self, patches: str) -> str:
        """Returns patches (B, N, patch_dim) projected to (B, N, D)."""
        bias = self.graph.weight("patch_encoder/projection/bias") if self.config.use_patch_bias else None
        return self.graph.dense(patches, self.graph.weight("patch_encoder/projection/kernel"), bias)

    def normalize(self, scale: np.ndarray, shift: np.ndarray) -> str:
        """Returns the normalised images (B, H, W, C)."""
        images = self.graph.cast(INPUT, self.graph.dtype)
        return self.graph.add("Add", self.graph.add("Mul", images, scale), shift)

    def shifted_copies(self, images: str) -> str:
        """Returns the images beside four copies shifted diagonally (B, H, W, 5 C)."""
        height, width = self.config.image_size
        down, right = (size // 2 for size in self.config.patch_size)
        padded = self.graph.add("Pad", images, np.array([0, down, right, 0, 0, down, right, 0]))
        copies = [images]
        for top in (0, 2 * down):
            for left in (0, 2 * right):
                rows = self.graph.slice(padded, top, top + height, 1)
                copies.append(self.graph.slice(rows, left, left + width, 2))
        return self.graph.add("Concat", *copies, axis=3)

    def cut(self, images: str, grid: PatchGrid, copies: int = 1) -> str:
        """Returns patches (B, N, patch_dim) of images (B, H, W, C), values by rows, columns, channels."""
        config, graph = self.config, self.graph
        (top, bottom), (left, right) = grid.pad_widths(config.image_size)
        if top or bottom or left or right:
            images = graph.add("Pad", images, np.array([0, top, left, 0, 0, bottom, right, 0]))
        if not grid.is_tiling:
            for axis, indices in enumerate(grid.indices(config.image_size), 1):
                images = graph.add("Gather", images, indices.reshape(-1), axis=axis)
        rows, columns = config.grid_size
        channels = copies * config.num_channels
        x = graph.reshape(images, -1, rows, grid.size[0], columns, grid.size[1], channels)
        x = graph.transpose(x, 0, 1, 3, 2, 4, 5)
        return graph.reshape(x, -1, rows * columns, grid.size[0] * grid.size[1] * channels)

    def convolutional_stem(self, images: str) -> str:
        """Returns what the convolutions make of normalised images: (B, N, stem_dim)."""
        config = self.config
        count = config.patch_size[0].bit_length() - 1
        size, x = config.image_size, images
        for index, depth in enumerate((0,) * (count - len(config.stem_depths)) + config.stem_depths):
            x = self.convolve(x, f"{index}", size, stride=2)
            size = (-(-size[0] // 2), -(-size[1] // 2))
            for j in range(1, 1 + depth):
                x = self.graph.add("Add", x, self.convolve(x, f"{index}_{j}", size, stride=1))
        return self.graph.reshape(x, -1, size[0] * size[1], config.stem_dim)

    def convolve(self, x: str, name: str, size: tuple[int, int], *, stride: int) -> str:
        """Returns what one 3x3 convolution of the stem, its norm and the activation make of (B, *size, C)."""
        graph = self.graph
        (top, bottom), (left, right) = PatchGrid(size=(3, 3), strides=(stride, stride), padding="same").pad_widths(size)
        filters = graph.weight(f"stem/convolution_{name}/kernel").transpose(3, 2, 0, 1)
        x = graph.transpose(x, 0, 3, 1, 2)
        x = graph.add("Conv", x, filters, strides=[stride, stride], pads=[top, left, bottom, right])
        return self.activate(self.norm(graph.transpose(x, 0, 2, 3, 1), f"stem/norm_{name}", "layer"))

    def add_prefix(self, patches: str) -> str:
        """Returns all tokens (B, prefix + N, D): what stands before the patches, and positions, are one constant."""
        config, graph = self.config, self.graph
        prefix = config.num_prefix_tokens
        table = np.zeros((1, config.num_tokens, config.projection_dim))
        place = 0
        for name, count in (
            ("class_token", int(config.use_class_token)),
            ("distillation_token", int(config.use_distillation_token)),
            ("registers", config.num_registers),
        ):
            if count:
                table[:, place : place + count] = graph.weight(f"patch_encoder/{name}")
                place += count
        if config.position == "learned":
            positions = graph.weight("patch_encoder/position_embedding")
            covered = config.num_prefix_positions
            table[:, :covered] += positions[:, :covered]
            table[:, prefix:] += positions[:, covered:]
        elif config.position == "sincos":
            table[:, prefix:] += sincos_positions(config.grid_size, config.projection_dim)
        x = graph.add("Pad", patches, np.array([0, prefix, 0, 0, 0, 0])) if prefix else patches
        return graph.add("Add", x, table) if table.any() else x

    # ---- blocks ----

    def norm(
        self, x: str, path: str, kind: Literal["layer", "rms"], *, factor: Any = 1.0, order: np.ndarray | None = None
    ) -> str:
        """Normalises over the last axis.

        Args:
            x: What to normalise.
            path: Of the weights.
            kind: LayerNorm or RMSNorm.
            factor: What the result is multiplied by.
            order: In which order the values of the last axis come.
        """
        graph, epsilon = self.graph, self.config.epsilon
        names = ("gamma", "beta") if kind == "layer" else ("gamma",)
        gamma, *beta = (graph.weight(f"{path}/{name}") for name in names)
        if order is not None:
            gamma, *beta = (values[order] for values in (gamma, *beta))
        gamma, *beta = (values * factor for values in (gamma, *beta))
        if kind == "layer":
            return graph.add("LayerNormalization", x, gamma, *beta, axis=-1, epsilon=epsilon)
        square = graph.add("ReduceMean", graph.add("Mul", x, x), np.array([-1]), keepdims=1)
        root = graph.add("Sqrt", graph.add("Add", square, epsilon))
        return graph.add("Mul", graph.add("Div", x, root), gamma)

    def block(self, x: str, path: str, num_kept: int | None) -> str:
        """Adds a transformer block; with `num_kept`, only the first tokens leave it."""
        graph = self.graph
        graph.scope(f"{path}/attention")
        kept = x if num_kept is None else graph.slice(x, 0, num_kept, 1)
        names = ["", *(f"_{i}" for i in range(1, self.config.num_parallel))]
        branches = [self.attention(x, f"{path}/attention{name}", num_kept) for name in names]
        for branch in branches:
            kept = graph.add("Add", kept, branch)
        graph.scope(f"{path}/mlp")
        branches = [self.mlp(kept, f"{path}/mlp{name}") for name in names]
        for branch in branches:
            kept = graph.add("Add", kept, branch)
        return kept

    def enter(self, x: str, path: str) -> str:
        """Returns what a branch reads."""
        is_normed = self.config.norm_position == "pre"
        return self.norm(x, f"{path}/norm", self.config.norm) if is_normed else x

    def leave(self, x: str, path: str, dense: str, has_bias: bool) -> str:
        """Adds a branch's last dense layer, with LayerScale worked into it, and the norm after it if there is one."""
        graph, config = self.graph, self.config
        scale = graph.weight(f"{path}/layer_scale") if config.layer_scale else 1.0
        kernel = graph.weight(f"{path}/{dense}/kernel")
        bias = graph.weight(f"{path}/{dense}/bias") if has_bias else None
        if config.norm_position == "post":
            return self.norm(graph.dense(x, kernel, bias), f"{path}/norm", config.norm, factor=scale)
        return graph.dense(x, kernel * scale, None if bias is None else bias * scale)

    def attention(self, x: str, path: str, num_kept: int | None) -> str:
        """Returns the branch of self-attention (B, N, D), or of the first tokens alone."""
        config, graph = self.config, self.graph
        dim, heads, tokens = config.projection_dim, config.num_heads, config.num_tokens
        head_dim = dim // heads
        kernel = graph.weight(f"{path}/qkv/kernel").reshape(dim, 3, heads, head_dim)
        bias = np.zeros((3, heads, head_dim))
        if config.use_qkv_bias and config.use_key_bias:
            bias = graph.weight(f"{path}/qkv/bias").reshape(bias.shape)
        elif config.use_qkv_bias:
            bias[[0, 2]] = graph.weight(f"{path}/query_value_bias").reshape(2, heads, head_dim)
        order = None
        if config.rope == "eva":  # pairs side by side become pairs half a head apart: scores stay the same
            order = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
            kernel[:, :2], bias[:2] = kernel[:, :2][..., order], bias[:2][..., order]
        scale: Any = head_dim**-0.5
        if config.use_local_attention:
            scale = 1 / graph.weight(f"{path}/temperature").reshape(heads, 1)
        norm_scale = 1.0
        if config.use_qk_norm and not config.use_local_attention:
            norm_scale = scale
        elif not config.use_qk_norm:
            kernel[:, 0], bias[0] = kernel[:, 0] * scale, bias[0] * scale
        x = self.enter(x, path)
        if num_kept is None:
            parts = graph.dense(x, kernel.reshape(dim, -1), bias.reshape(-1) if config.use_qkv_bias else None)
            query, key, value = graph.add("Split", parts, axis=-1, count=3, num_outputs=3)
        else:  # queries of some tokens, keys and values of all
            first = graph.slice(x, 0, num_kept, 1)
            biases = [bias[0].reshape(-1), bias[1:].reshape(-1)] if config.use_qkv_bias else [None, None]
            query = graph.dense(first, kernel[:, 0].reshape(dim, -1), biases[0])
            pairs = graph.dense(x, kernel[:, 1:].reshape(dim, -1), biases[1])
            key, value = graph.add("Split", pairs, axis=-1, count=2, num_outputs=2)
        query, key, value = (
            graph.reshape(part, -1, count, heads, head_dim)
            for part, count in ((query, num_kept or tokens), (key, tokens), (value, tokens))
        )
        if config.use_qk_norm:
            query = self.norm(query, f"{path}/query_norm", config.norm, factor=norm_scale, order=order)
            key = self.norm(key, f"{path}/key_norm", config.norm, order=order)
            if config.use_local_attention:
                query = graph.add("Mul", query, scale)
        if config.rope != "none":
            query, key = self.rotate(query, num_kept or tokens), self.rotate(key, tokens)
        # Keys in two steps: OpenVINO takes the second into the product, which saves 3 to 5% (docs/log.md).
        key = graph.transpose(graph.transpose(key, 0, 2, 1, 3), 0, 1, 3, 2)
        scores = graph.add("MatMul", graph.transpose(query, 0, 2, 1, 3), key)
        if config.use_local_attention:
            scores = graph.add("Sub", scores, 1e4 * np.eye(num_kept or tokens, tokens))
        weights = graph.add("Softmax", scores, axis=-1)  # (B, A, N, N)
        x = graph.add("MatMul", weights, graph.transpose(value, 0, 2, 1, 3))
        x = graph.reshape(graph.transpose(x, 0, 2, 1, 3), -1, num_kept or tokens, dim)
        if config.use_attention_norm:
            x = self.norm(x, f"{path}/inner_norm", config.norm)
        return self.leave(x, path, "projection", config.use_projection_bias)

    def rotate(self, heads: str, count: int) -> str:
        """Rotates queries or keys (B, N, A, d), whose pairs lie half a head apart, by the angles of their tokens."""
        config, graph = self.config, self.graph
        head_dim = config.projection_dim // config.num_heads
        sine, cosine = (
            table[:count].astype("float64")
            for table in rope_tables(
                config.rope,
                config.grid_size,
                head_dim,
                temperature=config.rope_temperature,
                reference_grid=config.rope_reference_grid,
                num_prefix_tokens=config.num_prefix_tokens,
            )
        )
        if not sine.any():
            return heads  # tokens before the patches are not rotated
        if config.rope == "eva":
            sine, cosine = (np.concatenate([table[:, ::2], table[:, 1::2]], axis=1) for table in (sine, cosine))
        sine = np.concatenate([-sine[:, : head_dim // 2], sine[:, head_dim // 2 :]], axis=1)
        first, second = graph.add("Split", heads, axis=-1, count=2, num_outputs=2)
        turned = graph.add("Mul", graph.add("Concat", second, first, axis=-1), sine[:, None])
        return graph.add("Add", graph.add("Mul", heads, cosine[:, None]), turned)

    def mlp(self, x: str, path: str) -> str:
        """Returns the branch of an MLP."""
        config, graph = self.config, self.graph
        is_pool = path.startswith("attention_pool/")  # its MLP is always a plain one
        has_bias = is_pool or config.use_mlp_bias
        bias = graph.weight(f"{path}/hidden/bias") if has_bias else None
        x = graph.dense(self.enter(x, path), graph.weight(f"{path}/hidden/kernel"), bias)
        if config.mlp == "swiglu" and not is_pool:
            gate, value = graph.add("Split", x, axis=-1, count=2, num_outputs=2)
            x = graph.add("Mul", self.activate(gate), value)
        else:
            x = self.activate(x)
        if config.use_mlp_norm and not is_pool:
            x = self.norm(x, f"{path}/inner_norm", config.norm)
        return self.leave(x, path, "output", has_bias)

    def activate(self, x: str) -> str:
        """Applies the activation of the MLPs and of the stem."""
        name, graph = self.config.activation, self.graph
        if name.startswith("gelu"):
            return graph.add("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
        inner = graph.add("Mul", x, 1.702) if name == "quick_gelu" else x
        return graph.add("Mul", x, graph.add("Sigmoid", inner))

    # ---- the head ----

    def logits(self, x: str) -> str:
        """Returns the logits (B, K) of the tokens that leave the last block."""
        config, graph = self.config, self.graph
        is_class = self.num_kept is not None  # then normalising before or after pooling is the same
        if config.final_norm == "tokens" or (config.final_norm == "pooled" and is_class):
            x = self.norm(x, "norm", config.norm)
        x = self.pool(x)
        if config.final_norm == "pooled" and not is_class:
            x = self.norm(x, "norm", config.norm)
        kernel, bias = graph.weight("head/kernel"), graph.weight("head/bias")
        if config.use_distillation_head:  # the mean of two heads is one product with both tokens side by side
            kernel = np.concatenate([kernel, graph.weight("distillation_head/kernel")]) / 2
            bias = (bias + graph.weight("distillation_head/bias")) / 2
        return graph.dense(x, kernel, bias)

    def pool(self, x: str) -> str:
        """Returns the vector that the head reads."""
        config, graph = self.config, self.graph
        dim, prefix = config.projection_dim, config.num_prefix_tokens
        if self.num_kept is not None:
            return graph.reshape(x, -1, self.num_kept * dim)
        patches = graph.slice(x, prefix, config.num_tokens, 1) if prefix else x
        if config.pooling == "map":
            return self.attention_pool(patches)
        mean = graph.add("ReduceMean", patches, np.array([1]), keepdims=0)
        if config.pooling == "mean":
            return mean
        return graph.add("Concat", graph.reshape(graph.slice(x, 0, 1, 1), -1, dim), mean, axis=-1)

    def attention_pool(self, x: str) -> str:
        """Returns tokens (B, N, D) pooled by attention from one trained query: (B, D)."""
        config, graph = self.config, self.graph
        dim, heads = config.projection_dim, config.num_heads
        head_dim = dim // heads
        path = "attention_pool"
        query = graph.weight(f"{path}/latent").reshape(dim) @ graph.weight(f"{path}/query/kernel")
        query = (query + graph.weight(f"{path}/query/bias")).reshape(heads, head_dim) * head_dim**-0.5
        kernel = graph.weight(f"{path}/key_value/kernel")
        bias = graph.weight(f"{path}/key_value/bias")  # that of the keys is the same for all tokens: no influence
        scorer = np.einsum("iad,ad->ia", kernel[:, :dim].reshape(dim, heads, head_dim), query)  # (D, A)
        scores = graph.transpose(graph.dense(x, scorer, None), 0, 2, 1)
        weights = graph.reshape(graph.add("Softmax", scores, axis=-1), -1, heads, 1, config.num_patches)
        value = graph.reshape(graph.dense(x, kernel[:, dim:], bias[dim:]), -1, config.num_patches, heads, head_dim)
        pooled = graph.reshape(graph.add("MatMul", weights, graph.transpose(value, 0, 2, 1, 3)), -1, 1, dim)
        pooled = graph.dense(pooled, graph.weight(f"{path}/projection/kernel"), graph.weight(f"{path}/projection/bias"))
        return graph.reshape(graph.add("Add", pooled, self.pool_mlp(pooled)), -1, dim)

    def pool_mlp(self, x: str) -> str:
        """Returns the branch of the MLP after attention pooling: a plain one, with its norm first."""
        config = self.config
        plain = config.replace(norm_position="pre", layer_scale=0.0)
        return _Builder(self.graph, plain, self.spec).mlp(x, "attention_pool/mlp")
