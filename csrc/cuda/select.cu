// Selection by itself: a block of threads for a token, a warp for a chunk (select.cuh).
#include "select.cuh"

namespace decdec::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) select_kernel(const T* x, int in_features, const Selection how,
                                                          int32_t* indices, int64_t budget) {
  __shared__ uint32_t partial[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const T* const row = x + int64_t{blockIdx.x} * in_features;
  uint32_t print = 0;
  if (how.kind == Selection::Kind::random) print = fingerprint(row, in_features, how.seed, partial);
  for (int chunk = warp; chunk * kChunk < in_features; chunk += kWarps) {
    const int first = chunk * kChunk;
    int32_t* const out = indices + blockIdx.x * budget + int64_t{chunk} * how.k_chunk;
    const auto put = [&](int position, int channel) { out[position] = first + channel; };
    if (how.kind == Selection::Kind::random) {
      draw_chunk(first, min(kChunk, in_features - first), how.k_chunk, print, lane, put);
    } else {
      select_chunk(row + first, min(kChunk, in_features - first), how, lane, put);
    }
  }
}

}  // namespace

cudaError_t select(const Activations& x, const Selection& selection, int32_t* indices, cudaStream_t stream) {
  return with_scalar(x.scalar, [&](auto scalar) {
    using T = decltype(scalar);
    select_kernel<T><<<x.tokens, kThreads, 0, stream>>>(static_cast<const T*>(x.data), x.in_features, selection,
                                                        indices, row_budget(x.in_features, selection.k_chunk));
    return cudaGetLastError();
  });
}

}  // namespace decdec::cuda
