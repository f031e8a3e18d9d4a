// What a device's torch side hands to its kernels.
#pragma once

#include <cstdint>

#include "mopo_math.h"

namespace mopo {

// A tile (rows, width), column stride 1: logits of the vocabulary entries start .. start + width.
template <class T>
struct TileArgs {
  T* tile;
  int64_t row_stride;
  int64_t width;
  const T* bias;          // (width,) or null
  const int64_t* target;  // (rows,); below 0: not scored
  int64_t start;
  bool capped;
  LogitTransform<T> transform;
};

template <class T>
struct LseFwdArgs : TileArgs<T> {
  T* row_max;  // (rows,), as are the next two
  T* sum_exp;
  T* target_logit;
};

template <class T>
struct LogitsBwdArgs : TileArgs<T> {
  const double* logsumexp;  // (rows,)
  const T* grad_logprob;    // (rows,) or null for 1
};

template <class T>
struct MarkArgs : TileArgs<T> {
  int64_t rows;
  const T* least;  // (rows,)
  bool* marked;    // (width,)
};

}  // namespace mopo
