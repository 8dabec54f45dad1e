"""Programs for the fabric, each with inputs and outputs as NumPy arrays: what runs on level 1.

Every function builds code and routes, runs the region and returns an `Outcome` with the values computed and the cycles
counted. Nothing here is fitted per program: all costs are the machine's.
"""

from vspdf.simulator.events.programs.collectives import VECTOR_MODES, broadcast, reduce, vector_op
from vspdf.simulator.events.programs.common import Outcome, align, check_memory
from vspdf.simulator.events.programs.matmul import Product, check_gemm, emit_product, ring_gemm, ring_order, summa
from vspdf.simulator.events.programs.matvec import emit_gemv, gemv_sum, mesh_gemv, tree
from vspdf.simulator.events.programs.spmm import (
    FORMATS,
    SMALLER,
    check_spmm,
    dense,
    dense_layout,
    emit_dense,
    emit_spmm,
    spmm,
    tile_counts,
    tile_layout,
)
from vspdf.simulator.events.programs.streaming import stream_gradient, stream_layer

__all__ = [
    "FORMATS", "SMALLER", "VECTOR_MODES", "Outcome", "Product", "align", "broadcast", "check_gemm", "check_memory",
    "check_spmm", "dense", "dense_layout", "emit_dense", "emit_gemv", "emit_product", "emit_spmm", "gemv_sum",
    "mesh_gemv", "reduce", "ring_gemm", "ring_order", "spmm", "stream_gradient", "stream_layer", "summa", "tile_counts",
    "tile_layout", "tree", "vector_op",
]  # fmt: skip
