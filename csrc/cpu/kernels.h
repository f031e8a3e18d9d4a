// The kernels compiled for each instruction set.
#pragma once

#include "../tile_args.h"

namespace mopo {

// Work on rows begin .. end; to mark, on columns begin .. end.
template <class T>
struct TileKernels {
  void (*lse_fwd)(const LseFwdArgs<T>&, int64_t begin, int64_t end);
  void (*logits_bwd)(const LogitsBwdArgs<T>&, int64_t begin, int64_t end);
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
