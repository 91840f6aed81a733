"""From a graph as it comes to one that the analysis can read: a copy with example values, in forms that follow its rows."""

from parvts_fx.capture.graphs import WithPrefix, capture, copy_graph_module

__all__ = ["WithPrefix", "capture", "copy_graph_module"]
