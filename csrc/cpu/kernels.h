// The kernels compiled for each instruction set.
#pragma once

#include "../tile_args.h"

namespace mopo {

// Work on rows begin .. end; to mark, on columns begin .. end.
template <class T>
struct TileKernels {
  void (*fold)(const FoldArgs<T>&, int64_t begin, int64_t end);
  void (*gradient)(const GradientArgs<T>&, int64_t begin, int64_t end);
  void (*mark)(const MarkArgs<T>&, int64_t begin, int64_t end);
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
