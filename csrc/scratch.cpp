#include "scratch.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vspdf {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHuge = size_t(2) << 20;

struct Block {
    void* data;
    size_t size;
};

// What was given back, the oldest first. Never destroyed: threads may outlive static objects.
class Pool {
  public:
    static Pool& get() {
        static Pool* const pool = new Pool;
        return *pool;
    }

    // A block of `bytes` or at most half as much again; none: {null, 0}. A larger one is left to those who need it.
    Block take(size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        size_t best = count_;
        for (size_t i = 0; i < count_; ++i) {
            const size_t size = kept_[i].size;
            if (size >= bytes && size <= bytes + bytes / 2 && (best == count_ || size < kept_[best].size)) {
                best = i;
            }
        }
        return best == count_ ? Block{nullptr, 0} : remove(best);
    }

    void give(Block block) {
        while (true) {
            Block old;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                if (block.size > kMost) {
                    old = block;
                } else if (count_ == kept_.size() || bytes_ + block.size > kMost) {
                    old = remove(0);  // sizes that are no longer asked for leave
                } else {
                    kept_[count_++] = block;
                    bytes_ += block.size;
                    return;
                }
            }
            std::free(old.data);
            if (old.data == block.data) return;
        }
    }

    size_t nbytes() {
        std::lock_guard<std::mutex> lock(mutex_);
        return bytes_;
    }

  private:
    static constexpr size_t kMost = size_t(256) << 20;  // bytes

    Pool() {
#if defined(__unix__) || defined(__APPLE__)
        // A child must not find the mutex held by a thread that it does not have.
        pthread_atfork([] { get().mutex_.lock(); }, [] { get().mutex_.unlock(); }, [] { get().mutex_.unlock(); });
#endif
    }

    Block remove(size_t i) {
        const Block block = kept_[i];
        std::copy(kept_.begin() + i + 1, kept_.begin() + count_, kept_.begin() + i);
        --count_;
        bytes_ -= block.size;
        return block;
    }

    std::mutex mutex_;
    std::array<Block, 64> kept_;
    size_t count_ = 0, bytes_ = 0;
};

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), size_(0) {
    if (bytes == 0) return;
    const size_t align = bytes >= kHuge / 2 ? kHuge : kPage;
    size_ = (bytes + align - 1) / align * align;
    const Block block = Pool::get().take(size_);
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
    if (data_) Pool::get().give({data_, size_});
}

size_t scratch_nbytes() { return Pool::get().nbytes(); }

}  // namespace vspdf
