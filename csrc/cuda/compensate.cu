// Compensation by itself: added to y, by blocks of threads for a token's column of outputs (compensate.cuh).
//
//   blocks  | column 0: piece 0, 1, .. | column 1: piece 0, 1, .. | ...     one such row for each token
//
// The last piece of a column receives what the others send, which have lower indices and so start no later.
#include "compensate.cuh"

namespace decdec::cuda {
namespace {

struct Work {
  Activations x;
  Selection selection;
  Residual residual;
  int out_features;
  int columns, pieces;
  float* y;
  float* sums;  // workspace: (tokens, pieces - 1, out_features)
};

template <int kBits>
struct Alone {
  Shared<kBits> shared;
  alignas(16) float scale[kMaxUnits<kBits> * kUnitOutputs<kBits>];  // of a column, which is one run
};

template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) compensate_kernel(const __grid_constant__ Work work) {
  extern __shared__ __align__(16) char memory[];
  Alone<kBits>& alone = *reinterpret_cast<Alone<kBits>*>(memory);
  const int column = blockIdx.x / work.pieces, piece = blockIdx.x % work.pieces, last = work.pieces - 1;
  const int64_t token = blockIdx.y;
  const int units = work.out_features / kUnitOutputs<kBits>;
  const int begin = part_of(units, column, work.columns), end = part_of(units, column + 1, work.columns);
  const int first_output = begin * kUnitOutputs<kBits>;
  const uint32_t floor = floor_of_lane<T>(work.selection);
  if (piece == last) {
    for (int i = 4 * threadIdx.x; i < (end - begin) * kUnitOutputs<kBits>; i += 4 * kThreads) {
      copy_async(shared_address(alone.scale + i), work.residual.scale + first_output + i);
    }
  }
  copies_commit();
  float* const sums = work.sums + token * last * work.out_features;
  float* const y = work.y + token * work.out_features;
  const T* const row = static_cast<const T*>(work.x.data) + token * work.x.in_features;
  const int32_t* const listed = work.selection.indices + token * work.selection.stride;
  const Piece share = piece_of(work.x.in_features, work.selection, piece, work.pieces);
  compensate_piece<kBits>(row, work.x.in_features, work.selection, listed, floor, share, work.residual,
                          work.out_features, begin, end, alone.shared, [&](int output, float4 own) {
    if (piece < last) {
      send(sums + int64_t{piece} * work.out_features + output, own);
      return;
    }
    copies_wait<0>();  // of the four scales that this thread itself has copied: those of the outputs it has here
    const float mine[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float others = receive_sum(sums + output + i, work.out_features, last);
      y[output + i] += (mine[i] + others) * alone.scale[output + i - first_output];
    }
  });
}

template <int kBits>
void divide(const Activations& x, const Selection& how, int out_features, int* columns, int* pieces) {
  // few tokens: columns so narrow that the whole device fetches, and a block for a chunk; many: columns as wide as a
  // block takes, of all chunks
  const int units = out_features / kUnitOutputs<kBits>, most = kMaxUnits<kBits>, least = 16;
  const int64_t wanted = (int64_t{units} * x.tokens + 255) / 256;
  const int each = static_cast<int>(wanted < least ? least : wanted > most ? most : wanted);
  *columns = (units + each - 1) / each;
  const int chunks = (x.in_features + kChunk - 1) / kChunk;
  *pieces = how.kind != Selection::Kind::listed && x.tokens <= kMaxTokens ? chunks : 1;
}

template <typename Call>
cudaError_t with_bits(int bits, const Call& call) {
  switch (bits) {
    case 2: return call(std::integral_constant<int, 2>{});
    case 4: return call(std::integral_constant<int, 4>{});
    case 8: return call(std::integral_constant<int, 8>{});
    case 16: return call(std::integral_constant<int, 16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int64_t compensation_slots(const Activations& x, const Selection& how, int bits, int out_features) {
  int columns = 0, pieces = 1;
  with_bits(bits, [&](auto width) {
    divide<decltype(width)::value>(x, how, out_features, &columns, &pieces);
    return cudaSuccess;
  });
  return int64_t{x.tokens} * (pieces - 1) * out_features;
}

cudaError_t compensate(const Activations& x, const Selection& how, const Residual& residual, int out_features,
                       float* y, float* workspace, cudaStream_t stream) {
  return with_scalar(x.scalar, [&](auto scalar) {
    return with_bits(residual.bits, [&](auto width) {
      constexpr int kBits = decltype(width)::value;
      Work work{x, how, residual, out_features, 0, 0, y, workspace};
      divide<kBits>(x, how, out_features, &work.columns, &work.pieces);
      const dim3 grid(work.columns * work.pieces, x.tokens);
      constexpr int kBytes = sizeof(Alone<kBits>);
      static_assert(kBytes <= 99 * 1024, "what a block gets on compute capability 8.6, 8.9 and 12.0");
      const auto kernel = compensate_kernel<decltype(scalar), kBits>;
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (error != cudaSuccess) return error;
      kernel<<<grid, kThreads, kBytes, stream>>>(work);
      return cudaGetLastError();
    });
  });
}

}  // namespace decdec::cuda
