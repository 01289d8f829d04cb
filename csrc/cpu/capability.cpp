#include "simd/capability.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

#include <cstdlib>
#include <string>

namespace tilewise {
namespace {

constexpr const char* kCapabilities[] = {"DEFAULT", "AVX2", "AVX512"};
constexpr const char* kUnits[] = {"none", "pairs", "vnni", "amx"};

IntegerUnit best_unit() {
#if defined(__x86_64__)
  if (cpu_capability() == Capability::DEFAULT) return IntegerUnit::NONE;
  if (cpu_capability() == Capability::AVX2) return IntegerUnit::PAIRS;
  if (!__builtin_cpu_supports("avx512vnni")) return IntegerUnit::PAIRS;
  // init_amx asks the kernel for the use of the tile registers.
  if (__builtin_cpu_supports("amx-int8") && at::cpu::init_amx()) return IntegerUnit::AMX;
  return IntegerUnit::VNNI;
#else
  return IntegerUnit::NONE;
#endif
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
  static const IntegerUnit chosen = [] {
    IntegerUnit unit = best_unit();
    const char* wanted = std::getenv("TILEWISE_INTEGER_UNIT");
    for (int i = 0; wanted && i < static_cast<int>(unit); ++i) {
      if (std::string(wanted) == kUnits[i]) unit = static_cast<IntegerUnit>(i);
    }
    return unit;
  }();
  return chosen;
}

const char* name_of(Capability capability) { return kCapabilities[static_cast<int>(capability)]; }
const char* name_of(IntegerUnit unit) { return kUnits[static_cast<int>(unit)]; }

}  // namespace tilewise
