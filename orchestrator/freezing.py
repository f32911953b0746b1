"""Which parts of a model are frozen for how many steps, and how a person names them. Pure."""

import re
from collections.abc import Sequence

from orchestrator.model_shape import TransformerShape
from orchestrator.settings import FrozenPart

EMBEDDINGS = "embeddings"
OUTPUT = "output"
FINAL_NORM = "final norm"
OLD_LAYERS = "old layers"
NEW_LAYERS = "new layers"
OF_THE_LINEAGE = (OLD_LAYERS, NEW_LAYERS)
"""Known once the base's lineage.json has been read; a plan that ranks get has their numbers."""
_SPELLINGS = "`embeddings`, `output`, `final norm`, `layers 0-23,40-47`, `old layers` or `new layers`"


def layer_part(layer: int) -> str:
    """Return the name of a layer among the parts."""
    return f"layer {layer}"


def all_parts(shape: TransformerShape) -> list[str]:
    """Return the parts that every parameter of a model lies in exactly one of."""
    ends = [EMBEDDINGS, FINAL_NORM] if shape.tie_embeddings else [EMBEDDINGS, FINAL_NORM, OUTPUT]
    return [*ends, *map(layer_part, range(shape.num_layers))]


def parts_of(what: str) -> list[str]:
    """Return the parts that a person names; none where they are told by the base's lineage.

    Raises:
        ValueError: it names none; the message says what would.
    """
    if what in (EMBEDDINGS, OUTPUT, FINAL_NORM):
        return [what]
    if what in OF_THE_LINEAGE:
        return []
    ranges = re.fullmatch(r"layers ((?:\d+(?:-\d+)?)(?:, ?\d+(?:-\d+)?)*)", what)
    if ranges is None:
        raise ValueError(f"found {what!r}; write {_SPELLINGS}")
    layers: list[int] = []
    for part in ranges[1].replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"found {part} in {what!r}; write the smaller layer first")
        layers += range(int(first), int(last or first) + 1)
    return [layer_part(layer) for layer in layers]


def frozen_steps(frozen: Sequence[FrozenPart], shape: TransformerShape) -> dict[str, int]:
    """Return for each part of a model how many steps it is frozen from the first on; 0 is never."""
    steps = dict.fromkeys(all_parts(shape), 0)
    for each in frozen:
        for part in parts_of(each.what):
            steps[part] = max(steps[part], each.steps)
    return steps


def spell_layers(layers: Sequence[int]) -> str:
    """Return 'layers 0-23,40' of sorted layer numbers."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "layers " + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def new_layers(layer_sources: Sequence[int], zeroed_layers: Sequence[int]) -> list[int]:
    """Return the layers of an up-scaled model that its base had once already, further down.

    Args:
        layer_sources: for each layer the base's, as in lineage.json.
        zeroed_layers: those that add nothing at first, which are new whatever they were copied from.
    """
    if zeroed_layers:
        return sorted(zeroed_layers)
    return [layer for layer, source in enumerate(layer_sources) if source in layer_sources[:layer]]
