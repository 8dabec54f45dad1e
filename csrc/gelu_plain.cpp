#define VSPDF_WIDTH 4
#define VSPDF_TABLE gelu_kernels_plain
#include "gelu_kernels.inl"
