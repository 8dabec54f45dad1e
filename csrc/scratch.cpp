#include "scratch.hpp"

#include <cstdlib>
#include <new>

#include "pool.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vspdf {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHuge = size_t(2) << 20;

struct Working {
    static constexpr size_t kMost = size_t(256) << 20;  // bytes
    static size_t slack(size_t bytes) { return bytes / 2; }
    static void release(Block block) { std::free(block.data); }
};

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), size_(0) {
    if (bytes == 0) return;
    const size_t align = bytes >= kHuge / 2 ? kHuge : kPage;
    size_ = (bytes + align - 1) / align * align;
    const Block block = Pool<Working>::get().take(size_);
    if (block.data) {
        data_ = block.data;
        size_ = block.size;
        return;
    }
    if (posix_memalign(&data_, align, size_) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == kHuge) madvise(data_, size_, MADV_HUGEPAGE);
#endif
}

Scratch::~Scratch() {
    if (data_) Pool<Working>::get().give({data_, size_});
}

size_t scratch_nbytes() { return Pool<Working>::get().nbytes(); }

}  // namespace vspdf
