// Run under the address and undefined behaviour sanitizers: `checks tile` runs the kernels of csrc/cuda on tiles in
// memory of exactly their size. Every other argument is a kernel with one defect, which must not go unnoticed.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../../csrc/cuda/tile.cu"

namespace {

// A block of the heap, freed at the end of the process.
template <class T>
T* filled(int64_t size, T value) {
  T* data = static_cast<T*>(std::malloc(size_t(size) * sizeof(T)));
  for (int64_t i = 0; i < size; ++i) data[i] = value;
  return data;
}

template <class T>
void run_tile(int64_t width, int64_t offset, int64_t gap, bool biased, bool capped) {
  const int64_t rows = 3;
  const int64_t stride = width + gap;
  T* products = filled(offset + (rows - 1) * stride + width, T(0.5)) + offset;
  const auto transform = mopo::LogitTransform<T>::make(5.0, 0.7, 1.3);
  mopo::TileArgs<T> tile = {products, stride, width, nullptr, nullptr, 100, capped, transform};
  if (biased) tile.bias = filled(width, T(0.25));
  int64_t* target = filled<int64_t>(rows, -1);
  target[1] = tile.start;
  target[2] = tile.start + width - 1;
  tile.target = target;
  const T infinity = T(INFINITY);
  const mopo::LseFwdArgs<T> forward = {tile, filled(rows, -infinity), filled(rows, T(0)), filled(rows, T(0))};
  const mopo::LogitsBwdArgs<T> backward = {tile, filled(rows, 3.0), biased ? filled(rows, T(2)) : nullptr};
  if (mopo::launch_lse_fwd(forward, rows, nullptr) != cudaSuccess) std::abort();
  if (mopo::launch_logits_bwd(backward, rows, nullptr) != cudaSuccess) std::abort();
}

template <class T>
void run_tiles() {
  for (const int64_t width : {1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 4095, 4096, 4101}) {
    for (int64_t offset = 0; offset < Vector<T>::lanes; ++offset) {
      for (int64_t gap = 0; gap < 2; ++gap) {
        run_tile<T>(width, offset, gap, offset % 2 == 0, (offset + gap) % 2 == 0);
      }
    }
  }
}

// The defects. Each kernel works on numbers [0, 256) of its argument.

// The last warp's numbers are read before it has surely written them.
void missing_barrier(double* numbers) {
  numbers[threadIdx.x] = threadIdx.x;
  const double sum = numbers[threadIdx.x] + numbers[255 - threadIdx.x];
  __syncthreads();
  numbers[threadIdx.x] = sum;
}

void divergent_barrier(double*) {
  if (threadIdx.x != 7) __syncthreads();
}

void divergent_shuffle(double* numbers) {
  if (threadIdx.x % 32 != 7) numbers[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0, 1);
}

void unwritten_shared(double* numbers) {
  __shared__ double partial[threads];
  if (threadIdx.x != 7) partial[threadIdx.x] = 1.0;
  __syncthreads();
  numbers[threadIdx.x] = partial[255 - threadIdx.x];
}

void overrun(double* numbers) { numbers[threadIdx.x + 1] = 1.0; }

void misaligned(double* numbers) { *reinterpret_cast<Vector<float>*>(reinterpret_cast<float*>(numbers) + 1) = {}; }

// Prints the sum of what the kernel leaves, for either order of threads.
void run_defect(void (*kernel)(double*)) {
  for (const auto order : {emulator::Order::forward, emulator::Order::backward}) {
    emulator::order = order;
    double* numbers = filled(threads, 0.0);
    launch(kernel, 1, 1, numbers, nullptr);
    double sum = 0.0;
    for (int i = 0; i < threads; ++i) sum += numbers[i];
    std::printf("%g\n", sum);
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::string what = arguments[1];
  try {
    if (what == "tile") {
      run_tiles<float>();
      run_tiles<double>();
    }
    if (what == "missing_barrier") run_defect(missing_barrier);
    if (what == "divergent_barrier") run_defect(divergent_barrier);
    if (what == "divergent_shuffle") run_defect(divergent_shuffle);
    if (what == "unwritten_shared") run_defect(unwritten_shared);
    if (what == "overrun") run_defect(overrun);
    if (what == "misaligned") run_defect(misaligned);
  } catch (const std::logic_error& error) {
    std::printf("%s\n", error.what());
  }
}
