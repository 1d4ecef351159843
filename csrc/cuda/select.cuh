// Which channels of a chunk are compensated: one warp, one chunk of 1024 channels.
//
//   x[first ..]   |-- lane 0: 32 --|-- lane 1: 32 --| ... |-- lane 31: 32 --|   in registers, halves two to one
//                      | bisect the range of keys; a pass counts the keys that reach a candidate, without a branch,
//                      v and adds up over the warp
//   cut           reach `whole`: taken | reach `part`: the lowest channels of these fill up what is left
//                      | a bit for each key, a prefix sum over the lanes
//                      v
//   indices       ascending, exactly k of them, whatever the input
//
// A key is the bit pattern of |x|, which orders as the values do, with NaN above infinity above every number: the
// same channels as on a CPU (cpu/select.cpp). Nothing computes with x. Random selection draws its keys.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace decdec::cuda {

constexpr int kOfLane = kChunk / kWarp;  // channels

// The keys of a lane's 32 channels, as 32-bit patterns.
struct WideKeys {
  uint32_t keys[kOfLane];

  __device__ int count(uint32_t candidate) const {
    int even = 0, odd = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; i += 2) {
      even += keys[i] >= candidate;
      odd += keys[i + 1] >= candidate;
    }
    return even + odd;
  }

  __device__ uint32_t reach(uint32_t candidate) const {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) mask |= keys[i] >= candidate ? 1u << i : 0u;
    return mask;
  }

  __device__ uint32_t largest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) most = max(most, keys[i]);
    return most;
  }
};

// The keys of a lane's 32 channels, two to a word, with the sign bits set: less a candidate, they tell by that bit
// whether a key reaches it, and neither half borrows from the other.
struct HalfKeys {
  uint32_t pairs[kOfLane / 2];

  __device__ uint32_t reached(int pair, uint32_t candidate) const { return pairs[pair] - candidate * 0x10001u; }

  // Even channels in the lower half, odd ones in the upper.
  __device__ uint32_t reach_by_parity(uint32_t candidate) const {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kOfLane / 2; ++i) mask |= reached(i, candidate) >> (15 - i) & 0x10001u << i;
    return mask;
  }

  __device__ int count(uint32_t candidate) const { return __popc(reach_by_parity(candidate)); }

  __device__ uint32_t reach(uint32_t candidate) const {
    uint32_t mask = reach_by_parity(candidate);
    // one channel after the other
    mask = (mask & 0xff0000ffu) | (mask & 0x00ff0000u) >> 8 | (mask & 0x0000ff00u) << 8;
    mask = (mask & 0xf00ff00fu) | (mask & 0x0f000f00u) >> 4 | (mask & 0x00f000f0u) << 4;
    mask = (mask & 0xc3c3c3c3u) | (mask & 0x30303030u) >> 2 | (mask & 0x0c0c0c0cu) << 2;
    return (mask & 0x99999999u) | (mask & 0x44444444u) >> 1 | (mask & 0x22222222u) << 1;
  }

  __device__ uint32_t largest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kOfLane / 2; ++i) most = max(most, max(pairs[i] & 0x7fff, pairs[i] >> 16 & 0x7fff));
    return most;
  }
};

template <typename T>
using Keys = std::conditional_t<sizeof(T) == 2, HalfKeys, WideKeys>;

// The lane's 32 numbers as 16 or 32 words; zeros behind the end.
template <typename T>
__device__ inline void load_words(const T* chunk, int length, int lane, uint32_t (&words)[8 * sizeof(T)]) {
  constexpr int kPerVector = 16 / sizeof(T);
  const T* const from = chunk + lane * kOfLane;
  const int left = length - lane * kOfLane;
  const bool whole = left >= kOfLane && reinterpret_cast<uintptr_t>(from) % 16 == 0;
#pragma unroll
  for (int v = 0; v < kOfLane / kPerVector; ++v) {
    alignas(16) T values[kPerVector];
    if (whole) {
      *reinterpret_cast<uint4*>(values) = reinterpret_cast<const uint4*>(from)[v];
    } else {
#pragma unroll
      for (int e = 0; e < kPerVector; ++e) {
        const int i = v * kPerVector + e;
        values[e] = from_float<T>(0.f);
        if (i < left) values[e] = from[i];
      }
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) words[4 * v + w] = reinterpret_cast<const uint32_t*>(values)[w];
  }
}

// The smallest pattern of a T that is no less than the number whose float32 pattern is `floor`.
template <typename T>
__device__ inline uint32_t pattern_above(int floor);
template <>
__device__ inline uint32_t pattern_above<float>(int floor) { return floor; }
template <>
__device__ inline uint32_t pattern_above<__half>(int floor) {
  return __half_as_ushort(__float2half_ru(__int_as_float(floor)));
}
template <>
__device__ inline uint32_t pattern_above<__nv_bfloat16>(int floor) {
  return __bfloat16_as_ushort(__float2bfloat16_ru(__int_as_float(floor)));
}

// Keys that reach `whole` are all taken, `taken` of them; keys that reach `part` fill up, lowest channel first.
struct Cut {
  uint32_t whole, part;
  int taken;
};

constexpr uint32_t kNone = 0x80000000u;  // beyond all keys; as a candidate for halves, 0x8000

