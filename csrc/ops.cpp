// The operators' schemas, the same for every device; each device's file implements them with TORCH_LIBRARY_IMPL.
// Meaning of the arguments: TileBackend in mopo_kernels/backends/base.py; of the last two, backends/cpp.py.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(mopo_tile, m) {
  m.def(
      "lse_fwd(Tensor tile, Tensor? bias, Tensor target, int start, float? softcap, float logit_scale, float "
      "temperature, "
      "Tensor(a!) row_max, Tensor(b!) sum_exp, Tensor(c!) target_logit) -> ()");
  m.def(
      "logits_bwd_(Tensor(a!) tile, Tensor? bias, Tensor target, int start, float? softcap, float logit_scale, "
      "float temperature, Tensor logsumexp, Tensor? grad_logprob) -> ()");
  m.def(
      "mark_columns_(Tensor(a!) marked, Tensor tile, Tensor? bias, Tensor target, int start, float? softcap, "
      "float logit_scale, float temperature, Tensor least) -> ()");
  m.def("has_native_products(ScalarType dtype) -> bool");
  m.def("product_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate, int? scratch_bytes=None) -> ()");
}

// Importing mopo_kernels._C loads this library, and with it the registrations; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
