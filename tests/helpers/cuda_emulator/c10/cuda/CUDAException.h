// Stands in for torch's header of that name.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#define C10_CUDA_CHECK(expression)                               \
  do {                                                           \
    const int error = expression;                                \
    TORCH_CHECK(error == cudaSuccess, "CUDA error: ", error);    \
  } while (0)
