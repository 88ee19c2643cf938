"""Why a model cannot be placed, in words for people. Pure; it decides nothing."""

from collections.abc import Sequence

from fallow.policy.placement_inputs import ModelNeed, NodeRoom, PlacementRules, may_hold


def why_not(model: ModelNeed, nodes: Sequence[NodeRoom], rules: PlacementRules) -> str:
    """The first of the reasons that applies: nobody there, nobody lawful, nobody who can load it, too little memory."""
    lawful = [node for node in nodes if may_hold(node, model)]
    usable = [node for node in lawful if model.model not in node.barred]
    if not nodes:
        return "no device is present"
    if not lawful:
        where = f" in {', '.join(sorted(model.regions))}" if model.regions else ""
        asked = f"{where}, {model.tier_min.name.lower()} or better"
        return f"none of the {len(nodes)} devices present is{asked}"
    if not usable:
        return f"every device present ({len(lawful)}) failed to load it a moment ago; their status says why"
    room_mib = sum(node.weights_bytes for node in usable) / 2**20
    limit = f", at most {rules.max_share:.0%} of its work each" if rules.max_share < 1 else ""
    return (
        f"its {model.layer_count} layers ({model.whole_bytes / 2**20:.0f} MiB) do not fit the {len(usable)} "
        f"device{'s' if len(usable) > 1 else ''} present ({room_mib:.0f} MiB for weights{limit}): add devices or memory"
    )
