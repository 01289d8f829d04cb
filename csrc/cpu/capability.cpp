#include "simd/capability.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <cstdlib>
#include <string>

#include "simd/matmul.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace tilewise {
namespace {

constexpr const char* kCapabilities[] = {"DEFAULT", "AVX2", "AVX512"};
constexpr const char* kIntegerUnits[] = {"none", "pairs", "vnni", "amx"};
constexpr const char* kBfloat16Units[] = {"none", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// What the CPU has beyond what torch's name for it says. Read once.
struct Features {
  bool vnni = false, bfloat16 = false, half = false, amx_integers = false, amx_bfloat16 = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned subleaves = a;
    vnni = c >> 11 & 1;
    half = d >> 23 & 1;
    // init_amx asks the operating system for the use of the tile registers.
    if (d >> 24 & 1 && at::cpu::init_amx()) {
      amx_integers = d >> 25 & 1;
      amx_bfloat16 = d >> 22 & 1;
    }
    if (subleaves && __get_cpuid_count(7, 1, &a, &b, &c, &d)) bfloat16 = a >> 5 & 1;
  }
};

const Features& features() {
  static const Features found;
  return found;
}
#endif

IntegerUnit best_integer_unit() {
#if defined(__x86_64__)
  if (cpu_capability() == Capability::DEFAULT) return IntegerUnit::NONE;
  if (cpu_capability() == Capability::AVX2 || !features().vnni) return IntegerUnit::PAIRS;
  return features().amx_integers ? IntegerUnit::AMX : IntegerUnit::VNNI;
#else
  return IntegerUnit::NONE;
#endif
}

Bfloat16Unit best_bfloat16_unit() {
#if defined(__x86_64__)
  if (cpu_capability() != Capability::AVX512 || !features().bfloat16) return Bfloat16Unit::NONE;
  if (features().amx_bfloat16) return Bfloat16Unit::AMX;
  // Intel's cores that have AMX do one vdpbf16ps in two cycles, and float32 at twice the speed:
  // where AMX is kept from them, as in many virtual machines, bfloat16 is better widened.
  if (__builtin_cpu_is("intel") && features().half) return Bfloat16Unit::NONE;
  return Bfloat16Unit::AVX512_BF16;
#else
  return Bfloat16Unit::NONE;
#endif
}

// The unit that an environment variable names, if it is lower than `best`.
template <typename Unit, size_t count>
Unit lowered(Unit best, const char* variable, const char* const (&names)[count]) {
  const char* wanted = std::getenv(variable);
  for (int i = 0; wanted && i < static_cast<int>(best); ++i) {
    if (std::string(wanted) == names[i]) return static_cast<Unit>(i);
  }
  return best;
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? Capability::AVX512
           : name == "AVX2" ? Capability::AVX2
                            : Capability::DEFAULT;
  }();
  return chosen;
}

IntegerUnit integer_unit() {
  static const IntegerUnit chosen =
      lowered(best_integer_unit(), "TILEWISE_INTEGER_UNIT", kIntegerUnits);
  return chosen;
}

Bfloat16Unit bfloat16_unit() {
  static const Bfloat16Unit chosen =
      lowered(best_bfloat16_unit(), "TILEWISE_BFLOAT16_UNIT", kBfloat16Units);
  return chosen;
}

const char* name_of(Capability capability) { return kCapabilities[static_cast<int>(capability)]; }
const char* name_of(IntegerUnit unit) { return kIntegerUnits[static_cast<int>(unit)]; }
const char* name_of(Bfloat16Unit unit) { return kBfloat16Units[static_cast<int>(unit)]; }

}  // namespace tilewise
