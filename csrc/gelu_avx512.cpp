#if defined(__x86_64__)
#define VSPDF_WIDTH 16
#define VSPDF_TABLE gelu_kernels_avx512
#include "gelu_kernels.inl"
#endif
