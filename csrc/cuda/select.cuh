// Which channels of a chunk are compensated: one block of threads, one chunk of 1024 channels.
//
//   x[first ..]   | thread 0: 4 | thread 1: 4 | ...          keys in registers, and in shared memory for their warp
//                      | a lane for each of 32 candidates: it compares all keys of its warp with its own and counts
//                      v those that reach it; the warps' counts meet in shared memory: one barrier for 32 candidates
//   cut           reach `whole`: taken | reach `part`: the lowest channels of these fill up what is left
//                      | a ballot for each of a thread's keys, the warps' numbers meet again
//                      v
//   indices       ascending, exactly k of them, whatever the input
//
// A key is the bit pattern of |x|, which orders as the values do, with NaN above infinity above every number: the
// same channels as on a CPU (cpu/select.cpp). Nothing computes with x. Random selection draws its keys.
// The candidates are the bucket floors, once; or, for the exact top, a key's digits of five bits, one after the other.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace decdec::cuda {

constexpr int kOfThread = kChunk / kThreads;  // channels
constexpr int kOfWarp = kChunk / kWarps;
constexpr int kDigit = 5;  // bits: 32 candidates

struct Selecting {
  alignas(16) uint32_t keys[kChunk];                       // at 16 bits, half of it
  alignas(8) uint8_t reached[2][1 << kDigit][kWarps];      // by candidate and warp
  alignas(16) uint32_t passed[kWarps];                     // by warp: keys above `whole`, and << 16, above `part`
};

// 16-bit keys as halves of the same order, none of them NaN, so that one instruction compares two.
__device__ inline uint32_t as_half(uint32_t key) {
  const int centred = static_cast<int>(key) - 0x4000;
  return centred < 0 ? 0x8000u | -centred : centred;
}

// Hands a thread's keys to its warp.
template <typename T>
__device__ inline void share_keys(const uint32_t (&keys)[kOfThread], Selecting& shared) {
  __syncwarp();
  if constexpr (sizeof(T) == 2) {
    reinterpret_cast<uint2*>(shared.keys)[threadIdx.x] = {as_half(keys[0]) | as_half(keys[1]) << 16,
                                                          as_half(keys[2]) | as_half(keys[3]) << 16};
  } else {
    reinterpret_cast<uint4*>(shared.keys)[threadIdx.x] = {keys[0], keys[1], keys[2], keys[3]};
  }
  __syncwarp();
}

// The warp's keys that reach the lane's candidate.
template <typename T>
__device__ inline uint32_t count_in_warp(uint32_t candidate, const Selecting& shared) {
  const int warp = threadIdx.x / kWarp;
  if constexpr (sizeof(T) == 2) {
    const uint4* const mine = reinterpret_cast<const uint4*>(shared.keys) + warp * (kOfWarp / 8);
    const uint32_t twice = as_half(candidate) * 0x10001u;
    const __half2 least = reinterpret_cast<const __half2&>(twice);
    __half2 sums[4] = {};  // at most 16 in each
#pragma unroll 4
    for (int v = 0; v < kOfWarp / 8; ++v) {
      const uint4 w = mine[v];
      const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i] = __hadd2(sums[i], __hge2(reinterpret_cast<const __half2&>(pairs[i]), least));
      }
    }
    const float2 total = __half22float2(__hadd2(__hadd2(sums[0], sums[1]), __hadd2(sums[2], sums[3])));
    return static_cast<uint32_t>(total.x + total.y);
  } else {
    const uint4* const mine = reinterpret_cast<const uint4*>(shared.keys) + warp * (kOfWarp / 4);
    uint32_t sum = 0;
#pragma unroll 4
    for (int v = 0; v < kOfWarp / 4; ++v) {
      const uint4 w = mine[v];
      sum += (w.x >= candidate) + (w.y >= candidate) + (w.z >= candidate) + (w.w >= candidate);
    }
    return sum;
  }
}

