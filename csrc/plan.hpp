// Everything that is known of one pattern before any value is: immutable, shared by threads, its parts built on demand.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "csr.hpp"
#include "isa.hpp"

namespace vspdf {

enum class Dtype : int { f32 = 0, bf16 = 1 };

// A part of a plan, built at its first use by whichever thread comes first.
template <class T>
class Lazy {
  public:
    template <class... Args>
    const T& get(const Args&... args) const {
        std::call_once(once_, [&] {
            part_ = std::make_unique<T>(args...);
            ready_.store(true, std::memory_order_release);
        });
        return *part_;
    }
    size_t nbytes() const { return ready_.load(std::memory_order_acquire) ? part_->nbytes() : 0; }

  private:
    mutable std::once_flag once_;
    mutable std::unique_ptr<T> part_;
    mutable std::atomic<bool> ready_{false};
};

class SpmmPart;
class SddmmPart;
class Plan;

// Columns as few tokens read them: in the row-major order of the values.
struct RowColumns : RowBlocks {
    explicit RowColumns(const Plan& plan);
};

// The plan of a weight W[out_features, in_features]. Every product returns the multiply-adds it executed, padding
// included. `dtype` is that of tokens and results, `values_dtype` that of the kept weights; sums are always float32.
// Rows of matrices are contiguous; strides count elements and may be 0 or larger than the row.
class Plan {
  public:
    // `bits` outlive the plan and stay as they are.
    Plan(int out_features, int in_features, const uint8_t* bits, Isa isa, bool jit);
    ~Plan();

    // y[tokens, out] = x[tokens, in] W^T + bias (may be null; of the values' dtype)
    int64_t forward(void* y, const void* x, int64_t x_stride, const void* values, const void* bias, int64_t tokens,
                    Dtype dtype, Dtype values_dtype, int threads) const;
    // dx[tokens, in] = dy[tokens, out] W
    int64_t grad_input(void* dx, const void* dy, int64_t dy_stride, const void* values, int64_t tokens, Dtype dtype,
                       Dtype values_dtype, int threads) const;
    // dvalues[nnz] = (dy^T x) at the kept positions, in row-major order
    int64_t grad_values(void* dvalues, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                        int64_t tokens, Dtype dtype, Dtype values_dtype, int threads) const;

    // Builds what products of many tokens would build at first use: the forward one's part, that of the gradient of the
    // values, that of the gradient of x.
    static constexpr int kParts = 3;
    void prepare(int part) const;

    Isa isa() const { return isa_; }
    bool jit() const { return jit_; }
    int rows() const { return rows_; }
    int cols() const { return cols_; }
    int64_t nnz() const { return start_.back(); }
    const std::vector<uint32_t>& start() const { return start_; }  // of each row's values; rows + 1
    const Bits& bits() const { return bits_; }
    Csr csr() const;
    const RowColumns& columns() const { return columns_.get(*this); }
    size_t nbytes() const;
    // (product, one line on the kernel that would run and why)
    std::vector<std::pair<std::string, std::string>> describe(int64_t tokens) const;

  private:
    int rows_, cols_;
    Bits bits_;
    std::vector<uint32_t> start_;
    Isa isa_;
    bool jit_;
    Lazy<RowColumns> columns_;
    Lazy<SpmmPart> forward_, transposed_;
    Lazy<SddmmPart> gradient_;
};

}  // namespace vspdf
