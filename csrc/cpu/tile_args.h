// What the torch side of the CPU backend hands to the kernels compiled for each instruction set.
#pragma once

#include <cstdint>

#include "../mopo_math.h"

namespace mopo {

// A tile (rows, width), column stride 1: logits of the vocabulary entries start .. start + width.
template <class T>
struct TileArgs {
  T* tile;
  int64_t row_stride;
  int64_t width;
  const T* bias;          // (width,) or null
  const int64_t* target;  // (rows,)
  int64_t start;
  bool capped;
  Head<T> head;
};

template <class T>
struct FoldArgs : TileArgs<T> {
  T* maximum;  // (rows,), as are the next two
  T* total;
  T* picked;
};

template <class T>
struct GradientArgs : TileArgs<T> {
  const double* logsumexp;  // (rows,)
  const T* coefficient;     // (rows,) or null for 1
};

// Work on rows begin .. end.
template <class T>
struct TileKernels {
  void (*fold)(const FoldArgs<T>&, int64_t begin, int64_t end);
  void (*gradient)(const GradientArgs<T>&, int64_t begin, int64_t end);
};

struct Kernels {
  TileKernels<float> f32;
  TileKernels<double> f64;
};

extern const Kernels kernels_default;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace mopo
