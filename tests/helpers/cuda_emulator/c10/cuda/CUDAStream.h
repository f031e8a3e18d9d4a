// Stands in for torch's header of that name: kernels on the CPU need no stream.
#pragma once

#include <cuda_runtime.h>

namespace c10::cuda {

inline cudaStream_t getCurrentCUDAStream() { return nullptr; }

}  // namespace c10::cuda
