// Reused working memory: fresh pages cost more than the work done in them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vspdf {

// A buffer aligned to a page, taken from a process-wide pool and given back when it goes out of scope. Thread-safe,
// also in a child that was forked meanwhile. The contents are whatever the last user left.
class Scratch {
  public:
    explicit Scratch(size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    float* floats() const { return static_cast<float*>(data_); }
    uint8_t* bytes() const { return static_cast<uint8_t*>(data_); }

  private:
    void* data_;
    size_t size_;
};

// Bytes that the pool keeps for later calls.
size_t scratch_nbytes();

}  // namespace vspdf
