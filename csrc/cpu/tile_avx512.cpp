// x86-64 with avx512f,avx512bw,avx512dq,avx512vl,avx2,fma; the pragma rather than a flag, so that nothing included
// before it is affected.
#if defined(__x86_64__)
#include <cstdint>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define MOPO_VECTOR_BYTES 64
#define MOPO_KERNELS kernels_avx512
#include "tile_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
