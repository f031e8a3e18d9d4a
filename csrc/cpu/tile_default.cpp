// Any processor: 16-byte vectors (SSE2, NEON, or whatever the compiler makes of them).
#define MOPO_VECTOR_BYTES 16
#define MOPO_KERNELS kernels_default
#include "tile_kernels.h"
