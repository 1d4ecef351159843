// Selection by itself: a block of threads for a token's chunk (select.cuh).
#include "select.cuh"

namespace decdec::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) select_kernel(const T* x, int in_features, const Selection how,
                                                          int32_t* indices, int64_t budget) {
  __shared__ Selecting shared;
  const int64_t token = blockIdx.y;
  const int first = blockIdx.x * kChunk, length = min(kChunk, in_features - first);
  const T* const row = x + token * in_features;
  int32_t* const out = indices + token * budget + int64_t{blockIdx.x} * how.k_chunk;
  if (how.kind == Selection::Kind::random) {
    const uint32_t print = fingerprint(row, in_features, how.seed, shared);
    draw_chunk(first, length, how.k_chunk, print, shared,
               [&](int position, int channel) { out[position] = first + channel; });
  } else {
    select_chunk(row + first, length, how, floor_of_lane<T>(how), shared,
                 [&](int position, int channel, T) { out[position] = first + channel; });
  }
}

}  // namespace

cudaError_t select(const Activations& x, const Selection& selection, int32_t* indices, cudaStream_t stream) {
  const int64_t budget = row_budget(x.in_features, selection.k_chunk);
  return with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int kTokensMost = 65535;  // of a launch
    for (int first = 0; first < x.tokens; first += kTokensMost) {
      const dim3 grid((x.in_features + kChunk - 1) / kChunk, min(x.tokens - first, kTokensMost));
      select_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<const T*>(x.data) + int64_t{first} * x.in_features,
                                                      x.in_features, selection, indices + first * budget, budget);
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}

}  // namespace decdec::cuda
