"""`Explainer`: a model that answers, and says why; `explain`, for one question."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitreous.backend import use_compile_cache
from vitreous.calibration import to_probabilities
from vitreous.errors import ConfigError, MissingPathError, UnknownNameError, WeightsError
from vitreous.explanation import maps
from vitreous.explanation.methods import METHODS, Explanation
from vitreous.explanation.perturbation import Fill, create_windows, fill_image, find_edges, sum_cells, take_out
from vitreous.patches import as_pair, extract_patches
from vitreous.registry import list_models, list_weights
from vitreous.spec import InputSpec
from vitreous.training.run import Run, find_run

if TYPE_CHECKING:
    from vitreous.explanation.trace import Trace
    from vitreous.model import VisionTransformer

_BATCH = 16  # images at a time, about: larger ones are no faster on a CPU
_NUM_PATH_STEPS = 16  # of integrated gradients
_MOST_WINDOWS = 64  # of an occlusion
_MOST_COMPONENTS = 28  # of the filters


class Explainer:
    """A model that answers, and shows what it looks at.

    Answers come from the model's ordinary pass; attention weights and gradients from a second one, whose answer is the
    same to 1e-4. What is compiled is kept: make one and ask it often.

    Args:
        model: A built model.
        input_spec: What images must go through before they enter it.
        class_names: Names of the K classes; empty for none.
        is_multi_label: Whether probabilities are a sigmoid's.
        temperature: What logits are divided by before they become probabilities, as in `predict`.

    Raises:
        ConfigError: If the model does not take images of `input_spec`, or has another number of classes than names.
    """

    def __init__(
        self,
        model: "VisionTransformer",
        *,
        input_spec: InputSpec,
        class_names: Sequence[str] = (),
        is_multi_label: bool = False,
        temperature: float = 1.0,
    ):
        config = model.config
        fits = input_spec.image_size == config.image_size or config.has_dynamic_size
        if not fits or input_spec.num_channels != config.num_channels:
            raise ConfigError(
                f"Cannot explain {model.name}. Expected images of {config.image_size} pixels and {config.num_channels} "
                f"channels. Received: input_spec with {input_spec.image_size} and {input_spec.num_channels}. Pass the "
                "model's own, or create the model with has_dynamic_size=True."
            )
        if class_names and len(class_names) != config.num_classes:
            raise ConfigError(
                f"Cannot explain {model.name}. Expected {config.num_classes} class names. "
                f"Received: {len(class_names)}. Pass one for each of the model's outputs, or none."
            )
        self.model = model
        self.config = config.replace(image_size=input_spec.image_size)
        self.input_spec = input_spec
        self.class_names = tuple(class_names)
        self.is_multi_label = is_multi_label
        self.temperature = temperature
        import keras

        if keras.backend.backend() == "jax":
            use_compile_cache()

    # ----- answers

    @functools.cached_property
    def _predict(self) -> Callable[[np.ndarray], np.ndarray]:
        from vitreous.model import create_predict_function

        return create_predict_function(self.model, self.input_spec)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Returns the logits (B, K) float32 of images (B, H, W, C), uint8 of the model's size, by its ordinary pass."""
        parts = math.ceil(len(images) / _BATCH)
        size = math.ceil(len(images) / parts)  # equal parts: one size to compile
        padded = np.concatenate([images, np.repeat(images[-1:], parts * size - len(images), axis=0)])
        logits = [self._predict(padded[start : start + size]) for start in range(0, len(padded), size)]
        return np.concatenate(logits)[: len(images)]

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Returns the probabilities (B, K) of logits (B, K)."""
        return to_probabilities(logits, is_multi_label=self.is_multi_label, temperature=self.temperature)

    def prepare(self, image: np.ndarray | str | Path) -> np.ndarray:
        """Returns an image as the model takes it, uint8 (H, W, C), not normalised yet.

        Raises:
            ConfigError: If it is neither a file nor a uint8 array (H, W), (H, W, 1) or (H, W, 3).
            ImageError: If it is a file that cannot be read.
        """
        from PIL import Image

        from vitreous.data import decode_image, resize_image

        source: Any = image
        if not isinstance(image, str | Path):
            array = np.asarray(image)
            is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
            if array.dtype != np.uint8 or not is_image or not array.size:
                raise ConfigError(
                    "Cannot explain the image. Expected uint8 of shape (H, W), (H, W, 1) or (H, W, 3). "
                    f"Received: shape={array.shape}, dtype={array.dtype}. Pass one image as it was decoded."
                )
            source = Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)
        return resize_image(decode_image(source, self.input_spec.num_channels), self.input_spec)

    # ----- which methods, which class

    def why_not(self, method: str) -> str | None:
        """Returns why the model cannot be explained by a method, or None if it can."""
        if METHODS[method].needs_class and not self.config.num_classes:
            return "the model has no head, so there is no class to explain"
        if method == "positions" and self.config.position == "none" and self.config.rope == "none":
            return "the model has no positions"
        return None

    def check_methods(self, methods: Sequence[str] | None, *, needs_map: bool = False) -> list[str]:
        """Returns the methods to use, each once; all that suit the model if `methods` is None.

        Raises:
            UnknownNameError: If there is no such method.
            ConfigError: If one does not suit the model, or gives no map where `needs_map`.
        """
        suited = [
            name for name, method in METHODS.items() if not self.why_not(name) and (method.has_map or not needs_map)
        ]
        if methods is None:
            return suited
        for name in methods:
            if name not in METHODS:
                raise UnknownNameError("method", name, METHODS, f"Methods: {', '.join(METHODS)}.")
            if name not in suited:
                reason = self.why_not(name) or "it gives no value for each patch"
                raise ConfigError(
                    f"Cannot use the method {name}. Expected one that suits the model and the question. "
                    f"Received: method={name!r}, but {reason}. Pass one of: {', '.join(suited)}."
                )
        return list(dict.fromkeys(methods))

    def find_class(self, target: int | str) -> int:
        """Returns the index of a class by its name, or by its index as a number or in digits.

        Raises:
            UnknownNameError: If there is no such name.
            ConfigError: If there is no such index, or the model has no head.
        """
        count = self.config.num_classes
        if isinstance(target, str) and target in self.class_names:
            return self.class_names.index(target)
        if count and isinstance(target, str) and not target.isdecimal():
            hint = f"Or pass an index from 0 to {count - 1}."
            raise UnknownNameError("class", target, self.class_names, hint)
        if not count or not 0 <= int(target) < count:
            expected = f"an index from 0 to {count - 1}" if count else "a model with a head"
            raise ConfigError(
                f"Cannot explain the class. Expected {expected}. Received: target={target!r}. "
                f"{'Pass one of them, or a name.' if count else 'Pass no class.'}"
            )
        return int(target)

    def find_block(self, block: int | None) -> int:
        """Returns the index of a block, counted from the end where negative; the last one for None."""
        count = self.config.num_blocks
        index = count - 1 if block is None else block + count if block < 0 else block
        if not 0 <= index < count:
            raise ConfigError(
                f"Cannot explain the block. Expected an index from {-count} to {count - 1}. Received: block={block}. "
                "Pass one in that range."
            )
        return index

    def find_head(self, head: int | None) -> int | None:
        """Returns the index of an attention head, counted from the end where negative; None for all."""
        count = self.config.num_heads * self.config.num_parallel
        if head is None:
            return None
        if not -count <= head < count:
            raise ConfigError(
                f"Cannot explain the head. Expected an index from {-count} to {count - 1}. Received: head={head}. "
                "Pass one in that range, or none for the mean."
            )
        return head % count

    # ----- explanations

    def explain(
        self,
        image: np.ndarray | str | Path,
        *,
        methods: Sequence[str] | None = None,
        target: int | str | None = None,
        block: int | None = None,
        head: int | None = None,
        fill: Fill = "mean",
        steps: int = 4,
    ) -> list[Explanation]:
        """Explains the model's answer to one image.

        Args:
            image: uint8 (H, W), (H, W, 1) or (H, W, 3) of any size, or a file.
            methods: Names of `list_methods()`. Default: all that suit the model.
            target: The class to explain, by name or index. Default: the one that the model answers.
            block: Which block, for methods that look at one; negative from the end. Default: the last.
            head: Which attention head, for `"attention"` and `"attention-gradient"`. Default: the mean over heads.
            fill: What stands for nothing, for `"occlusion"` and `"integrated-gradients"`: the image's mean colour, or
                its blur.
            steps: Over how many steps gradients by attention are averaged, for `"relevance"` and
                `"attention-gradient"`, at least 1. In 1 step relevance is as published; where a model is sure of its
                answer, it then often misses what decides (docs/explain.md).

        Returns:
            One explanation for each method, in that order.

        Raises:
            UnknownNameError: If there is no such method or class.
            ConfigError: If a method does not suit the model, an index is out of range, or the image is none.
            ImageError: If the file cannot be read.
        """
        names = self.check_methods(methods)
        block, head = self.find_block(block), self.find_head(head)
        if steps < 1:
            raise ConfigError(f"Cannot average gradients. Expected 1 step or more. Received: steps={steps}. Pass 4.")
        if fill not in ("mean", "blur"):
            raise ConfigError(f"Cannot use fill. Expected 'mean' or 'blur'. Received: fill={fill!r}. Pass one of them.")
        index = None if target is None else self.find_class(target)
        if not {"relevance", "attention-gradient"} & set(names):
            steps = 1  # no other method reads gradients by attention
        question = _Question(self, self.prepare(image), index, block, head, fill, steps)
        return [question.answer(name) for name in names]

    def trace(self, image: np.ndarray, target: int | None = None, steps: int = 1) -> "Trace":
        """Returns what happens to an image inside: attention, tokens, gradients.

        Args:
            image: uint8 (H, W, C) of the model's size (see `prepare`).
            target: Index of the class whose logit the gradients are of; None for no gradients.
            steps: As in `explain`.
        """
        return self._trace(self.normalize(image[None])[0], target, steps)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Returns images (B, H, W, C), 0 to 255, as the model's layers take them, float32."""
        mean, std = (np.array(values, "float32") for values in (self.input_spec.mean, self.input_spec.std))
        return (images.astype("float32") / 255 - mean) / std

    @functools.cached_property
    def _trace(self) -> "Callable[[np.ndarray, int | None, int], Trace]":
        from vitreous.explanation.trace import create_trace_function

        return create_trace_function(self.model)

    @functools.cached_property
    def filters(self) -> dict[str, np.ndarray]:
        """What the model looks for first: `filters` (D, h, w, C), their `components`, and `variance_shares`."""
        filters = maps.get_filters(self.model)
        _, components, shares = maps.find_components(filters.reshape(len(filters), -1), _MOST_COMPONENTS)
        components = components.reshape(-1, *filters.shape[1:])
        return {"filters": filters, "components": components, "variance_shares": shares}

    @functools.cached_property
    def image_gradients(self) -> Callable[[np.ndarray, int], np.ndarray]:
        """A function of normalised images (B, H, W, C) and a class: the gradients of its logit."""
        from vitreous.explanation.trace import create_image_gradient_function

        return create_image_gradient_function(self.model)


