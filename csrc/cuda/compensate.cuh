// Sums over a token's selected channels of x[c] * code[c], for a slab of outputs: one block of threads.
//
//   codes   (in, row)  a row is cut into units of 16 bytes: 32 outputs at 4 bits
//
//              unit u0   u0+1  ...   u0+count-1
//   channel j   thread 0     1           count-1      next to each other: whole lines travel
//   channel j+1 thread count ...                      a block takes `lanes` channels at a time
//        :
//   each thread: its unit of every lanes-th channel, kInFlight loads on their way before the first is used,
//   the outputs of the unit in registers; at the end the lanes' sums meet in shared memory, in fixed order.
//
// Codes and scales may lie in mapped host memory, where a read takes a microsecond and what counts is bytes on
// their way: hence 16-byte loads, many of them, and the scales asked for before the channels are known.
#pragma once

#include "select.cuh"

namespace decdec::cuda {

constexpr int kInFlight = 4;
constexpr int kListed = 1024;       // channels held in shared memory at a time
constexpr int kOutputsMost = 4096;  // of a slab

template <int kBits>
constexpr int kUnitOutputs = 128 / kBits;

// Units that one block takes at a time: so many that their scales have a place, and each unit a thread.
template <int kBits>
constexpr int kMaxUnits = kOutputsMost / kUnitOutputs<kBits> < kThreads ? kOutputsMost / kUnitOutputs<kBits> : kThreads;

template <int kBits>
struct Shared {
  int channels[kListed];
  float values[kListed];
  float scale[kOutputsMost];
  float sums[kUnitOutputs<kBits>][kThreads + 1];  // one more, so that reading across falls into all banks
};

template <int kBits>
__device__ inline void add_unit(float* sums, const uint4& codes, float value) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kBits == 4) {
      // as in unpack.cuh: a nibble under the exponent of 1024 reads 1024 + code, exactly
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t pair = (words[w] >> (4 * i) & 0x000f000fu) | 0x64006400u;
        const float2 code = __half22float2(__hsub2(reinterpret_cast<__half2&>(pair), __float2half2_rn(1032.f)));
        sums[w * 8 + i] += value * code.x;
        sums[w * 8 + i + 4] += value * code.y;
      }
    } else if constexpr (kBits == 16) {
      const float2 code = __half22float2(reinterpret_cast<const __half2&>(words[w]));
      sums[w * 2] += value * code.x;
      sums[w * 2 + 1] += value * code.y;
    } else {
      constexpr int kPerWord = 32 / kBits;
#pragma unroll
      for (int i = 0; i < kPerWord; ++i) {
        const int code = static_cast<int>(words[w] >> (kBits * i) & ((1u << kBits) - 1)) - code_offset(kBits);
        sums[w * kPerWord + i] += value * static_cast<float>(code);
      }
    }
  }
}

// The channels of the chunks from `chunk` on, as many as have a place, into shared memory; returns their number.
// For listed channels, `chunk` counts runs of kListed.
template <int kBits, typename T>
__device__ inline int next_channels(const T* row, int in_features, const Selection& how, const int32_t* listed,
                                    int* chunk, Shared<kBits>& shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (how.kind == Selection::Kind::listed) {
    const int first = *chunk * kListed, count = min(kListed, how.count - first);
    *chunk += 1;
    for (int j = threadIdx.x; j < count; j += kThreads) {
      const int channel = listed[first + j];
      shared.channels[j] = channel;
      shared.values[j] = to_float(row[channel]);
    }
    return count;
  }
  const int chunks = min((in_features - *chunk * kChunk + kChunk - 1) / kChunk, kListed / how.k_chunk);
  const int begin = *chunk * kChunk, end = min(in_features, begin + chunks * kChunk);
  for (int c = warp; c < chunks; c += kWarps) {
    const int first = begin + c * kChunk, length = min(kChunk, in_features - first);
    select_chunk(row + first, length, how, lane, [&](int position, int channel) {
      shared.channels[c * how.k_chunk + position] = first + channel;
    });
    __syncwarp();
    for (int j = lane; j < chunk_budget(length, how.k_chunk); j += kWarp) {
      shared.values[c * how.k_chunk + j] = to_float(row[shared.channels[c * how.k_chunk + j]]);
    }
  }
  *chunk += chunks;
  return static_cast<int>(row_budget(end - begin, how.k_chunk));
}

__device__ inline bool channels_left(int in_features, const Selection& how, int chunk) {
  return how.kind == Selection::Kind::listed ? chunk * kListed < how.count
                                             : chunk * kChunk < in_features && how.k_chunk > 0;
}

// Calls put(output, sum * scale) for the outputs of units first_unit .. first_unit + count - 1 (at most kMaxUnits)
// of one token, each by one thread.
template <int kBits, typename T, typename Put>
__device__ inline void compensate_slab(const T* row, int in_features, const Selection& how, const int32_t* listed,
                                       const Residual& residual, int out_features,
                                       int first_unit, int count, Shared<kBits>& shared, const Put& put) {
  constexpr int kOutputs = kUnitOutputs<kBits>;
  const int64_t row_bytes = channel_bytes(out_features, kBits);
  const int lanes = kThreads / count, lane = threadIdx.x / count, unit = threadIdx.x % count;
  for (int i = threadIdx.x; i < count * kOutputs / 4; i += kThreads) {
    copy_async(shared_address(shared.scale + 4 * i), residual.scale + first_unit * kOutputs + 4 * i);
  }
  copies_commit();
  wait_for_previous();  // for x; the residual was there before
  const char* codes = static_cast<const char*>(residual.codes) + (first_unit + unit) * int64_t{16};
  for (int chunk = 0; chunk == 0 || channels_left(in_features, how, chunk);) {
    const bool first = chunk == 0;
    const int now = next_channels(row, in_features, how, listed, &chunk, shared);
    __syncthreads();
    float sums[kOutputs] = {};
    for (int j0 = lane; j0 < now && lane < lanes; j0 += kInFlight * lanes) {
      uint4 fetched[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int j = j0 + i * lanes;
        if (j < now) fetched[i] = load_once(codes + shared.channels[j] * row_bytes);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int j = j0 + i * lanes;
        if (j < now) add_unit<kBits>(sums, fetched[i], shared.values[j]);
      }
    }
    // between the channels' turns the sums rest here, so that selection has the registers
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      float& resting = shared.sums[o][threadIdx.x];
      resting = first ? sums[o] : resting + sums[o];
    }
    __syncthreads();
  }
  copies_wait<0>();
  __syncthreads();
#pragma unroll 4
  for (int i = threadIdx.x; i < count * kOutputs; i += kThreads) {
    float sum = 0.f;
#pragma unroll 4
    for (int l = 0; l < lanes; ++l) sum += shared.sums[i % kOutputs][l * count + i / kOutputs];
    put(first_unit * kOutputs + i, sum * shared.scale[i]);
  }
  __syncthreads();
}

}  // namespace decdec::cuda
