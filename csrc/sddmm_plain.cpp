// The gradient product in the compiler's own vectors: four floats, which every supported processor has.
#define VSPDF_WIDTH 4
#define VSPDF_TABLE sddmm_kernels_plain
#include "sddmm_kernels.inl"