// The chunk's keys that reach the lane's candidate; `turn` alternates between 0 and 1.
template <typename T>
__device__ inline int count_in_chunk(uint32_t candidate, int turn, Selecting& shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  shared.reached[turn][lane][warp] = static_cast<uint8_t>(count_in_warp<T>(candidate, shared));
  __syncthreads();
  static_assert(kWarps == 8, "two words of bytes");
  const uint2 counts = *reinterpret_cast<const uint2*>(shared.reached[turn][lane]);
  return __dp4a(counts.x, 0x01010101u, __dp4a(counts.y, 0x01010101u, 0u));
}

// Keys that reach `whole` are all taken, `taken` of them; keys that reach `part` fill up, lowest channel first.
struct Cut {
  uint32_t whole, part;
  int taken;
};

// The highest of the lanes' candidates, which ascend, that k keys reach; the lowest is reached by all.
__device__ inline int highest_reached(int count, int k) {
  return 31 - __clz(__ballot_sync(kAll, count >= k) | 1u);
}

// kBits: of a key.
template <typename T, int kBits>
__device__ inline Cut cut_topk(int k, Selecting& shared) {
  const int lane = threadIdx.x % kWarp;
  uint32_t base = 0;  // reached by k keys or more; base + 2**(shift + kDigit) is not
  int above = 0, turn = 0;
  for (int shift = kBits - kDigit;; shift = max(shift - kDigit, 0), turn ^= 1) {
    const int count = count_in_chunk<T>(base + (static_cast<uint32_t>(lane) << shift), turn, shared);
    const int chosen = highest_reached(count, k);
    const int reached = __shfl_sync(kAll, count, chosen), next = __shfl_sync(kAll, count, min(chosen + 1, kWarp - 1));
    if (chosen < kWarp - 1) above = next;
    base += static_cast<uint32_t>(chosen) << shift;
    if (reached == k) return {base, base, k};
    if (shift == 0) return {base + 1, base, above};
  }
}

template <typename T>
__device__ inline Cut cut_buckets(uint32_t floor, int k, Selecting& shared) {
  const int count = count_in_chunk<T>(floor, 0, shared), chosen = highest_reached(count, k);
  const int next = min(chosen + 1, kWarp - 1);
  const uint32_t whole = __shfl_sync(kAll, floor, next), part = __shfl_sync(kAll, floor, chosen);
  const int taken = __shfl_sync(kAll, count, next);
  return chosen < kWarp - 1 ? Cut{whole, part, taken} : Cut{~0u, part, 0};
}

// Calls put(position, i) for those of the thread's channels, the i-th, that the cut lets through.
template <typename Put>
__device__ inline void collect(const uint32_t (&keys)[kOfThread], const Cut& cut, int k, int length,
                               Selecting& shared, const Put& put) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int left = length - static_cast<int>(threadIdx.x) * kOfThread;
  const uint32_t lower = (1u << lane) - 1;
  uint32_t before = 0, all = 0;  // as in `passed`
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const uint32_t whole = __ballot_sync(kAll, i < left && keys[i] >= cut.whole);
    const uint32_t part = __ballot_sync(kAll, i < left && keys[i] >= cut.part) & ~whole;
    before += __popc(whole & lower) | __popc(part & lower) << 16;
    all += __popc(whole) | __popc(part) << 16;
  }
  if (lane == 0) shared.passed[warp] = all;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) before += w < warp ? shared.passed[w] : 0;
  const int spare = k - cut.taken;
  int filled = before >> 16, position = (before & 0xffff) + min(filled, spare);
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    if (i >= left || keys[i] < cut.part) continue;
    if (keys[i] >= cut.whole || filled++ < spare) put(position++, i);
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

// The lane's bucket floor, ascending, as a key: to be had before x is there.
template <typename T>
__device__ inline uint32_t floor_of_lane(const Selection& how) {
  static_assert(kBuckets == kWarp, "a lane for each floor");
  return pattern_above<T>(how.floors[kBuckets - 1 - threadIdx.x % kWarp]);
}

