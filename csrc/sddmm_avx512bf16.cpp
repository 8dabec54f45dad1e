// The gradient product of bf16 tokens where the processor multiplies pairs of them.
#if defined(__x86_64__)
#define VSPDF_WIDTH 16
#define VSPDF_PAIRS
#define VSPDF_TABLE sddmm_kernels_avx512_bf16
// gcc 12 warns inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "sddmm_kernels.inl"
#endif
