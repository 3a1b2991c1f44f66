// Which instruction set's kernels run here.
#pragma once

namespace mgrpo {

enum class Isa { Default, Avx2, Avx512 };

// What PyTorch itself chose for this CPU; ATEN_CPU_CAPABILITY=default|avx2|avx512 (read once, at start) overrides it.
Isa isa();
const char* isa_name(Isa isa);

// Whether aten's float32 product is MKL's, on a processor that is not Intel's: there it has AVX2 at most.
bool mkl_is_held_back();
// Whether the processor has AVX-512, whatever PyTorch was told to use.
bool has_avx512();

} // namespace mgrpo

// MGRPO_KERNEL(name, void(int64_t n)) declares mgrpo::<ISA>::name, which <op>_kernel.cpp defines in mgrpo::CPU_CAPABILITY.
// MGRPO_CALL(name)(n) calls the one that fits this CPU.
#ifdef MGRPO_X86
#define MGRPO_KERNEL(name, ...)                             \
  namespace mgrpo::DEFAULT { std::type_identity_t<__VA_ARGS__> name; } \
  namespace mgrpo::AVX2 { std::type_identity_t<__VA_ARGS__> name; }    \
  namespace mgrpo::AVX512 { std::type_identity_t<__VA_ARGS__> name; }
#define MGRPO_CALL(name)                                       \
  (::mgrpo::isa() == ::mgrpo::Isa::Avx512     ? &::mgrpo::AVX512::name \
       : ::mgrpo::isa() == ::mgrpo::Isa::Avx2 ? &::mgrpo::AVX2::name   \
                                              : &::mgrpo::DEFAULT::name)
#else
#define MGRPO_KERNEL(name, ...) \
  namespace mgrpo::DEFAULT { std::type_identity_t<__VA_ARGS__> name; }
#define MGRPO_CALL(name) (&::mgrpo::DEFAULT::name)
#endif
