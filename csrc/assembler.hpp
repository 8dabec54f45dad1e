// A tiny x86-64 assembler: only the EVEX (AVX-512) and integer instructions that the generated kernels use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vspdf {

// Executable memory. Written while it is read-write, then turned read-execute: never both at once.
class CodeBuffer {
  public:
    CodeBuffer() = default;
    // Copies `code` into fresh pages and seals them. On refusal `entry()` stays null and `why` says what failed.
    CodeBuffer(const std::vector<uint8_t>& code, std::string& why);
    CodeBuffer(CodeBuffer&& other) noexcept;
    CodeBuffer& operator=(CodeBuffer&& other) noexcept;
    ~CodeBuffer();

    const uint8_t* entry() const { return base_; }
    size_t nbytes() const { return size_; }  // whole pages

  private:
    uint8_t* base_ = nullptr;
    size_t size_ = 0;
};

// General registers by their number in the encoding. rsp and r12 need another address form and cannot be a base.
enum Reg : int { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };

struct Mem {
    Reg base;
    int32_t disp = 0;
};

// Appends machine code to `code`. Vector operands are zmm register numbers, 0 to 31.
class Assembler {
  public:
    std::vector<uint8_t> code;

    size_t size() const { return code.size(); }

    void load(int dst, Mem src) { evex_mem(0x10, 1, 0, dst, 0, src, 64); }                   // vmovups
    void store(Mem dst, int src) { evex_mem(0x11, 1, 0, src, 0, dst, 64); }                  // vmovups
    void zero(int dst) { evex_reg(0xEF, 1, 1, dst, dst, dst); }                              // vpxord
    void broadcast(int dst, Mem src) { evex_mem(0x18, 2, 1, dst, 0, src, 4); }               // vbroadcastss
    void fma(int acc, int a, int b) { evex_reg(0xB8, 2, 1, acc, a, b); }                     // acc += a * b
    void fma(int acc, int a, Mem b) { evex_mem(0xB8, 2, 1, acc, a, b, 64); }                 // acc += a * 16 floats
    void fma_broadcast(int acc, int a, Mem b) { evex_mem(0xB8, 2, 1, acc, a, b, 4, true); }  // acc += a * one float
    void add(int dst, int a, int b) { evex_reg(0x58, 1, 0, dst, a, b); }                     // vaddps
    void add(int dst, int a, Mem b) { evex_mem(0x58, 1, 0, dst, a, b, 64); }

    void add(Reg dst, int32_t value);  // add dst, value
    void lea(Reg dst, Mem src);        // dst = src.base + src.disp
    void vzeroupper();
    void ret() { code.push_back(0xC3); }
    // Jumps back to offset `target` while the last integer result is not zero.
    void jnz(size_t target);
    void align(size_t to);  // with no-operations

    // EVEX.512, W0: opcode maps 1 = 0F, 2 = 0F38, 3 = 0F3A; prefixes 0 = none, 1 = 66. `opmask` 1 to 7 masks, 0 does
    // not.
    void evex_reg(uint8_t opcode, int map, int prefix, int reg, int vvvv, int rm, int opmask = 0);
    void evex_mem(uint8_t opcode, int map, int prefix, int reg, int vvvv, Mem rm, int scale, bool broadcast = false,
                  int opmask = 0);
    void byte(uint8_t value) { code.push_back(value); }  // an immediate

  private:
    void put(const uint8_t* bytes, int n) { code.insert(code.end(), bytes, bytes + n); }
};

}  // namespace vspdf
