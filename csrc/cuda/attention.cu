// One token's attention to itself and the tokens before it: softmax(scaling q keysᵀ) values, grouped queries.
//
// query (heads, d), keys and values (key_heads, capacity, d), out (heads, d); d a multiple of 8, at most 256.
//
// Grid: splits x groups of query heads that share keys. A split is a run of the tokens.
//
//   a lane has 8 of a token's d values      lanes: |------ token 0 ------|------ token 1 ------| ...
//   a row of lanes has a token at a time,   each row keeps a maximum, a sum and an output of its own, per head
//   rows -> shuffles, shared memory -> the block's share -> workspace -> the group's last block -> out
//
// The keys and values of the tokens before are there long since: the first of them are read before this launch waits
// for the one before it, whose query, key and value are then all that is new. The last block waits for blocks of lower
// indices only, which start no later.
#include <algorithm>

#include "launch.h"

namespace decdec::cuda {
namespace {

constexpr int kLane = 8;          // values of a lane: 16 bytes
constexpr int kAhead = 2;         // tokens of a row that are under way together
constexpr int kMostSplits = 16;
constexpr int kMostHeads = 8;     // of a block
constexpr int kPad = 4;           // words behind a head's output in a share: its maximum, its sum
constexpr float kLeast = -1e30f;  // a maximum of nothing, finite so that differences of two are

struct Attention {
  const void* query;
  const void* keys;
  const void* values;
  const int64_t* position;
  void* out;
  float* shares;  // (groups, splits, heads of a block, d + kPad)
  int heads, key_heads, capacity, d;
  int groups_each;  // of a key head
  float scaling;    // times log2(e)
};

template <typename T>
__device__ void unpack(const uint4& packed, float (&v)[kLane]) {
  const T* const scalars = reinterpret_cast<const T*>(&packed);
#pragma unroll
  for (int i = 0; i < kLane; ++i) v[i] = to_float(scalars[i]);
}

// What a row has seen of its tokens, for each head: scores' maximum, sum of weights, weighted values of the lane.
template <int kHeads>
struct Seen {
  float most[kHeads], sum[kHeads], out[kHeads][kLane];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      most[h] = kLeast;
      sum[h] = 0.f;
#pragma unroll
      for (int i = 0; i < kLane; ++i) out[h][i] = 0.f;
    }
  }

  __device__ void add(int h, float score, const float (&value)[kLane]) {
    const float now = fmaxf(most[h], score), before = exp2f(most[h] - now), weight = exp2f(score - now);
    most[h] = now;
    sum[h] = sum[h] * before + weight;
#pragma unroll
    for (int i = 0; i < kLane; ++i) out[h][i] = out[h][i] * before + weight * value[i];
  }

  // Adds what the lane `offset` away has seen.
  __device__ void merge_across(int offset) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float other = __shfl_xor_sync(kAll, most[h], offset), now = fmaxf(most[h], other);
      const float mine = exp2f(most[h] - now), theirs = exp2f(other - now);
      most[h] = now;
      sum[h] = sum[h] * mine + __shfl_xor_sync(kAll, sum[h], offset) * theirs;
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        out[h][i] = out[h][i] * mine + __shfl_xor_sync(kAll, out[h][i], offset) * theirs;
      }
    }
  }
};

__device__ float4 receive4(float* slots) {
  uint32_t x, y, z, w;
  do {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "l"(slots)
                 : "memory");
  } while (x == kEmpty || y == kEmpty || z == kEmpty || w == kEmpty);
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(slots), "r"(kEmpty) : "memory");
  return {__uint_as_float(x), __uint_as_float(y), __uint_as_float(z), __uint_as_float(w)};
}

__device__ float4 operator*(float4 v, float factor) { return {v.x * factor, v.y * factor, v.z * factor, v.w * factor}; }

