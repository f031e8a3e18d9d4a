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
  static void fold(const at::Tensor& tile, const mopo::FoldArgs<T>& args) {
    const c10::DeviceGuard guard(tile.device());
    C10_CUDA_CHECK(mopo::launch_fold(args, tile.size(0), c10::cuda::getCurrentCUDAStream()));
  }

  template <class T>
  static void gradient(const at::Tensor& tile, const mopo::GradientArgs<T>& args) {
    const c10::DeviceGuard guard(tile.device());
    C10_CUDA_CHECK(mopo::launch_gradient(args, tile.size(0), c10::cuda::getCurrentCUDAStream()));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(mopo_tile, CUDA, m) {
  m.impl("fold", mopo::fold<Cuda>);
  m.impl("gradient_", mopo::gradient_<Cuda>);
}

// Importing mopo_kernels._cuda loads this library, and with it the registrations; the module itself is empty.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
