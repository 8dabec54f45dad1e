#include "assembler.hpp"

#include <cerrno>
#include <cstring>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define VSPDF_MMAP 1
#endif

namespace vspdf {

CodeBuffer::CodeBuffer(const std::vector<uint8_t>& code, std::string& why) {
#ifdef VSPDF_MMAP
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t size = (code.size() + page - 1) / page * page;
    if (size == 0) return;
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) {
        why = std::string("no memory for generated code (mmap: ") + std::strerror(errno) + ")";
        return;
    }
#ifdef MADV_HUGEPAGE
    madvise(base, size, MADV_HUGEPAGE);
#endif
    std::memcpy(base, code.data(), code.size());
    if (mprotect(base, size, PROT_READ | PROT_EXEC) != 0) {
        why = std::string("the system refuses generated code (mprotect: ") + std::strerror(errno) + ")";
        munmap(base, size);
        return;
    }
    base_ = static_cast<uint8_t*>(base);
    size_ = size;
#else
    (void)code;
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
    if (base_) munmap(base_, size_);
#endif
}

void Assembler::evex_reg(uint8_t opcode, int map, int prefix, int reg, int vvvv, int rm, int opmask) {
    const uint8_t bytes[6] = {
        0x62,
        uint8_t((reg & 8 ? 0 : 0x80) | (rm & 16 ? 0 : 0x40) | (rm & 8 ? 0 : 0x20) | (reg & 16 ? 0 : 0x10) | map),
        uint8_t((~vvvv & 15) << 3 | 4 | prefix),
        uint8_t(0x40 | (vvvv & 16 ? 0 : 8) | opmask),
        opcode,
        uint8_t(0xC0 | (reg & 7) << 3 | (rm & 7)),
    };
    put(bytes, 6);
}

void Assembler::evex_mem(uint8_t opcode, int map, int prefix, int reg, int vvvv, Mem rm, int scale, bool broadcast,
                         int opmask) {
    const bool near = rm.disp % scale == 0 && rm.disp / scale >= -128 && rm.disp / scale <= 127;
    const uint8_t bytes[6] = {
        0x62,
        uint8_t((reg & 8 ? 0 : 0x80) | 0x40 | (rm.base & 8 ? 0 : 0x20) | (reg & 16 ? 0 : 0x10) | map),
        uint8_t((~vvvv & 15) << 3 | 4 | prefix),
        uint8_t(0x40 | (broadcast ? 0x10 : 0) | (vvvv & 16 ? 0 : 8) | opmask),
        opcode,
        uint8_t((near ? 0x40 : 0x80) | (reg & 7) << 3 | (rm.base & 7)),
    };
    put(bytes, 6);
    if (near) {
        byte(uint8_t(rm.disp / scale));
    } else {
        for (int i = 0; i < 4; ++i) byte(uint8_t(uint32_t(rm.disp) >> 8 * i));
    }
}

void Assembler::add(Reg dst, int32_t value) {
    byte(dst & 8 ? 0x49 : 0x48);
    const bool near = value >= -128 && value <= 127;
    byte(near ? 0x83 : 0x81);
    byte(uint8_t(0xC0 | (dst & 7)));
    for (int i = 0; i < (near ? 1 : 4); ++i) byte(uint8_t(uint32_t(value) >> 8 * i));
}

void Assembler::lea(Reg dst, Mem src) {
    byte(uint8_t(0x48 | (dst & 8 ? 4 : 0) | (src.base & 8 ? 1 : 0)));
    byte(0x8D);
    byte(uint8_t(0x80 | (dst & 7) << 3 | (src.base & 7)));
    for (int i = 0; i < 4; ++i) byte(uint8_t(uint32_t(src.disp) >> 8 * i));
}

void Assembler::vzeroupper() {
    const uint8_t bytes[3] = {0xC5, 0xF8, 0x77};
    put(bytes, 3);
}

void Assembler::jnz(size_t target) {
    const int32_t jump = int32_t(int64_t(target) - int64_t(code.size()) - 6);
    byte(0x0F);
    byte(0x85);
    for (int i = 0; i < 4; ++i) byte(uint8_t(uint32_t(jump) >> 8 * i));
}

void Assembler::align(size_t to) {
    while (code.size() % to) byte(0x90);
}

}  // namespace vspdf
