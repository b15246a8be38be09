"""A workflow as ComfyUI's page saves it -> the prompt that the page would send."""

from collections.abc import Mapping
from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
MUTED = (2, 4)  # never, bypassed


def prompt_of(workflow: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`known`: GET /object_info. Muted nodes, and notes, are left out."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    nodes = [node for node in workflow["nodes"] if node["type"] in known and node["mode"] not in MUTED]
    return {
        str(node["id"]): {"class_type": node["type"], "inputs": inputs_of(node, known[node["type"]]["input"], links)}
        for node in nodes
    }


def inputs_of(node: Mapping[str, Any], inputs: Mapping[str, Any], links: Mapping[int, Any]) -> dict[str, Any]:
    """Each input is the link that leads to it, or the value of its widget."""
    linked = {one["name"]: links[one["link"]] for one in node.get("inputs", ()) if one.get("link") is not None}
    values = list(node.get("widgets_values") or ())
    found = {}
    for name, (kind, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        more = options[0] if options else {}
        if (isinstance(kind, list) or kind in WIDGETS) and not more.get("forceInput"):
            found[name] = values.pop(0)
            if more.get("control_after_generate"):
                values.pop(0)
        if name in linked:
            found[name] = linked[name]
    return found