// The thread's channels of a chunk; zeros behind the end.
template <typename T>
__device__ inline void load_values(const T* chunk, int length, T (&values)[kOfThread]) {
  using Vector = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  static_assert(sizeof(Vector) == sizeof values, "one load");
  const T* const from = chunk + threadIdx.x * kOfThread;
  const int left = length - static_cast<int>(threadIdx.x) * kOfThread;
  if (left >= kOfThread && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
    alignas(Vector) T aligned[kOfThread];
    *reinterpret_cast<Vector*>(aligned) = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) values[i] = aligned[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) values[i] = i < left ? from[i] : from_float<T>(0.f);
}

__device__ inline uint32_t pattern(float v) { return __float_as_uint(v); }
__device__ inline uint32_t pattern(__half v) { return __half_as_ushort(v); }
__device__ inline uint32_t pattern(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }

// Calls put(position, channel, x) for the k = chunk_budget channels of one chunk, counted from its first. By a whole
// block of threads; `floor` is floor_of_lane.
template <typename T, typename Put>
__device__ inline void select_chunk(const T* chunk, int length, const Selection& how, uint32_t floor,
                                    Selecting& shared, const Put& put) {
  const int k = chunk_budget(length, how.k_chunk);
  if (k == 0) return;
  constexpr int kBits = 8 * sizeof(T) - 1;
  T values[kOfThread];
  load_values(chunk, length, values);
  uint32_t keys[kOfThread];
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) keys[i] = pattern(values[i]) & ((1u << kBits) - 1);
  share_keys<T>(keys, shared);
  const bool buckets = how.kind == Selection::Kind::buckets;
  const Cut cut = buckets ? cut_buckets<T>(floor, k, shared) : cut_topk<T, kBits>(k, shared);
  collect(keys, cut, k, length, shared, [&](int position, int i) {
    put(position, threadIdx.x * kOfThread + i, values[i]);
  });
}

// The same for random selection, by the token's fingerprint; `first` is the chunk's first channel.
template <typename Put>
__device__ inline void draw_chunk(int first, int length, int k_chunk, uint32_t print, Selecting& shared,
                                  const Put& put) {
  const int k = chunk_budget(length, k_chunk);
  if (k == 0) return;
  uint32_t keys[kOfThread];
#pragma unroll
  for (int i = 0; i < kOfThread; ++i) {
    const int channel = threadIdx.x * kOfThread + i;
    keys[i] = channel < length ? mix32(mix32(static_cast<uint32_t>(first + channel)) ^ print) >> 1 : 0;
  }
  share_keys<uint32_t>(keys, shared);
  collect(keys, cut_topk<uint32_t, 31>(k, shared), k, length, shared, [&](int position, int i) {
    put(position, threadIdx.x * kOfThread + i);
  });
}

// A token's fingerprint, by a whole block of threads: seeds the draw by which of its channels are negative.
template <typename T>
__device__ inline uint32_t fingerprint(const T* row, int in_features, uint64_t seed, Selecting& shared) {
  constexpr int kSign = 8 * sizeof(T) - 1;
  uint32_t sum = 0;
  for (int first = 0; first < in_features; first += kChunk) {
    T values[kOfThread];
    load_values(row + first, min(kChunk, in_features - first), values);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const uint32_t channel = first + threadIdx.x * kOfThread + i;
      if (pattern(values[i]) >> kSign & 1) sum += mix32(channel);
    }
  }
  sum = __reduce_add_sync(kAll, sum);
  if (threadIdx.x % kWarp == 0) shared.passed[threadIdx.x / kWarp] = sum;
  __syncthreads();
  uint32_t total = mix_seed(seed);
  for (int w = 0; w < kWarps; ++w) total += shared.passed[w];
  __syncthreads();
  return mix32(total);
}

}  // namespace decdec::cuda
