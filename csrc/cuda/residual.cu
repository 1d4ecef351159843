// The residual's codes -> dense rows, of all channels or of listed ones: a warp for a run of 32 units of kRows rows.
//
//   codes  (in, stride bytes), a row in units of 16 bytes: 32 outputs at 4 bits       dense  (rows, out)
//
//   channel c   | lane 0 | lane 1 | ... | lane 31 |     a unit for each lane: whole lines travel, each byte once
//                    | shared memory
//   row r       |0|1|2| .. |31|0|1| .. |31|0|1| ..      16 bytes of outputs for each lane: whole lines again
//
// Codes may lie in mapped host memory, hence all kRows rows on their way before the first is used. A lane has the
// same outputs in every row and keeps their scales in registers; the warps of a block share a run, and so its scales
// come from the L1 cache.
#include <type_traits>

#include "common.cuh"

namespace decdec::cuda {
namespace {

constexpr int kRows = 4;
constexpr int kRowsOfBlock = kRows * kWarps;

// As many bytes as hold `kBits` bits.
template <int kBits>
using Bits = std::conditional_t<
    kBits == 8, uint8_t,
    std::conditional_t<kBits == 16, uint16_t, std::conditional_t<kBits == 32, uint32_t, uint64_t>>>;

// A code under the exponent of 2^23 reads 2^23 + code, exactly.
template <int kBits>
__device__ inline float decode(uint32_t code) {
  constexpr float kZero = 8388608.f + code_offset(kBits);
  return __uint_as_float(0x4b000000u | (code & ((1u << kBits) - 1))) - kZero;
}

template <typename Out, int kBits>
__global__ void __launch_bounds__(kThreads) dequantize_residual_kernel(const char* codes, int64_t stride,
                                                                       const float* scale, const int32_t* channels,
                                                                       int rows, int out_features, int runs,
                                                                       Out* dense) {
  constexpr int kVector = 16 / sizeof(Out);             // outputs of a store
  constexpr int kStores = 128 / kBits / kVector;        // of a lane and row
  constexpr int kRunOutputs = kWarp * (128 / kBits);
  using Piece = Bits<kVector * kBits>;
  __shared__ uint4 staged[kWarps][kRows][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int run = blockIdx.x % runs, first_row = blockIdx.x / runs * kRowsOfBlock + warp;
  const int unit = run * kWarp + lane;
  if (unit < out_features / (128 / kBits)) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first_row + i * kWarps;
      if (row >= rows) break;
      const int64_t channel = channels == nullptr ? row : channels[row];
      copy_async(shared_address(&staged[warp][i][lane]), codes + channel * stride + unit * int64_t{16});
    }
  }
  copies_commit();

  const int first_output = run * kRunOutputs + lane * kVector;
  float scales[kStores][kVector];
#pragma unroll
  for (int s = 0; s < kStores; ++s) {
    const int output = first_output + s * kWarp * kVector;
    if (output >= out_features) break;
#pragma unroll
    for (int v = 0; v < kVector; v += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(scale + output + v));
      scales[s][v] = four.x, scales[s][v + 1] = four.y, scales[s][v + 2] = four.z, scales[s][v + 3] = four.w;
    }
  }
  copies_wait<0>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first_row + i * kWarps;
    if (row >= rows) break;
    const Piece* const pieces = reinterpret_cast<const Piece*>(staged[warp][i]);
    Out* const to = dense + int64_t{row} * out_features;
#pragma unroll
    for (int s = 0; s < kStores; ++s) {
      const int output = first_output + s * kWarp * kVector;
      if (output >= out_features) break;
      const Piece piece = pieces[s * kWarp + lane];
      alignas(16) Out values[kVector];
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const uint32_t code = static_cast<uint32_t>(piece >> (kBits * v));
        values[v] = from_float<Out>(decode<kBits>(code) * scales[s][v]);
      }
      *reinterpret_cast<uint4*>(to + output) = *reinterpret_cast<const uint4*>(values);
    }
  }
}

template <typename Out, int kBits>
cudaError_t launch(const Residual& residual, int64_t stride, const int32_t* channels, int rows, int out_features,
                   Out* dense, cudaStream_t stream) {
  const int units = out_features / (128 / kBits), runs = (units + kWarp - 1) / kWarp;
  const int blocks = runs * ((rows + kRowsOfBlock - 1) / kRowsOfBlock);
  dequantize_residual_kernel<Out, kBits><<<blocks, kThreads, 0, stream>>>(
      static_cast<const char*>(residual.codes), stride, residual.scale, channels, rows, out_features, runs, dense);
  return cudaGetLastError();
}

}  // namespace

cudaError_t dequantize_residual(const Residual& residual, int64_t stride, const int32_t* channels, int rows,
                                int out_features, Scalar scalar, void* dense, cudaStream_t stream) {
  return with_scalar(scalar, [&](auto type) {
    using Out = decltype(type);
    Out* const to = static_cast<Out*>(dense);
    switch (residual.bits) {
      case 2: return launch<Out, 2>(residual, stride, channels, rows, out_features, to, stream);
      case 4: return launch<Out, 4>(residual, stride, channels, rows, out_features, to, stream);
      case 8: return launch<Out, 8>(residual, stride, channels, rows, out_features, to, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace decdec::cuda
