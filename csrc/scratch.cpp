#include "scratch.hpp"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vspdf {
namespace {

constexpr size_t kHuge = size_t(2) << 20;
constexpr size_t kKept = size_t(256) << 20;  // bytes kept for later calls

struct Block {
    void* data;
    size_t size;
};

std::mutex mutex;
std::vector<Block>& blocks() {
    static auto* kept = new std::vector<Block>;  // never destroyed: threads may outlive static objects
    return *kept;
}
size_t kept_bytes = 0;

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), size_(0) {
    {
        std::lock_guard<std::mutex> lock(mutex);
        std::vector<Block>& kept = blocks();
        size_t best = kept.size();
        for (size_t i = 0; i < kept.size(); ++i) {
            if (kept[i].size >= bytes && (best == kept.size() || kept[i].size < kept[best].size)) best = i;
        }
        if (best < kept.size()) {
            data_ = kept[best].data;
            size_ = kept[best].size;
            kept_bytes -= size_;
            kept[best] = kept.back();
            kept.pop_back();
            return;
        }
    }
    const size_t align = bytes >= kHuge / 2 ? kHuge : 4096;
    size_ = bytes == 0 ? align : (bytes + align - 1) / align * align;
    if (posix_memalign(&data_, align, size_) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == kHuge) madvise(data_, size_, MADV_HUGEPAGE);
#endif
}

Scratch::~Scratch() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (kept_bytes + size_ <= kKept) {
            blocks().push_back({data_, size_});
            kept_bytes += size_;
            return;
        }
    }
    std::free(data_);
}

}  // namespace vspdf
