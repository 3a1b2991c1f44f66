// The extension mgrpo_kernels._C: plain kernels in torch.ops.mgrpo_native. The public custom ops are defined in Python, and check options
// and labels there. Every function here checks by itself what memory depends on, with cpu/check.h: dtype, shape, device and offsets.
//
// To add an op:
//   1. below, its schema: m.def("my_op(Tensor x) -> Tensor");
//   2. csrc/cpu/my_op.cpp, compiled once, no special flags: takes tensors, calls the kernel that fits this CPU, registers itself:
//          MGRPO_KERNEL(my_op_kernel, void(const float* x, float* out, int64_t n))       // at namespace mgrpo, in my_op.h
//          Tensor my_op(const Tensor& x) { ...; MGRPO_CALL(my_op_kernel)(x.const_data_ptr<float>(), ...); }
//          TORCH_LIBRARY_IMPL(mgrpo_native, CPU, m) { m.impl("my_op", &my_op); }
//   3. csrc/cpu/my_op_kernel.cpp, compiled once per instruction set: the body, on at::vec and at::parallel_for, all of it inside
//          namespace mgrpo::CPU_CAPABILITY { ... }
//      Nothing outside that namespace but includes: a function that two objects share would be linked only once, and an old CPU would
//      meet instructions it lacks. Shared pieces (loads, exp, sums): csrc/cpu/vec.h.
// Enter all of them in SOURCES of setup.py.
//
// aten calls (at::mm, at::empty) belong in my_op.cpp. Build in place: python setup.py build_ext --inplace

#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include "cpu/dispatch.h"

namespace mgrpo {

std::string build_info() {
  return std::string("compiler " __VERSION__ ", torch " TORCH_VERSION ", flags " MGRPO_FLAGS ", instruction sets " MGRPO_ISAS ", running ") +
      isa_name(isa());
}

TORCH_LIBRARY(mgrpo_native, m) {
  m.def("build_info() -> str", &build_info);

  m.def(
      "token_stats_forward(Tensor logits, Tensor? labels, Tensor? mask, Tensor? temperature_per_row, float temperature, "
      "bool want_logprob, bool want_entropy, bool want_self_certainty) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_stats_backward(Tensor(a!) out, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_self_certainty, Tensor logits, "
      "Tensor? labels, Tensor? mask, Tensor? temperature_per_row, float temperature, Tensor logsumexp, Tensor? entropy) -> ()");

#define TILE "Tensor? bias, Tensor? temperature_per_row, float temperature, float logit_scale, float? softcap, int vocab_start, Tensor? labels"
#define WANTED "bool want_entropy, bool want_self_certainty"
  m.def("tile_state_(Tensor x, " TILE ", Tensor(a!) state, " WANTED ") -> ()");
  m.def(
      "tile_state_top_(Tensor x, " TILE ", Tensor(a!) state, " WANTED ", Tensor(b!) ids, Tensor(c!) logits, Tensor(d!) counts, Tensor(e!) rest, "
      "int first_column, float smallest) -> ()");
  m.def("tile_gradient_(Tensor x, " TILE ", Tensor coefficients, Tensor logsumexp, Tensor(a!) out, " WANTED ") -> ()");
#undef WANTED
#undef TILE
  m.def("kept_logits(Tensor hidden, Tensor weight, Tensor ids) -> Tensor");
  m.def("kept_hidden_gradient(Tensor grad, Tensor weight, Tensor ids) -> Tensor");
  m.def("kept_weight_gradient_(Tensor grad, Tensor hidden, Tensor ids, Tensor(a!) total, bool add) -> Tensor");
  m.def(
      "entry_gradient(Tensor ids, Tensor logits, Tensor counts, Tensor rest, Tensor coefficients, Tensor logsumexp, "
      "Tensor? temperature_per_row, float temperature, float logit_scale, float? softcap, float tolerance) -> (Tensor, Tensor, Tensor)");
  m.def("few_rows(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "attend_(Tensor q, Tensor k, Tensor v, Tensor prompt_keys, Tensor prompt_values, Tensor lengths, Tensor(a!) keys, Tensor(b!) values, "
      "int before, int? window, float scale) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("mm_float32_(Tensor(a!) total, Tensor a, Tensor b, bool add) -> bool"); // False: not on this CPU, and nothing has been done

  m.def("ema_update_(Tensor(a!)[] ema, Tensor[] params, Tensor(b!)[] emit, float decay, int[] keys, int[] spans) -> ()");
  m.def("iqr_filter(Tensor entropy, Tensor offsets, Tensor? mask, float k) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("group_advantages(Tensor rewards, Tensor offsets, Tensor? mask, int baseline, int scale, float eps) -> Tensor");
  m.def(
      "policy_loss(Tensor logprob, Tensor? old, Tensor advantages, Tensor? mask, Tensor offsets, Tensor? ref, Tensor? entropy, "
      "Tensor? behaviour, Tensor? normalizer, Tensor? entropy_normalizer, Tensor? weights, Tensor? rollout_mask, "
      "Dict(str, str) names, Dict(str, float) numbers, Dict(str, bool) flags) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

} // namespace mgrpo

// An import of the module loads the library, whose static initializers register the ops. There is nothing else in it.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
