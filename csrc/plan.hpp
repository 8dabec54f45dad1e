// Everything that is known of one pattern before any value is: built once, immutable, shared by threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "isa.hpp"

namespace vspdf {

enum class Dtype : int { f32 = 0, bf16 = 1 };  // of everything a call reads and writes; sums are always float32

// Kept positions in compressed rows. Columns ascend in each row and fit 16 bits: a side has at most 65,536 features.
struct Csr {
    int rows = 0;
    int cols = 0;
    std::vector<uint32_t> start;  // rows + 1
    std::vector<uint16_t> col;    // nnz

    int64_t nnz() const { return int64_t(col.size()); }
    size_t nbytes() const { return start.size() * sizeof(uint32_t) + col.size() * sizeof(uint16_t); }
};

// The transpose of `csr`; source[i] is the place in `csr` of the transpose's i-th entry.
Csr transpose(const Csr& csr, std::vector<uint32_t>& source);

// A part of a plan, built at its first use by whichever thread comes first.
template <class T>
class Lazy {
  public:
    template <class... Args>
    const T& get(const Args&... args) const {
        std::call_once(once_, [&] {
            part_ = std::make_unique<T>(args...);
            ready_.store(part_.get(), std::memory_order_release);
        });
        return *part_;
    }
    size_t nbytes() const {
        const T* part = ready_.load(std::memory_order_acquire);
        return part ? part->nbytes() : 0;
    }

  private:
    mutable std::once_flag once_;
    mutable std::unique_ptr<T> part_;
    mutable std::atomic<const T*> ready_{nullptr};
};

class SpmmPart;
class SddmmPart;

// The plan of a weight W[out_features, in_features]. Every product returns the multiply-adds it executed, padding
// included. Rows of matrices are contiguous; strides count elements and may be 0 or larger than the row.
class Plan {
  public:
    Plan(int out_features, int in_features, const int64_t* crow, const int32_t* cols, Isa isa, bool jit);
    ~Plan();

    // y[tokens, out] = x[tokens, in] W^T + bias (may be null)
    int64_t forward(void* y, const void* x, int64_t x_stride, const void* values, const void* bias, int64_t tokens,
                    Dtype dtype, int threads) const;
    // dx[tokens, in] = dy[tokens, out] W
    int64_t grad_input(void* dx, const void* dy, int64_t dy_stride, const void* values, int64_t tokens, Dtype dtype,
                       int threads) const;
    // dvalues[nnz] = (dy^T x) at the kept positions, in row-major order
    int64_t grad_values(void* dvalues, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                        int64_t tokens, Dtype dtype, int threads) const;

    // Builds what the products would build at first use.
    void prepare() const;

    Isa isa() const { return isa_; }
    bool jit() const { return jit_; }
    const Csr& csr() const { return csr_; }
    size_t nbytes() const;
    // (product, one line on the kernel that would run and why)
    std::vector<std::pair<std::string, std::string>> describe(int64_t tokens, int threads) const;

  private:
    Csr csr_;
    Isa isa_;
    bool jit_;
    Lazy<SpmmPart> forward_, transposed_;
    Lazy<SddmmPart> gradient_;
};

}  // namespace vspdf
