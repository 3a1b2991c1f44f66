#include "dispatch.h"

#include <ATen/Context.h>
#include <ATen/Version.h>

namespace mgrpo {

Isa isa() {
#ifdef MGRPO_X86
  static const Isa chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Isa::Avx512 : capability == "AVX2" ? Isa::Avx2 : Isa::Default;
  }();
  return chosen;
#else
  return Isa::Default;
#endif
}

const char* isa_name(Isa isa) {
  return isa == Isa::Avx512 ? "AVX512" : isa == Isa::Avx2 ? "AVX2" : "DEFAULT";
}

bool mkl_is_held_back() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return at::hasMKL() && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

} // namespace mgrpo