__device__ float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// The outputs of `heads` heads from the shares of all splits, `stride` apart. scratch: kThreads float4.
template <typename T>
__device__ void finish(float* shares, int64_t stride, int splits, int heads, int d, T* out, float4* scratch) {
  __shared__ float most[kMostSplits][kMostHeads], sum[kMostSplits][kMostHeads];
  const int of_head = d / 4, columns = heads * of_head, together = kThreads / columns;
  const int column = threadIdx.x % columns, first = threadIdx.x / columns, head = column / of_head;
  const int64_t place = int64_t{head} * (d + kPad) + column % of_head * 4;
  if (threadIdx.x < splits * heads) {
    const int h = threadIdx.x % heads, split = threadIdx.x / heads;
    float* const words = shares + split * stride + int64_t{h} * (d + kPad) + d;
    most[split][h] = receive(words);
    sum[split][h] = receive(words + 1);
  }
  __syncthreads();
  float all = kLeast, total = 0.f;
  for (int split = 0; split < splits; ++split) all = fmaxf(all, most[split][head]);
  for (int split = 0; split < splits; ++split) total += sum[split][head] * exp2f(most[split][head] - all);
  float4 mine{};
  if (first < together) {
    for (int split = first; split < splits; split += together) {
      mine = mine + receive4(shares + split * stride + place) * exp2f(most[split][head] - all);
    }
  }
  scratch[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x >= columns) return;
  for (int part = 1; part < together; ++part) mine = mine + scratch[part * columns + column];
  mine = mine * (1.f / total);
  T* const four = out + int64_t{column} * 4;
  four[0] = from_float<T>(mine.x);
  four[1] = from_float<T>(mine.y);
  four[2] = from_float<T>(mine.z);
  four[3] = from_float<T>(mine.w);
}

template <typename T, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads) attention_kernel(const Attention work) {
  constexpr int kRows = kThreads / kLanes, kTogether = kRows * kAhead;
  constexpr int kWidth = kLanes * kLane;  // d, rounded up
  constexpr int kOuts = kWarps * kHeads * kWidth, kScratch = 4 * kThreads;
  __shared__ float4 shared[(kOuts > kScratch ? kOuts : kScratch) / 4];
  auto& outs = reinterpret_cast<float(&)[kWarps][kHeads][kWidth]>(shared);
  __shared__ float mosts[kWarps][kHeads], sums[kWarps][kHeads];

  const int split = blockIdx.x, splits = gridDim.x, group = blockIdx.y;
  const int key_head = group / work.groups_each, d = work.d;
  const int sharing = work.heads / work.key_heads;  // query heads of a key head
  const int first_head = key_head * sharing + group % work.groups_each * kHeads;
  const int heads = min(kHeads, (key_head + 1) * sharing - first_head);
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, warp = threadIdx.x / kWarp;
  const bool inside = lane * kLane < d;

  const int newest = static_cast<int>(min(*work.position, int64_t{work.capacity} - 1)), tokens = newest + 1;
  const int each = (tokens + splits - 1) / splits;
  const int begin = min(split * each, tokens), end = min(begin + each, tokens);
  const int64_t start = int64_t{key_head} * work.capacity * d + lane * kLane;
  const T* const keys = static_cast<const T*>(work.keys) + start;
  const T* const values = static_cast<const T*>(work.values) + start;

  uint4 key[kAhead] = {}, value[kAhead] = {};
  const auto load = [&](int from, int low, int high) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = from + row + i * kRows;
      if (!inside || token < low || token >= high) continue;
      key[i] = *reinterpret_cast<const uint4*>(keys + int64_t{token} * d);
      value[i] = *reinterpret_cast<const uint4*>(values + int64_t{token} * d);
    }
  };
  load(begin, begin, min(end, newest));
  wait_for_previous();
  load(begin, newest, end);

  float query[kHeads][kLane];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    uint4 packed{};
    if (inside && h < heads) {
      const T* const of_head = static_cast<const T*>(work.query) + int64_t{first_head + h} * d;
      packed = *reinterpret_cast<const uint4*>(of_head + lane * kLane);
    }
    unpack<T>(packed, query[h]);
#pragma unroll
    for (int i = 0; i < kLane; ++i) query[h][i] *= work.scaling;
  }

  Seen<kHeads> seen;
  seen.clear();
  for (int from = begin; from < end; from += kTogether) {
    if (from > begin) load(from, from, end);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float k[kLane], v[kLane];
      unpack<T>(key[i], k);
      unpack<T>(value[i], v);
      const bool there = from + row + i * kRows < end;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0.f;
#pragma unroll
        for (int j = 0; j < kLane; ++j) score += query[h][j] * k[j];
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(kAll, score, offset);
        if (there) seen.add(h, score, v);
      }
    }
  }
