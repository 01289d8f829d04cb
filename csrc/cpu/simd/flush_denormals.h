// Small numbers as zero.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {
namespace CPU_CAPABILITY {

// Numbers below 1e-38 (in float64 1e-308) count as zero while this lives, what comes in and what
// goes out: the elementary functions count on it, and on x86 each such number costs 150 cycles.
class FlushDenormals {
#if defined(__SSE2__)
  using Word = uint32_t;
  static constexpr Word kFlush = 0x8040;
  static Word read() { return __builtin_ia32_stmxcsr(); }
  static void write(Word word) { __builtin_ia32_ldmxcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kFlush = 1 << 24;
  static Word read() {
    Word word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { __asm__ volatile("msr fpcr, %0" ::"r"(word) : "memory"); }
#else  // not known: they stay what they are
  using Word = int;
  static constexpr Word kFlush = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif

 public:
  FlushDenormals() : saved_(read()) { write(saved_ | kFlush); }
  ~FlushDenormals() { write(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  const Word saved_;
};

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
