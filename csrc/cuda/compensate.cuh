// Sums over a token's selected channels of x[c] * code[c]: what one block of threads does of it.
//
//   codes   (in, row)  a row is cut into units of 16 bytes: 32 outputs at 4 bits
//
//                 units:  |------ column 0 ------|------ column 1 ------| ...
//   channels  chunk 0       block: piece 0          block: piece 0            a piece selects from its own chunks, or
//             chunk 1       block: piece 1          block: piece 1            takes its share of a list
//               :
//   within a block           unit u0   u0+1  ...   u0+count-1
//                channel j   thread 0     1           count-1      next to each other: whole lines travel
//                channel j+1 thread count ...                      a block takes `lanes` channels at a time
//
//   each thread: its unit of every lanes-th channel, kInFlight loads on their way before the first is used,
//   the outputs of the unit in registers; at the end the lanes' sums meet in shared memory, in fixed order. The
//   pieces' sums are for the caller to add up, and the scale to apply.
//
// Codes may lie in mapped host memory, where a read takes a microsecond and what counts is bytes on their way: hence
// 16-byte loads, and many of them.
#pragma once

#include "select.cuh"

namespace decdec::cuda {

constexpr int kInFlight = 4;
constexpr int kListed = 1024;       // channels held in shared memory at a time
// Outputs that a block sums at a time.
template <int kBits>
constexpr int kOutputsMost = kBits == 2 ? 4096 : 8192;

template <int kBits>
constexpr int kUnitOutputs = 128 / kBits;

// Units that one block takes at a time: each has a thread.
template <int kBits>
constexpr int kMaxUnits =
    kOutputsMost<kBits> / kUnitOutputs<kBits> < kThreads ? kOutputsMost<kBits> / kUnitOutputs<kBits> : kThreads;

template <int kBits>
struct Shared {
  Selecting selecting;
  int channels[kListed];
  float values[kListed];
  // a row of outputs for each thread; four more, so that vectors of four in a column fall into all banks
  alignas(16) float sums[kThreads][kUnitOutputs<kBits> + 4];
};

// A share of a token's channels: chunks, or where they are listed, places in the list.
struct Piece {
  int begin, end;
};

DECDEC_HD constexpr int part_of(int whole, int part, int parts) {
  return static_cast<int>(int64_t{whole} * part / parts);
}

__device__ inline Piece piece_of(int in_features, const Selection& how, int piece, int pieces) {
  const int whole = how.kind == Selection::Kind::listed ? how.count : (in_features + kChunk - 1) / kChunk;
  return {part_of(whole, piece, pieces), part_of(whole, piece + 1, pieces)};
}

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

// The piece's next channels, as many as have a place, into shared memory; moves its begin past them and returns their
// number. By a whole block, which has to meet before it reads them.
template <int kBits, typename T>
__device__ inline int next_channels(const T* row, int in_features, const Selection& how, const int32_t* listed,
                                    uint32_t floor, Piece* piece, Shared<kBits>& shared) {
  if (how.kind == Selection::Kind::listed) {
    const int first = piece->begin, count = min(kListed, piece->end - first);
    piece->begin += count;
    for (int j = threadIdx.x; j < count; j += kThreads) {
      const int channel = listed[first + j];
      shared.channels[j] = channel;
      shared.values[j] = to_float(row[channel]);
    }
    return count;
  }
  int count = 0;
  for (int taken = 0; piece->begin < piece->end && taken + how.k_chunk <= kListed; ++piece->begin) {
    const int first = piece->begin * kChunk, length = min(kChunk, in_features - first);
    select_chunk(row + first, length, how, floor, shared.selecting, [&](int position, int channel, T x) {
      shared.channels[count + position] = first + channel;
      shared.values[count + position] = to_float(x);
    });
    count += chunk_budget(length, how.k_chunk);
    taken += how.k_chunk;
  }
  return count;
}

// Adds to the block's sums, or sets them, what `now` channels give to units first .. first + count - 1.
template <int kBits>
__device__ inline void add_channels(const Residual& residual, int64_t row_bytes, int first, int count, int now,
                                    bool set, Shared<kBits>& shared) {
  constexpr int kOutputs = kUnitOutputs<kBits>;
  const int lanes = kThreads / count, lane = threadIdx.x / count, unit = threadIdx.x % count;
  const char* const codes = static_cast<const char*>(residual.codes) + (first + unit) * int64_t{16};
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
  // between turns the sums rest here, so that selection has the registers
  float4* const resting = reinterpret_cast<float4*>(shared.sums[threadIdx.x]);
#pragma unroll
  for (int o = 0; o < kOutputs; o += 4) {
    const float4 before = set ? float4{} : resting[o / 4];
    resting[o / 4] = {before.x + sums[o], before.y + sums[o + 1], before.z + sums[o + 2], before.w + sums[o + 3]};
  }
}

// Calls put(output, sums) for the outputs of units begin .. end - 1 of one token, four at a time, each by one thread,
// with what the channels of `piece` give. By a whole block, once x is there. `floor` is floor_of_lane.
template <int kBits, typename T, typename Put>
__device__ inline void compensate_piece(const T* row, int in_features, const Selection& how, const int32_t* listed,
                                        uint32_t floor, Piece piece, const Residual& residual, int out_features,
                                        int begin, int end, Shared<kBits>& shared, const Put& put) {
  constexpr int kOutputs = kUnitOutputs<kBits>;
  const int64_t row_bytes = channel_bytes(out_features, kBits);
  const int runs = (end - begin + kMaxUnits<kBits> - 1) / kMaxUnits<kBits>;
  int now = 0;
  bool all_there = false;  // the piece's channels, of which one list holds all
  for (int run = 0; run < runs; ++run) {
    const int first = begin + part_of(end - begin, run, runs);
    const int count = begin + part_of(end - begin, run + 1, runs) - first;
    Piece left = piece;
    bool set = true;
    do {
      if (!all_there) {
        now = next_channels(row, in_features, how, listed, floor, &left, shared);
        all_there = set && left.begin == left.end;
        __syncthreads();
      }
      add_channels<kBits>(residual, row_bytes, first, count, now, set, shared);
      __syncthreads();
      set = false;
    } while (!all_there && left.begin < left.end);
    constexpr int kFours = kOutputs / 4;
    const int lanes = kThreads / count;
    for (int i = threadIdx.x; i < count * kFours; i += kThreads) {
      float4 sum{};
#pragma unroll 4
      for (int l = 0; l < lanes; ++l) {
        const float4 v = *reinterpret_cast<const float4*>(&shared.sums[l * count + i / kFours][i % kFours * 4]);
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      put(first * kOutputs + 4 * i, sum);
    }
    __syncthreads();
  }
}

}  // namespace decdec::cuda
