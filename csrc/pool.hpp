// Memory that was given back and waits for the next who wants as much.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace vspdf {

struct Block {
    void* data = nullptr;
    size_t size = 0;
};

// Blocks of one Kind, the oldest first: Kind::kMost bytes at most, those beyond leave by Kind::release. Thread-safe,
// also in a child that was forked meanwhile. Never destroyed: threads may outlive static objects.
template <class Kind>
class Pool {
  public:
    static Pool& get() {
        static Pool* const pool = new Pool;
        return *pool;
    }

    // A block of `bytes` or at most Kind::slack(bytes) more, or none. A larger one is left to those who need it.
    Block take(size_t bytes) {
        std::lock_guard<std::mutex> lock(mutex_);
        size_t best = count_;
        for (size_t i = 0; i < count_; ++i) {
            const size_t size = kept_[i].size;
            if (size >= bytes && size <= bytes + Kind::slack(bytes) && (best == count_ || size < kept_[best].size))
                best = i;
        }
        return best == count_ ? Block{} : remove(best);
    }

    void give(Block block) {
        while (true) {
            Block old;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                if (block.size > Kind::kMost) {
                    old = block;
                } else if (count_ == kept_.size() || bytes_ + block.size > Kind::kMost) {
                    old = remove(0);  // sizes that are no longer asked for leave
                } else {
                    kept_[count_++] = block;
                    bytes_ += block.size;
                    return;
                }
            }
            Kind::release(old);
            if (old.data == block.data) return;
        }
    }

    size_t nbytes() {
        std::lock_guard<std::mutex> lock(mutex_);
        return bytes_;
    }

  private:
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

}  // namespace vspdf