class _Question:
    """One image and one class; what several methods need is computed once."""

    def __init__(
        self,
        explainer: Explainer,
        image: np.ndarray,
        target: int | None,
        block: int,
        head: int | None,
        fill: Fill,
        steps: int,
    ):
        self.explainer = explainer
        self.config = explainer.config
        self.image = image
        self.block, self.head, self.fill, self.steps = block, head, fill, steps
        self.logits = explainer.predict(image[None])[0] if self.config.num_classes else np.zeros(0, "float32")
        answer = int(self.logits.argmax()) if self.config.num_classes else None
        self.target = answer if target is None else target
        self.is_answer = answer is not None and self.target == answer
        self.edges = find_edges(self.config.patch_grid, self.config.image_size)

    def answer(self, method: str) -> Explanation:
        """Returns the explanation by a method."""
        compute = getattr(self, f"_{method.replace('-', '_')}")
        values, unit, note, arrays = compute()
        name = probability = None
        if self.target is not None:
            names = self.explainer.class_names
            name = names[self.target] if names else f"class {self.target}"
            probability = float(self.explainer.probabilities(self.logits[None])[0, self.target])
        return Explanation(
            method=method,
            image=self.image,
            grid=self.config.patch_grid,
            map=None if values is None else np.asarray(values, "float32").reshape(self.config.grid_size),
            is_signed=METHODS[method].is_signed,
            unit=unit,
            note=note,
            arrays=arrays,
            logits=self.logits,
            class_index=self.target,
            class_name=name,
            probability=probability,
            is_answer=self.is_answer,
        )

    @functools.cached_property
    def trace(self) -> "Trace":
        return self.explainer.trace(self.image, self.target, self.steps)

    def _in_block(self) -> str:
        which = f"block {self.block} of 0 to {self.config.num_blocks - 1}"
        return f"{which}, {'mean over heads' if self.head is None else f'head {self.head}'}"

    def _patches(self) -> Any:
        rows, columns = self.config.grid_size
        patches = extract_patches(self.image[None], self.config.patch_grid)[0]
        return None, "", f"{rows} × {columns} patches", {"patches": patches}

    def _positions(self) -> Any:
        similarity, kind = maps.compare_positions(self.explainer.model, self.config.grid_size)
        arrays = {"similarity": similarity.reshape(*self.config.grid_size, *self.config.grid_size)}
        return None, "cosine similarity", f"{kind} positions", arrays

    def _filters(self) -> Any:
        arrays = self.explainer.filters
        where = "first convolution" if self.config.stem == "convolution" else "patch projection"
        share = arrays["variance_shares"].sum()
        return None, "", f"{where}, {len(arrays['components'])} components: {share:.0%} of the variance", dict(arrays)

    def _attention(self) -> Any:
        attention = self.trace.attention
        chosen = attention[self.block].mean(axis=0) if self.head is None else attention[self.block, self.head]
        each = [
            maps.read_patches(self.config, weights, self.trace)
            for weights in attention.reshape(-1, *attention.shape[2:])
        ]
        arrays = {
            "attention": attention,
            "heads": np.stack(each).reshape(*attention.shape[:2], *self.config.grid_size).astype("float32"),
        }
        if self.trace.pool_attention is not None:
            arrays["pool_attention"] = self.trace.pool_attention
        return maps.read_patches(self.config, chosen, self.trace), "attention", self._in_block(), arrays

    def _rollout(self) -> Any:
        rollout = maps.roll_out(self.trace.attention)
        return maps.read_patches(self.config, rollout, self.trace), "share of attention", "", {"rollout": rollout}

    def _relevance(self) -> Any:
        trace = self.trace
        relevance = maps.relate(trace.attention, trace.attention_gradients, self.config.num_parallel)
        values = maps.read_relevance(self.config, relevance, trace)
        note = f"gradients of {self.steps} step{'s' * (self.steps > 1)}"
        return values, "relevance", note, {"relevance": relevance}

    def _attention_gradient(self) -> Any:
        trace = self.trace
        products = np.maximum(trace.attention[self.block] * trace.attention_gradients[self.block], 0)
        heads = np.stack([maps.read_patches(self.config, each, trace, use_gradients=True) for each in products])
        values = heads.mean(axis=0) if self.head is None else heads[self.head]
        arrays = {"heads": heads.reshape(-1, *self.config.grid_size)}
        return values, "attention × gradient", self._in_block(), arrays

    def _grad_cam(self) -> Any:
        prefix = self.config.num_prefix_tokens
        tokens, gradients = (x[self.block, prefix:] for x in (self.trace.tokens, self.trace.token_gradients))
        values, weights = maps.weigh_tokens(tokens, gradients)
        return values, "activation", f"tokens that enter block {self.block}", {"weights": weights}

    def _integrated_gradients(self) -> Any:
        steps = _NUM_PATH_STEPS
        image = self.explainer.normalize(self.image[None])[0]
        nothing_pixels = fill_image(self.image, self.fill)
        nothing = self.explainer.normalize(nothing_pixels[None])[0]
        shares = ((np.arange(steps, dtype="float32") + 0.5) / steps)[:, None, None, None]
        between = nothing + shares * (image - nothing)
        half = steps // 2  # a batch that fits into a core's cache
        gradients = [self.explainer.image_gradients(part, self._target()) for part in (between[:half], between[half:])]
        pixels = ((image - nothing) * np.concatenate(gradients).mean(axis=0)).sum(axis=-1)
        change = self.logits[self._target()] - self.explainer.predict(nothing_pixels[None])[0, self._target()]
        note = f"{steps} steps from {_describe(self.fill)}; sum {pixels.sum():.3g}, the logit's own change {change:.3g}"
        return sum_cells(pixels, self.edges), "change of the logit", note, {"pixels": pixels.astype("float32")}

    def _occlusion(self) -> Any:
        windows = create_windows(self.config.grid_size, _MOST_WINDOWS)
        images = take_out(self.image, fill_image(self.image, self.fill), windows, self.edges)
        falls = self.logits[self._target()] - self.explainer.predict(images)[:, self._target()]
        values = (windows * falls[:, None, None]).sum(axis=0)
        rows, columns = (int(windows[0].any(axis=axis).sum()) for axis in (1, 0))
        note = f"{len(windows)} windows of {rows} × {columns} patches, {_describe(self.fill)} in their place"
        return values, "fall of the logit", note, {"falls": falls.astype("float32")}

    def _pca(self) -> Any:
        prefix = self.config.num_prefix_tokens
        is_last = self.block == self.config.num_blocks - 1
        tokens = self.trace.features if is_last else self.trace.tokens[self.block + 1]
        scores, _, shares = maps.find_components(tokens[prefix:])
        scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))
        grid = self.config.grid_size
        arrays = {
            "colours": maps.colour_scores(scores).reshape(*grid, 3),
            "scores": scores.reshape(*grid, 3),
            "variance_shares": shares,
        }
        note = f"tokens that leave block {self.block}, 3 components: {shares.sum():.0%} of the variance"
        return None, "", note, arrays

    def _target(self) -> int:
        """The class, for methods that a model without classes is not asked for."""
        return int(self.target)  # type: ignore[arg-type]


