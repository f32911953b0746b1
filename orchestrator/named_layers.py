"""Put numbers in the place of `old layers` and `new layers`, as the base's lineage.json tells them."""

import dataclasses
from pathlib import Path

from megatron_solar.lineage import LINEAGE_FILE, read_lineage
from orchestrator.errors import ConfigError
from orchestrator.freezing import NEW_LAYERS, OF_THE_LINEAGE, new_layers, spell_layers
from orchestrator.settings import FrozenPart, RunSettings


def with_layers_named(settings: RunSettings) -> RunSettings:
    """Return settings that tell frozen layers by their numbers; a base that is not there yet changes nothing.

    Raises:
        ConfigError: the base does not tell which layers are new, or none is.
        ModelFolderError: its lineage is damaged.
    """
    base = Path(settings.base)
    if not any(each.what in OF_THE_LINEAGE for each in settings.training.frozen) or not base.is_dir():
        return settings
    lineage = read_lineage(base)
    new = new_layers(lineage.get("layer_sources", ()), lineage.get("zeroed_layers", ()))
    if not new:
        raise ConfigError(
            f"training.frozen names `old layers` or `new layers`, and {base} has no {LINEAGE_FILE} that tells them; "
            "write their numbers, such as `layers 0-23,40-47`"
        )
    old = [layer for layer in range(len(lineage["layer_sources"])) if layer not in new]

    def named(each: FrozenPart) -> FrozenPart:
        if each.what not in OF_THE_LINEAGE:
            return each
        return dataclasses.replace(each, what=spell_layers(new if each.what == NEW_LAYERS else old))

    training = dataclasses.replace(settings.training, frozen=tuple(map(named, settings.training.frozen)))
    return dataclasses.replace(settings, training=training)
