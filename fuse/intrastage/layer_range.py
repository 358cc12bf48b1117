"""Which layers a stage keeps, and what its parameters are called in the whole model."""

from __future__ import annotations


def even_layer_range(num_layers: int, stage: int, num_stages: int) -> tuple[int, int]:
    """Layers [start, stop) of a stage when layers are spread as evenly as they go, the surplus on late stages."""
    return num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages


def checked_layer_range(
    model: str,
    num_layers: int,
    layer_range: tuple[int, int] | None,
    *,
    stage: int,
    num_stages: int,
    min_layers: int = 0,
) -> tuple[int, int]:
    """The layers [start, stop) of a stage: those asked for, or an even share.

    model: for errors.

    Raises: ValueError when there is no such stage, or its layers are too few or outside the model.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} of {num_stages}: stages count from 0 to num_stages - 1")
    start, stop = layer_range or even_layer_range(num_layers, stage, num_stages)
    if not 0 <= start <= start + min_layers <= stop <= num_layers:
        raise ValueError(
            f"layer range {(start, stop)} of {model}: must lie within its {num_layers} layers and have at least "
            f"{min_layers} of them: choose another, or fewer stages"
        )
    return start, stop


def global_name(name: str, layers_prefix: str, first_layer: int) -> str:
    """The whole model's name of a parameter of a stage.

    The stage numbers its layers from 0; in the whole model its layer 0 is layer `first_layer`.
    """
    if not name.startswith(layers_prefix):
        return name
    layer, _, rest = name.removeprefix(layers_prefix).partition(".")
    return f"{layers_prefix}{int(layer) + first_layer}.{rest}"
