#include "assembler.hpp"

#include <cerrno>
#include <cstring>
#include <utility>

#include "pool.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define VSPDF_MMAP 1
#endif

namespace vspdf {

#ifdef VSPDF_MMAP
namespace {

// New pages may take as long as filling them, and masks that move ask for as many again and again.
struct Code {
    static constexpr size_t kMost = size_t(64) << 20;         // bytes
    static size_t slack(size_t bytes) { return bytes / 16; }  // it counts as the plan's
    static void release(Block block) { munmap(block.data, block.size); }
};

}  // namespace
#endif

CodeBuffer::CodeBuffer(const uint8_t* code, size_t bytes, std::string& why) {
#ifdef VSPDF_MMAP
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t size = (bytes + page - 1) / page * page;
    if (size == 0) return;
    Block block = Pool<Code>::get().take(size);
    if (block.data && mprotect(block.data, block.size, PROT_READ | PROT_WRITE) != 0) {
        Code::release(block);
        block = {};
    }
    if (!block.data) {
        block = {mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), size};
        if (block.data == MAP_FAILED) {
            why = std::string("no memory for generated code (mmap: ") + std::strerror(errno) + ")";
            return;
        }
#ifdef MADV_HUGEPAGE
        madvise(block.data, size, MADV_HUGEPAGE);
#endif
    }
    std::memcpy(block.data, code, bytes);
    if (mprotect(block.data, block.size, PROT_READ | PROT_EXEC) != 0) {
        why = std::string("the system refuses generated code (mprotect: ") + std::strerror(errno) + ")";
        Code::release(block);
        return;
    }
    base_ = static_cast<uint8_t*>(block.data);
    size_ = block.size;
#else
    (void)code, (void)bytes;
    why = "generated code is not supported on this system";
#endif
}

CodeBuffer::CodeBuffer(CodeBuffer&& other) noexcept { *this = std::move(other); }

CodeBuffer& CodeBuffer::operator=(CodeBuffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(size_, other.size_);
    return *this;
}

CodeBuffer::~CodeBuffer() {
#ifdef VSPDF_MMAP
    if (base_) Pool<Code>::get().give({base_, size_});
#endif
}

size_t kept_code_nbytes() {
#ifdef VSPDF_MMAP
    return Pool<Code>::get().nbytes();
#else
    return 0;
#endif
}

void Assembler::reserve(size_t bytes) {
    if (bytes <= capacity_) return;
    auto larger = std::make_unique<Scratch>(bytes);
    if (size_) std::memcpy(larger->bytes(), code_->bytes(), size_);
    code_ = std::move(larger);
    capacity_ = bytes;
}

void Assembler::add(Reg dst, int32_t value) {
    const bool near = value >= -128 && value <= 127;
    put({uint8_t(dst & 8 ? 0x49 : 0x48), uint8_t(near ? 0x83 : 0x81), uint8_t(0xC0 | (dst & 7))});
    near ? put({uint8_t(value)}) : disp32(value);
}

void Assembler::lea(Reg dst, Mem src) {
    put({uint8_t(0x48 | (dst & 8 ? 4 : 0) | (src.base & 8 ? 1 : 0)), 0x8D,
         uint8_t(0x80 | (dst & 7) << 3 | (src.base & 7))});
    disp32(src.disp);
}

void Assembler::align(size_t to) {
    while (size() % to) put({0x90});
}

void Avx512Assembler::zero(int dst) {
    put({0x62, uint8_t((dst & 8 ? 0 : 0x80) | (dst & 16 ? 0 : 0x40) | (dst & 8 ? 0 : 0x20) | (dst & 16 ? 0 : 0x10) | 1),
         uint8_t((~dst & 15) << 3 | 4 | 1), uint8_t(0x40 | (dst & 16 ? 0 : 8)), 0xEF,
         uint8_t(0xC0 | (dst & 7) << 3 | (dst & 7))});
}

void Avx512Assembler::mem(uint8_t opcode, int map, int prefix, int reg, int vvvv, Mem rm, int scale, bool broadcast) {
    const bool near = rm.disp % scale == 0 && rm.disp / scale >= -128 && rm.disp / scale <= 127;
    put({0x62, uint8_t((reg & 8 ? 0 : 0x80) | 0x40 | (rm.base & 8 ? 0 : 0x20) | (reg & 16 ? 0 : 0x10) | map),
         uint8_t((~vvvv & 15) << 3 | 4 | prefix), uint8_t(0x40 | (broadcast ? 0x10 : 0) | (vvvv & 16 ? 0 : 8)), opcode,
         uint8_t((near ? 0x40 : 0x80) | (reg & 7) << 3 | (rm.base & 7))});
    near ? put({uint8_t(rm.disp / scale)}) : disp32(rm.disp);
}

void Avx2Assembler::vex(int map, int prefix, int reg, int vvvv, int rm) {
    const uint8_t r = reg & 8 ? 0 : 0x80, tail = uint8_t((~vvvv & 15) << 3 | 4 | prefix);
    if (map == 1 && !(rm & 8)) {
        put({0xC5, uint8_t(r | tail)});
    } else {
        put({0xC4, uint8_t(r | 0x40 | (rm & 8 ? 0 : 0x20) | map), tail});
    }
}

void Avx2Assembler::reg(uint8_t opcode, int map, int prefix, int reg, int vvvv, int rm) {
    vex(map, prefix, reg, vvvv, rm);
    put({opcode, uint8_t(0xC0 | (reg & 7) << 3 | (rm & 7))});
}

void Avx2Assembler::mem(uint8_t opcode, int map, int prefix, int reg, int vvvv, Mem rm) {
    vex(map, prefix, reg, vvvv, rm.base);
    const bool near = rm.disp >= -128 && rm.disp <= 127;
    put({opcode, uint8_t((near ? 0x40 : 0x80) | (reg & 7) << 3 | (rm.base & 7))});
    near ? put({uint8_t(rm.disp)}) : disp32(rm.disp);
}

}  // namespace vspdf
