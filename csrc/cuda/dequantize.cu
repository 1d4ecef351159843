// The weight's tiles (product.cuh) -> a dense matrix: a warp for a tile, 32 consecutive inputs of four outputs
// for a lane.
#include "product.cuh"

namespace decdec::cuda {
namespace {

template <typename T>
__device__ inline void store_pair(T* to, float2 v) {
  to[0] = from_float<T>(v.x);
  to[1] = from_float<T>(v.y);
}

template <typename T>
__device__ inline float2 to_pair(uint32_t bits);
template <>
__device__ inline float2 to_pair<__half>(uint32_t bits) {
  return __half22float2(reinterpret_cast<const __half2&>(bits));
}
template <>
__device__ inline float2 to_pair<__nv_bfloat16>(uint32_t bits) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
}

// T: of a codebook's table. uniform codes are exact in either.
template <typename T, typename Out, Format kFormat, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const Weight weight, int in_features, int depth,
                                                              int tiles, Out* dense) {
  constexpr int kTile = kTileBytes<kFormat, kBits>;
  const int tile = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (tile >= tiles) return;
  const int slab = tile / depth, input = tile % depth * kDepth + lane % 4 * 32;
  if (input >= in_features) return;
  const char* const from = static_cast<const char*>(weight.tiles) + int64_t{tile} * kTile;
  uint32_t words[4 * kBits];
#pragma unroll
  for (int v = 0; v < kBits; ++v) {
    const uint4 w = load_once(from + (v * kWarp + lane) * 16);
    words[4 * v] = w.x, words[4 * v + 1] = w.y, words[4 * v + 2] = w.z, words[4 * v + 3] = w.w;
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int output = slab * kSlab + r * 8 + lane / 4;
    if (output >= weight.out_features) continue;
    Out* const to = dense + int64_t{output} * in_features + input;
    uint32_t pairs[kRegisters];
    constexpr int kWords = kTableWords<kBits>;
    uint32_t table[kWords];
    float scale = 1.f, zero = 0.f;
    if constexpr (kFormat == Format::uniform) {
      const float2 packed = __half22float2(
          reinterpret_cast<const __half2*>(from + kBits * kWarp * 16)[lane / 4 * 4 + r]);
      scale = packed.x, zero = packed.y;
    } else {
      const uint32_t* tables = static_cast<const uint32_t*>(weight.table) + ((slab * 8 + lane / 4) * 4 + r) * kWords;
#pragma unroll
      for (int i = 0; i < kWords; ++i) table[i] = tables[i];
    }
    const Row<T, kFormat, kBits> row(words + r * kBits, table);
    for_steps([&](auto step) {
      constexpr int s = decltype(step)::value;
      uint32_t two[2];
      row.template unpack<s>(two);
      pairs[2 * s] = two[0], pairs[2 * s + 1] = two[1];
    });
    alignas(16) Out values[32];
#pragma unroll
    for (int q = 0; q < kRegisters; ++q) {
      const float2 raw = to_pair<T>(pairs[q]);
      const float above = kFormat == Format::uniform ? to_pair<T>(offset<T, kBits>(q)).x + zero : 0.f;
      store_pair(values + 2 * q, {scale * (raw.x - above), scale * (raw.y - above)});
    }
#pragma unroll
    for (int i = 0; i < int(sizeof values / 16); ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(values)[i];
    }
  }
}

template <typename T, typename Out>
cudaError_t launch(const Weight& weight, int in_features, Out* dense, cudaStream_t stream) {
  const int depth = (in_features + kDepth - 1) / kDepth;
  const int tiles = (weight.out_features + kSlab - 1) / kSlab * depth;
  const auto start = [&](auto kernel) {
    kernel<<<(tiles + kWarps - 1) / kWarps, kThreads, 0, stream>>>(weight, in_features, depth, tiles, dense);
    return cudaGetLastError();
  };
  const bool uniform = weight.format == Format::uniform;
  switch (weight.bits) {
    case 2: return uniform ? start(dequantize_kernel<T, Out, Format::uniform, 2>)
                           : start(dequantize_kernel<T, Out, Format::codebook, 2>);
    case 3: return uniform ? start(dequantize_kernel<T, Out, Format::uniform, 3>)
                           : start(dequantize_kernel<T, Out, Format::codebook, 3>);
    case 4: return uniform ? start(dequantize_kernel<T, Out, Format::uniform, 4>)
                           : start(dequantize_kernel<T, Out, Format::codebook, 4>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t dequantize(const Weight& weight, int in_features, Scalar scalar, void* dense, cudaStream_t stream) {
  switch (scalar) {
    case Scalar::float32: return launch<__half>(weight, in_features, static_cast<float*>(dense), stream);
    case Scalar::float16: return launch<__half>(weight, in_features, static_cast<__half*>(dense), stream);
    case Scalar::bfloat16:
      return launch<__nv_bfloat16>(weight, in_features, static_cast<__nv_bfloat16*>(dense), stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace decdec::cuda