template <typename K>
__device__ inline int count_in_warp(const K& keys, uint32_t candidate) {
  return __reduce_add_sync(kAll, keys.count(candidate));
}

// At least k keys reach `low`, fewer than k are above `high`.
template <typename K>
__device__ inline Cut cut_topk(const K& keys, int k) {
  uint32_t low = 0, high = __reduce_max_sync(kAll, keys.largest());
  int above_high = 0;
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    const int count = count_in_warp(keys, middle);
    if (count >= k) {
      low = middle;
      if (count == k) return {low, low, k};
    } else {
      high = middle - 1;
      above_high = count;
    }
  }
  return {high + 1, low, above_high};
}

template <typename T, typename K>
__device__ inline Cut cut_buckets(const K& keys, int k, const int* floors, int lane) {
  static_assert(kBuckets == kWarp, "a lane for each floor");
  const uint32_t pattern = pattern_above<T>(floors[lane]);
  int first = 0, last = kBuckets - 1, above_first = 0;
  uint32_t whole = sizeof(T) == 2 ? 0x8000u : kNone;
  while (first < last) {
    const int middle = (first + last) / 2;
    const uint32_t candidate = __shfl_sync(kAll, pattern, middle);
    const int count = count_in_warp(keys, candidate);
    if (count >= k) {
      last = middle;
    } else {
      first = middle + 1;
      above_first = count;
      whole = candidate;
    }
  }
  return {whole, __shfl_sync(kAll, pattern, first), above_first};
}

// Calls put(position, channel) for the k channels that the cut lets through, counted from the chunk's first.
template <typename K, typename Put>
__device__ inline void collect(const K& keys, const Cut& cut, int k, int length, int lane, const Put& put) {
  const int left = length - lane * kOfLane;
  const uint32_t there = left >= kOfLane ? ~0u : left > 0 ? (1u << left) - 1 : 0u;
  const uint32_t whole = keys.reach(cut.whole) & there, part = keys.reach(cut.part) & there & ~whole;
  uint32_t counts = __popc(whole) | __popc(part) << 16, before = counts;
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t other = __shfl_up_sync(kAll, before, d);
    if (lane >= d) before += other;
  }
  before -= counts;
  const int spare = k - cut.taken, filled = min(static_cast<int>(before >> 16), spare);
  uint32_t rest = part;
  for (int i = filled; i < spare && rest != 0; ++i) rest &= rest - 1;
  int position = (before & 0xffff) + filled;
  for (uint32_t taken = whole | (part & ~rest); taken != 0; taken &= taken - 1) {
    put(position++, lane * kOfLane + __ffs(taken) - 1);
  }
}

// Calls put(position, channel) for the k = chunk_budget channels of one chunk, counted from its first.
template <typename T, typename Put>
__device__ inline void select_chunk(const T* chunk, int length, const Selection& how, int lane, const Put& put) {
  const int k = chunk_budget(length, how.k_chunk);
  if (k == 0) return;
  Keys<T> keys;
  uint32_t words[8 * sizeof(T)];
  load_words(chunk, length, lane, words);
#pragma unroll
  for (int i = 0; i < int(8 * sizeof(T)); ++i) {
    if constexpr (sizeof(T) == 2) {
      keys.pairs[i] = words[i] | 0x80008000u;
    } else {
      keys.keys[i] = words[i] & 0x7fffffffu;
    }
  }
  const bool buckets = how.kind == Selection::Kind::buckets;
  collect(keys, buckets ? cut_buckets<T>(keys, k, how.floors, lane) : cut_topk(keys, k), k, length, lane, put);
}

// The same for random selection, by the token's fingerprint; `first` is the chunk's first channel.
template <typename Put>
__device__ inline void draw_chunk(int first, int length, int k_chunk, uint32_t print, int lane, const Put& put) {
  const int k = chunk_budget(length, k_chunk);
  if (k == 0) return;
  WideKeys keys;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int channel = lane * kOfLane + i;
    keys.keys[i] = channel < length ? mix32(mix32(static_cast<uint32_t>(first + channel)) ^ print) >> 1 : 0;
  }
  collect(keys, cut_topk(keys, k), k, length, lane, put);
}

// The share of one chunk in the sum over a token's negative channels that seeds its draw.
template <typename T>
__device__ inline uint32_t sign_sum(const T* chunk, int first, int length, int lane) {
  uint32_t words[8 * sizeof(T)], sum = 0;
  load_words(chunk, length, lane, words);
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const uint32_t sign = sizeof(T) == 2 ? words[i / 2] >> (i % 2 * 16 + 15) & 1 : words[i] >> 31;
    if (sign) sum += mix32(static_cast<uint32_t>(first + lane * kOfLane + i));
  }
  return __reduce_add_sync(kAll, sum);
}

// A token's fingerprint: called by a whole block of threads; `partial` is a word of shared memory per warp.
template <typename T>
__device__ inline uint32_t fingerprint(const T* row, int in_features, uint64_t seed, uint32_t* partial) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint32_t sum = 0;
  for (int first = warp * kChunk; first < in_features; first += kWarps * kChunk) {
    sum += sign_sum(row + first, first, min(kChunk, in_features - first), lane);
  }
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  uint32_t total = mix_seed(seed);
  for (int w = 0; w < kWarps; ++w) total += partial[w];
  __syncthreads();
  return mix32(total);
}

}  // namespace decdec::cuda
