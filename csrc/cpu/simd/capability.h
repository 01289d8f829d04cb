// Instruction sets that the vector kernels (csrc/cpu/simd/*.cpp) are compiled for. setup.py
// compiles each of them once per set, in a namespace of the set's name; the choice is made at run
// time.
#pragma once

#include "../../common/inline.h"

#if defined(__x86_64__) || defined(_M_X64)
#define TILEWISE_FOR_EACH_CAPABILITY(F) F(DEFAULT) F(AVX2) F(AVX512)
#else
#define TILEWISE_FOR_EACH_CAPABILITY(F) F(DEFAULT)
#endif

namespace tilewise {

enum class Capability { DEFAULT, AVX2, AVX512 };

// What this process uses: torch's own choice, which ATEN_CPU_CAPABILITY can lower.
Capability cpu_capability();

// What multiplies small integers here: nothing, AVX2 or AVX-512 instructions for pairs of bytes,
// AVX-512 VNNI, or AMX. TILEWISE_INTEGER_UNIT=none, pairs, vnni or amx can lower it.
enum class IntegerUnit { NONE, PAIRS, VNNI, AMX };
IntegerUnit integer_unit();

// Their names, as torch and TILEWISE_INTEGER_UNIT spell them.
const char* name_of(Capability capability);
const char* name_of(IntegerUnit unit);

}  // namespace tilewise

// TILEWISE_DISPATCH(f): the function f of this machine's instruction set; _AS picks an overload.
#define TILEWISE_DISPATCH(function) TILEWISE_DISPATCH_AS(decltype(&DEFAULT::function), function)
#if defined(__x86_64__) || defined(_M_X64)
#define TILEWISE_DISPATCH_AS(type, function)                      \
  (::tilewise::cpu_capability() == ::tilewise::Capability::AVX512 \
       ? static_cast<type>(&AVX512::function)                     \
   : ::tilewise::cpu_capability() == ::tilewise::Capability::AVX2 \
       ? static_cast<type>(&AVX2::function)                       \
       : static_cast<type>(&DEFAULT::function))
#else
#define TILEWISE_DISPATCH_AS(type, function) static_cast<type>(&DEFAULT::function)
#endif
