"""Programs for the fabric, each with inputs and outputs as NumPy arrays: what runs on level 1.

Every function builds code and routes, runs the region and returns a `Run` with the values computed and the cycles
counted. Nothing here is fitted per program: all costs are the machine's.
"""

from vspdf.simulator.events.programs.collectives import (
    VECTOR_MODES as VECTOR_MODES,
)
from vspdf.simulator.events.programs.collectives import (
    broadcast as broadcast,
)
from vspdf.simulator.events.programs.collectives import (
    reduce as reduce,
)
from vspdf.simulator.events.programs.collectives import (
    vector_op as vector_op,
)
from vspdf.simulator.events.programs.common import (
    Run as Run,
)
from vspdf.simulator.events.programs.common import (
    align as align,
)
from vspdf.simulator.events.programs.common import (
    check_memory as check_memory,
)
from vspdf.simulator.events.programs.matmul import (
    Product as Product,
)
from vspdf.simulator.events.programs.matmul import (
    check_gemm as check_gemm,
)
from vspdf.simulator.events.programs.matmul import (
    emit_product as emit_product,
)
from vspdf.simulator.events.programs.matmul import (
    ring_colours as ring_colours,
)
from vspdf.simulator.events.programs.matmul import (
    ring_gemm as ring_gemm,
)
from vspdf.simulator.events.programs.matmul import (
    ring_order as ring_order,
)
from vspdf.simulator.events.programs.matmul import (
    summa as summa,
)
from vspdf.simulator.events.programs.matvec import (
    emit_gemv as emit_gemv,
)
from vspdf.simulator.events.programs.matvec import (
    mesh_gemv as mesh_gemv,
)
from vspdf.simulator.events.programs.matvec import (
    tree as tree,
)
from vspdf.simulator.events.programs.spmm import (
    FORMATS as FORMATS,
)
from vspdf.simulator.events.programs.spmm import (
    check_spmm as check_spmm,
)
from vspdf.simulator.events.programs.spmm import (
    cut as cut,
)
from vspdf.simulator.events.programs.spmm import (
    dense as dense,
)
from vspdf.simulator.events.programs.spmm import (
    dense_layout as dense_layout,
)
from vspdf.simulator.events.programs.spmm import (
    emit_dense as emit_dense,
)
from vspdf.simulator.events.programs.spmm import (
    emit_spmm as emit_spmm,
)
from vspdf.simulator.events.programs.spmm import (
    spmm as spmm,
)
from vspdf.simulator.events.programs.spmm import (
    tile_counts as tile_counts,
)
from vspdf.simulator.events.programs.spmm import (
    tile_layout as tile_layout,
)
from vspdf.simulator.events.programs.streaming import (
    Stream as Stream,
)
from vspdf.simulator.events.programs.streaming import (
    stream_gradient as stream_gradient,
)
from vspdf.simulator.events.programs.streaming import (
    stream_layer as stream_layer,
)
