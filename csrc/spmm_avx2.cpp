#if defined(__x86_64__)
#define VSPDF_WIDTH 8
#define VSPDF_TABLE spmm_kernels_avx2
#include "spmm_kernels.inl"
#endif
