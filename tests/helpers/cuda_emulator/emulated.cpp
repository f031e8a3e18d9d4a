// The CUDA backend, all of it, as operators mopo_tile_emulated::lse_fwd and ::logits_bwd_ on CPU tensors. They are
// registered for CUDA, as the source says, so that a call has to name that key.
#include <ATen/core/Tensor.h>
#include <Python.h>
#include <torch/library.h>

#define mopo_tile mopo_tile_emulated
#define kCUDA kCPU
#include "../../../csrc/ops.cpp"
#include "../../../csrc/cuda/binding.cpp"
#include "../../../csrc/cuda/tile.cu"

extern "C" __attribute__((visibility("default"))) void set_thread_order(bool backward) {
  emulator::order = backward ? emulator::Order::backward : emulator::Order::forward;
}
