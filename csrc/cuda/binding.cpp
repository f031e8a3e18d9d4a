// The CUDA implementation of the operators in ops.cpp: device, stream and launch check.
#include <Python.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../tile_call.h"
#include "tile.h"

namespace {

struct Cuda {
  static constexpr at::DeviceType type = at::kCUDA;

  template <class T>
  static void lse_fwd(const at::Tensor& tile, const mopo::LseFwdArgs<T>& args) {
    const c10::DeviceGuard guard(tile.device());
    C10_CUDA_CHECK(mopo::launch_lse_fwd(args, tile.size(0), c10::cuda::getCurrentCUDAStream()));
  }

  template <class T>
  static void logits_bwd(const at::Tensor& tile, const mopo::LogitsBwdArgs<T>& args) {
    const c10::DeviceGuard guard(tile.device());
    C10_CUDA_CHECK(mopo::launch_logits_bwd(args, tile.size(0), c10::cuda::getCurrentCUDAStream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mopo_tile, CUDA, m) {
  m.impl("lse_fwd", mopo::lse_fwd<Cuda>);
  m.impl("logits_bwd_", mopo::logits_bwd_<Cuda>);
}

// Importing mopo_kernels._cuda loads this library, and with it the registrations; the module itself is empty.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
