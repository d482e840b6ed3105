"""Which values of a recipe a tuning searches, in which ranges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitreous.training.recipe import Recipe

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Dimension:
    """One value of a recipe that is searched.

    Args:
        key: Its path in the recipe, such as `optimizer.learning_rate`.
        low: Smallest value.
        high: Largest value.
        is_log: Whether values are drawn evenly on a logarithmic scale.
        choices: Instead of a range: the values there are.
        needs: (key, value) of another dimension without which this one has no effect.
    """

    key: str
    low: float = 0.0
    high: float = 1.0
    is_log: bool = False
    choices: tuple[str, ...] = ()
    needs: tuple[str, str] | None = None

    def suggest(self, trial: "optuna.Trial") -> Any:
        """Draws a value."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.key == "augment.shift_pixels":
            return trial.suggest_int(self.key, int(self.low), int(self.high))
        return trial.suggest_float(self.key, self.low, self.high, log=self.is_log)


def search_space(recipe: Recipe, fixed: Mapping[str, Any] | None = None) -> tuple[Dimension, ...]:
    """Returns what is searched around a recipe; a range is widened where the recipe's own value lies outside.

    Args:
        recipe: The recipe to begin with.
        fixed: Values that stay, as changes for `Recipe.merge`.

    Ranges: learning rate a tenth to ten times the recipe's, logarithmic; weight decay 0.005 to 0.5, logarithmic (linear
    from 0 where the recipe has none); adamw or muon; label smoothing 0 to 0.3, but for the asymmetric loss; smallest
    crop 0.1 to 1 of the area, or largest shift 0 to twice the recipe's where it shifts instead of cropping; policy
    none, trivial, rand or three, and for rand its magnitude 1 to 10; mixup's alpha 0 to 0.8; stochastic depth 0 to 0.3.
    """
    rate, decay = recipe.optimizer.learning_rate, recipe.optimizer.weight_decay
    space = [
        Dimension("optimizer.learning_rate", rate / 10, min(rate * 10, 10.0), is_log=True),
        Dimension("optimizer.weight_decay", 0.005 if decay else 0.0, 0.5, is_log=decay > 0),
        Dimension("optimizer.name", choices=("adamw", "muon")),
        Dimension("augment.policy", choices=("none", "trivial", "rand", "three")),
        Dimension("augment.rand_magnitude", 1.0, 10.0, needs=("augment.policy", "rand")),
        Dimension("augment.mixup_alpha", 0.0, 0.8),
        Dimension("architecture.stochastic_depth_rate", 0.0, 0.3),
    ]
    if recipe.loss != "asymmetric":  # which takes none
        space.insert(3, Dimension("optimizer.label_smoothing", 0.0, 0.3))
    if recipe.augment.has_crop:
        space.append(Dimension("augment.crop_scale", 0.1, 1.0))
    elif recipe.augment.shift_pixels:
        space.append(Dimension("augment.shift_pixels", 0, 2 * recipe.augment.shift_pixels))
    values = read_values(recipe, space)
    found = []
    for each in space:
        table, key = each.key.split(".")
        if key in ((fixed or {}).get(table) or {}):
            continue
        if not each.choices:
            each = Dimension(
                each.key,
                min(each.low, values[each.key]),
                max(each.high, values[each.key]),
                is_log=each.is_log,
                needs=each.needs,
            )
        found.append(each)
    return tuple(found)


def read_values(recipe: Recipe, space: Sequence[Dimension]) -> dict[str, Any]:
    """Returns a recipe's own values of the dimensions, by key."""
    values = {}
    for each in space:
        table, key = each.key.split(".")
        value = recipe.to_dict()[table].get(key, 0.0)  # what architecture leaves out is the model's own: no depth drop
        values[each.key] = value[0] if key == "crop_scale" else value
    return values


def to_changes(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by their path as changes for `Recipe.merge`; numbers as short as makes no difference."""
    changes: dict[str, Any] = {}
    for path, value in params.items():
        table, key = path.split(".")
        value = float(f"{value:.3g}") if isinstance(value, float) else value
        changes.setdefault(table, {})[key] = (value, 1.0) if key == "crop_scale" else value
    return changes
