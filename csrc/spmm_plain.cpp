// SpMM in the compiler's own vectors: four floats, which every supported processor has.
#define VSPDF_WIDTH 4
#define VSPDF_TABLE spmm_kernels_plain
#include "spmm_kernels.inl"
