"""What a pass that finds nothing to do says: which ops it saw, and what has to be done first."""

from __future__ import annotations

from collections import Counter

from torch import fx

from gpd_fx.fxtools.node_arguments import op_name
from gpd_fx.fxtools.torch_internals import copy_graph
from gpd_fx.passes.raising import raise_ops
from gpd_fx.rules.table import rule_of

_MOST = 4


def seen(module: fx.GraphModule) -> str:
    """One line on the ops of a graph in which a pass found nothing to do.

    Core ATen ops come first, since the pass Normalize raises them; then ops that nothing is known of; then the most
    frequent others.
    """
    nodes = [node for node in module.graph.nodes if node.op.startswith("call")]
    if not nodes:
        return "saw no op at all"
    raised = raise_ops(copy_graph(module.graph)[0])
    if raised:
        core: Counter[str] = Counter()
        for what, count in raised.items():
            core[what.split()[0]] += count
        return f"saw {_listed(core)}, which are core ATen ops; run the pass Normalize first"
    names = (op_name(node.target) if node.op == "call_function" else f"{node.op} {node.target}" for node in nodes)
    counts = Counter(names)
    strange = Counter(
        op_name(node.target)
        for node in nodes
        if node.op == "call_function" and op_name(node.target).count(".") and rule_of(node.target) is None
    )
    if strange:
        return f"saw {_listed(strange)}, for which there is no rule, among {len(nodes)} ops"
    return f"saw {_listed(counts)}"


def _listed(counts: Counter[str]) -> str:
    first = sorted(counts.items(), key=lambda item: -item[1])[:_MOST]
    rest = len(counts) - len(first)
    return ", ".join(f"{count} {name}" for name, count in first) + (f" and {rest} more kinds" if rest else "")
