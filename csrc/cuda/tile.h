// The launch functions of tile.cu, for float and double. Pointers are to memory of the current device; the work is
// queued on the stream, and nothing waits for it.
#pragma once

#include <cuda_runtime.h>

#include "../tile_args.h"

namespace mopo {

template <class T>
cudaError_t launch_lse_fwd(const LseFwdArgs<T>& args, int64_t rows, cudaStream_t stream);

template <class T>
cudaError_t launch_logits_bwd(const LogitsBwdArgs<T>& args, int64_t rows, cudaStream_t stream);

}  // namespace mopo