def _describe(fill: Fill) -> str:
    return "the mean colour" if fill == "mean" else "the blurred image"


def locate_model(source: str | Path) -> Run | str:
    """Returns the run that a path is, or is the model of; else what `import_weights` takes. It loads no Keras.

    Args:
        source: As for `load_explainer`.

    Raises:
        MissingPathError: If a path does not exist.
        RunError: If a folder is a run, but a damaged one.
        WeightsError: If a name has no published weights.
    """
    run = find_run(source)
    if run is not None:
        return run
    text = str(source)
    if Path(text).exists() or text.startswith(("hf:", "timm/")):
        return text
    if text.partition(".")[0] not in list_models():
        raise MissingPathError(
            "Cannot load the model. Expected a run, a file or folder of weights, timm/NAME.TAG, hf:OWNER/NAME, or a "
            f"name that `vitreous models` lists. Received: {text!r}, which does not exist. Check the path."
        )
    published = list_weights(text)
    if not published:
        raise WeightsError(
            f"Cannot load the weights of {text}. Expected a model whose weights are published. Received: none are. "
            "Train it, and pass the run."
        )
    return f"timm/{published[0].name}"


def load_explainer(source: str | Path | Run, *, image_size: int | tuple[int, int] | None = None) -> Explainer:
    """Loads a model to explain.

    Args:
        source: A run or its folder; a file or folder of weights, as `import_weights` takes them; `timm/NAME.TAG`,
            `hf:OWNER/NAME`; or a name of `list_models()`, for its published weights.
        image_size: (H, W) in pixels or one number, for weights, whose positions are resized, and for runs of a model
            with `has_dynamic_size`. Default: the model's own.

    Raises:
        MissingPathError: If a path does not exist.
        RunError: If a folder is a run, but a damaged one.
        WeightsError: If weights cannot be read, or there are none of that name.
        ConfigError: If the model takes no images of that size.
    """
    located = source if isinstance(source, Run) else locate_model(source)
    if isinstance(located, Run):
        spec = located.input_spec
        if image_size is not None:
            spec = spec.replace(image_size=as_pair(image_size, "image_size"))
        return Explainer(
            located.load_model(),
            input_spec=spec,
            class_names=located.class_names,
            is_multi_label=located.is_multi_label,
            temperature=located.temperature,
        )
    from vitreous.weights import import_weights

    report = import_weights(located, image_size=image_size, dtype="float32")
    return Explainer(report.model, input_spec=report.input_spec, class_names=report.class_names)


