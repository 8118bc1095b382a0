"""Figures, source listings and progress bars: everything that a chapter shows.

Chapters write `from slimlab import show` and call `show.attention_map(...)`.
"""

from slimlab.show.architecture import framed_figure, mask_panels
from slimlab.show.charts import bars, curves, ledger_figure
from slimlab.show.diagrams import box_figure, flow_figure, lanes_figure, matrix_product_figure
from slimlab.show.images import images_figure
from slimlab.show.intervals import interval_figure
from slimlab.show.maps import attention_map, heads_figure, mask_figure
from slimlab.show.mesh import mesh_figure
from slimlab.show.parallel import overlap_figure, scaling_figure, shards_figure
from slimlab.show.predicted import predicted_figure
from slimlab.show.schedules import schedule_figure
from slimlab.show.sharding import block_matrices_figure, cut_figure, layout_figure
from slimlab.show.source import show_source
from slimlab.show.sparsity import sparsity_figure
from slimlab.show.stacks import stacked_bars, waterfall_figure
from slimlab.show.style import COLOURS, use_style
from slimlab.show.timeline import timeline_figure
from slimlab.show.traffic import bytes_figure, cost_figure, steps_figure
from slimlab.text.progress import progress

__all__ = [
    "COLOURS",
    "attention_map",
    "bars",
    "block_matrices_figure",
    "box_figure",
    "bytes_figure",
    "cost_figure",
    "curves",
    "cut_figure",
    "flow_figure",
    "framed_figure",
    "heads_figure",
    "images_figure",
    "interval_figure",
    "lanes_figure",
    "layout_figure",
    "ledger_figure",
    "mask_figure",
    "mask_panels",
    "matrix_product_figure",
    "mesh_figure",
    "overlap_figure",
    "predicted_figure",
    "progress",
    "scaling_figure",
    "schedule_figure",
    "shards_figure",
    "show_source",
    "sparsity_figure",
    "stacked_bars",
    "steps_figure",
    "timeline_figure",
    "use_style",
    "waterfall_figure",
]