#pragma unroll
  for (int offset = kLanes; offset < kWarp; offset *= 2) seen.merge_across(offset);
  if (threadIdx.x % kWarp < kLanes) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      mosts[warp][h] = seen.most[h];
      sums[warp][h] = seen.sum[h];
#pragma unroll
      for (int i = 0; i < kLane; ++i) outs[warp][h][lane * kLane + i] = seen.out[h][i];
    }
  }
  __syncthreads();

  // the block's share of each head
  const int64_t share_of_head = d + kPad, stride = kHeads * share_of_head;
  float* const shares = work.shares + int64_t{group} * splits * stride;
  T* const out = static_cast<T*>(work.out) + int64_t{first_head} * d;
  for (int i = threadIdx.x; i < heads * d; i += kThreads) {
    const int h = i / d, at = i % d;
    float most = kLeast, sum = 0.f, v = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, mosts[w][h]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(mosts[w][h] - most);
      sum += sums[w][h] * weight;
      v += outs[w][h][at] * weight;
    }
    if (splits == 1) {
      out[i] = from_float<T>(v / sum);
      continue;
    }
    float* const share = shares + split * stride + h * share_of_head;
    send(share + at, v);
    if (at == 0) {
      send(share + d, most);
      send(share + d + 1, sum);
    }
  }
  if (split + 1 < splits || splits == 1) return;
  __syncthreads();
  finish(shares, stride, splits, heads, d, out, shared);
}

// Calls work(kernel, heads of a block) with the kernel for `d` values and `sharing` heads that share keys.
template <typename T, int kLanes, typename Work>
cudaError_t with_heads(int sharing, const Work& work) {
  if (sharing == 1) return work(attention_kernel<T, kLanes, 1>, 1);
  if constexpr (kLanes < kWarp) {  // of wider heads shared memory has room for four only
    if (sharing > 4) return work(attention_kernel<T, kLanes, kMostHeads>, kMostHeads);
  }
  return work(attention_kernel<T, kLanes, 4>, 4);
}

template <typename T, typename Work>
cudaError_t with_lanes(int d, int sharing, const Work& work) {
  if (d <= 64) return with_heads<T, 8>(sharing, work);
  if (d <= 128) return with_heads<T, 16>(sharing, work);
  return with_heads<T, 32>(sharing, work);
}

template <typename Work>
cudaError_t with_attention(const DecodeAttention& a, const Work& work) {
  const int sharing = a.heads / a.key_heads;
  if (a.scalar == Scalar::float16) return with_lanes<__half>(a.d, sharing, work);
  if (a.scalar == Scalar::bfloat16) return with_lanes<__nv_bfloat16>(a.d, sharing, work);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t plan(const DecodeAttention& a, AttentionPlan* result) {
  return with_attention(a, [&](auto kernel, int of_block) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    }
    if (error == cudaSuccess) error = can_overlap(kernel, device, &result->overlap);
    if (error != cudaSuccess) return error;
    result->groups_each = divide_up(a.heads / a.key_heads, of_block);
    result->groups = a.key_heads * result->groups_each;
    result->splits = std::clamp(processors / result->groups, 1, std::min(kMostSplits, a.capacity));
    result->slots = int64_t{result->groups} * result->splits * of_block * (a.d + kPad);
    return cudaSuccess;
  });
}

cudaError_t decode_attention(const DecodeAttention& a, const AttentionPlan& plan, void* out, float* workspace,
                             cudaStream_t stream) {
  constexpr float kLog2e = 1.4426950408889634f;
  const Attention work{a.query,   a.keys,     a.values, a.position, out, workspace, a.heads, a.key_heads,
                       a.capacity, a.d, plan.groups_each, a.scaling * kLog2e};
  return with_attention(a, [&](auto kernel, int) {
    return launch(kernel, dim3(plan.splits, plan.groups), 0, plan.overlap, stream, work);
  });
}

}  // namespace decdec::cuda