def explain(
    model: "str | Path | Run | Explainer",
    image: np.ndarray | str | Path,
    *,
    method: str = "relevance",
    target: int | str | None = None,
    block: int | None = None,
    head: int | None = None,
    fill: Fill = "mean",
    steps: int = 4,
) -> Explanation:
    """Explains a model's answer to an image, by one method.

    For several methods or images, `load_explainer` once and ask its `explain`.

    Args:
        model: As for `load_explainer`, or an `Explainer`.
        image: uint8 (H, W), (H, W, 1) or (H, W, 3) of any size, or a file.
        method: A name of `list_methods()`.
        target: The class to explain, by name or index. Default: the one that the model answers.
        block: Which block, for methods that look at one; negative from the end. Default: the last.
        head: Which attention head. Default: the mean over heads.
        fill: What stands for nothing: `"mean"` or `"blur"`.
        steps: Over how many steps gradients by attention are averaged, at least 1.

    Returns:
        The explanation; `map` has a value for each patch.

    Raises:
        UnknownNameError: If there is no such method or class.
        ConfigError: If the method does not suit the model, an index is out of range, or the image is none.
        ImageError: If the file cannot be read.
        MissingPathError: If a path does not exist.

    Example:

    ```python
    explanation = vitreous.explain("runs/photos-1", "cat.jpg")
    print(explanation.class_name, explanation.probability, explanation.map.argmax())
    ```
    """
    explainer = model if isinstance(model, Explainer) else load_explainer(model)
    return explainer.explain(image, methods=[method], target=target, block=block, head=head, fill=fill, steps=steps)[0]
