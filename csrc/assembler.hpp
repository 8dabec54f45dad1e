// A tiny x86-64 assembler: only the vector and integer instructions that the generated kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>

#include "scratch.hpp"

namespace vspdf {

// Executable memory. Written while it is read-write, then turned read-execute: never both at once.
class CodeBuffer {
  public:
    CodeBuffer() = default;
    // Copies code into fresh pages and seals them. On refusal `entry()` stays null and `why` says what failed.
    CodeBuffer(const uint8_t* code, size_t bytes, std::string& why);
    CodeBuffer(CodeBuffer&& other) noexcept;
    CodeBuffer& operator=(CodeBuffer&& other) noexcept;
    ~CodeBuffer();

    const uint8_t* entry() const { return base_; }
    size_t nbytes() const { return size_; }  // whole pages

  private:
    uint8_t* base_ = nullptr;
    size_t size_ = 0;
};

// Bytes of pages that code has left, kept for the next that needs as many.
size_t kept_code_nbytes();

// General registers by their number in the encoding. rsp and r12 need another address form and cannot be a base.
enum Reg : int { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 };

struct Mem {
    Reg base;
    int32_t disp = 0;
};

// Appends machine code to a buffer of its own.
class Assembler {
  public:
    const uint8_t* data() const { return code_ ? code_->bytes() : nullptr; }
    size_t size() const { return size_; }
    void reserve(size_t bytes);
    // Appends the first `count` bytes of a word, little-endian; the others are written over by what comes next.
    void put(uint64_t word, int count) {
        if (size_ + sizeof word > capacity_) reserve(2 * capacity_ + 64);
        std::memcpy(code_->bytes() + size_, &word, sizeof word);
        size_ += size_t(count);
    }
    // Where the next `bytes` at most may be written, and eight more; `advance` says up to where they were.
    uint8_t* room(size_t bytes) {
        if (size_ + bytes + sizeof(uint64_t) > capacity_) reserve(2 * capacity_ + bytes + sizeof(uint64_t));
        return code_->bytes() + size_;
    }
    void advance(const uint8_t* to) { size_ = size_t(to - code_->bytes()); }
    // The code so far as one word, where it is no longer.
    uint64_t word() const {
        uint64_t word = 0;
        std::memcpy(&word, data(), size_);
        return word;
    }
    void add(Reg dst, int32_t value);  // add dst, value
    void lea(Reg dst, Mem src);        // dst = src.base + src.disp
    void vzeroupper() { put({0xC5, 0xF8, 0x77}); }
    void ret() { put({0xC3}); }
    void align(size_t to);  // with no-operations

  protected:
    void put(std::initializer_list<uint8_t> bytes) {
        for (uint8_t byte : bytes) put(byte, 1);
    }
    void disp32(int32_t value) { put(uint32_t(value), 4); }

  private:
    std::unique_ptr<Scratch> code_;
    size_t size_ = 0, capacity_ = 0;
};

// Vector operands are zmm register numbers, 0 to 31.
class Avx512Assembler : public Assembler {
  public:
    void load(int dst, Mem src) { mem(0x10, 1, 0, dst, 0, src, 64, false); }            // vmovups
    void store(Mem dst, int src) { mem(0x11, 1, 0, src, 0, dst, 64, false); }           // vmovups
    void zero(int dst);                                                                 // vpxord
    void fma_broadcast(int acc, int a, Mem b) { mem(0xB8, 2, 1, acc, a, b, 4, true); }  // acc += a * one float

  private:
    // EVEX.512, W0: opcode maps 1 = 0F, 2 = 0F38; prefixes 0 = none, 1 = 66. One-byte displacements count `scale`
    // bytes.
    void mem(uint8_t opcode, int map, int prefix, int reg, int vvvv, Mem rm, int scale, bool broadcast);
};

// Vector operands are ymm register numbers, 0 to 15.
class Avx2Assembler : public Assembler {
  public:
    void load(int dst, Mem src) { mem(0x10, 1, 0, dst, 0, src); }       // vmovups
    void store(Mem dst, int src) { mem(0x11, 1, 0, src, 0, dst); }      // vmovups
    void zero(int dst) { reg(0x57, 1, 0, dst, dst, dst); }              // vxorps
    void broadcast(int dst, Mem src) { mem(0x18, 2, 1, dst, 0, src); }  // vbroadcastss
    void fma(int acc, int a, int b) { reg(0xB8, 2, 1, acc, a, b); }     // acc += a * b
    void fma(int acc, int a, Mem b) { mem(0xB8, 2, 1, acc, a, b); }     // acc += a * 8 floats

  private:
    // VEX.256, W0: maps and prefixes as above.
    void vex(int map, int prefix, int reg, int vvvv, int rm);
    void reg(uint8_t opcode, int map, int prefix, int reg, int vvvv, int rm);
    void mem(uint8_t opcode, int map, int prefix, int reg, int vvvv, Mem rm);
};

}  // namespace vspdf
