#if defined(__x86_64__)
#define VSPDF_WIDTH 8
#define VSPDF_TABLE sddmm_kernels_avx2
#include "sddmm_kernels.inl"
#endif
