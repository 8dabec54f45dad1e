#if defined(__x86_64__)
#define VSPDF_WIDTH 8
#define VSPDF_TABLE gelu_kernels_avx2
#include "gelu_kernels.inl"
#endif
