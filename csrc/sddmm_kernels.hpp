// The inner loops of the gradient product, compiled once per instruction set and chosen at run time.
//
// Tokens are the vector lanes, one in each or a pair of bf16. They come in chunks of lines x width lanes, packed as
// [features][chunk]; only a last chunk is shorter, by whole vectors, and its unused lanes are zero. A group of `width`
// kept weights keeps one vector of partial sums for each; at the end of the tokens these are transposed into one vector
// of sums.
#pragma once

#include "bf16.hpp"
#include "sddmm.hpp"

namespace vspdf {

// A tile's features in a packed matrix.
struct SddmmOperand {
    const float* data;
    int64_t chunk;  // lanes from one chunk to the next
    int feature;    // the tile's first

    const float* at(int i, int lanes) const { return data + i * chunk + int64_t(feature) * lanes; }
};

struct SddmmKernels {
    int width;  // lanes of a vector, and kept weights in a group
    int lines;  // vectors in a chunk
    int depth;  // tokens in a lane

    // sums[group][lane] (+)= the tile's gradient over `tokens` tokens; `first` overwrites. Returns the multiply-adds
    // executed.
    int64_t (*tile)(float* sums, const SddmmPart& part, const SddmmTile& tile, SddmmOperand x, SddmmOperand dy,
                    int tokens, bool first);

    // Writes the sums of a row's next runs, in `n` neighbouring tiles, to its gradient. Returns its end.
    float* (*unpack)(float* dvalues, const SddmmTile* tiles, const SddmmRun* runs, int n, const float* sums);
    bf16* (*unpack_bf16)(bf16* dvalues, const SddmmTile* tiles, const SddmmRun* runs, int n, const float* sums);
};

// Those that multiply tokens of `dtype`. bf16 has its own where the processor multiplies pairs as fast as floats.
const SddmmKernels& sddmm_kernels(Isa isa, Dtype dtype);
extern const SddmmKernels sddmm_kernels_plain;
#if defined(__x86_64__)
extern const SddmmKernels sddmm_kernels_avx2, sddmm_kernels_avx512, sddmm_kernels_avx512_bf16;
#endif

}  // namespace vspdf
