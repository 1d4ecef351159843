// One token's attention to itself and the tokens before it: its queries and key normed and rotated, key and value put
// into the cache, then softmax(scaling q keysᵀ) values, with query heads in groups that share keys.
//
// qkv (heads + 2 key_heads, d), keys and values (key_heads, capacity, d), out (heads, d); d a multiple of 8, at most
// 256.
//
// Grid: splits x groups of query heads that share keys. A split is a run of the tokens.
//
//   a lane has 8 of a token's d values      lanes: |------ token 0 ------|------ token 1 ------| ...
//   a row of lanes has a token at a time,   each row keeps a maximum, a sum and an output of its own, per head
//   rows -> shuffles, shared memory -> the block's share -> workspace -> the group's last block -> out
//
// The keys and values of the tokens before are there long since: the first of them are read before this launch waits
// for the one before it, whose qkv is all that is new. The last block waits for blocks of lower indices only, which
// start no later.
#include <algorithm>

#include "launch.h"

namespace decdec::cuda {
namespace {

constexpr int kAhead = 2;         // tokens of a row that are under way together
constexpr int kMostSplits = 16;
constexpr int kMostHeads = 8;     // of a block
constexpr int kPad = 4;           // words behind a head's output in a share: its maximum, its sum, and what aligns
constexpr float kLeast = -1e30f;  // a maximum of nothing, finite so that differences of two are

struct Attention {
  DecodeAttention of;
  void* out;
  float* shares;    // (groups, splits, heads of a block, d + kPad)
  int groups_each;  // of a key head
  float scaling;    // times log2(e)
};

template <typename T>
__device__ void unpack(const Vector<T>& packed, float (&v)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = to_float(packed.v[i]);
}

template <typename T>
__device__ Vector<T> zeros() {
  Vector<T> none;
#pragma unroll
  for (int i = 0; i < kVector; ++i) none.v[i] = from_float<T>(0.f);
  return none;
}

template <typename T>
__device__ Vector<T>& vector_at(T* first) {
  return *reinterpret_cast<Vector<T>*>(first);
}

template <typename T>
__device__ const Vector<T>& vector_at(const T* first) {
  return *reinterpret_cast<const Vector<T>*>(first);
}

template <typename T>
__device__ void load(const T* first, bool there, float (&v)[kVector]) {
  Vector<T> packed = zeros<T>();
  if (there) packed = vector_at(first);
  unpack(packed, v);
}

// The lane's values of a head, normed if `weight` is not null, and rotated. cosines, sines: of the token's position.
template <typename T, int kLanes>
__device__ __forceinline__ void turned(const DecodeAttention& of, const T* head, const T* weight, const T* cosines,
                                       const T* sines, int lane, float (&v)[kVector]) {
  const int at = lane * kVector, half = of.rotary / 2;
  const bool inside = at < of.d, turns = at < of.rotary;
  const int partner = !turns ? at : at < half ? at + half : at - half;
  float other[kVector], c[kVector], s[kVector];
  load(head + at, inside, v);
  load(head + partner, inside, other);
  load(cosines + at, turns, c);
  load(sines + at, turns, s);
  if (weight != nullptr) {
    float squares = 0.f, mine[kVector], theirs[kVector];
    load(weight + at, inside, mine);
    load(weight + partner, inside, theirs);
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares += v[i] * v[i];
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(kAll, squares, offset);
    const float scale = rsqrtf(squares / of.d + of.eps);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      v[i] = rounded<T>(rounded<T>(v[i] * scale) * mine[i]);
      other[i] = rounded<T>(rounded<T>(other[i] * scale) * theirs[i]);
    }
  }
  if (!turns) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = rounded<T>(v[i] * c[i] + (at < half ? -other[i] : other[i]) * s[i]);
}

// What a row has seen of its tokens, for each head: scores' maximum, sum of weights, weighted values of the lane.
template <int kHeads>
struct Seen {
  float most[kHeads], sum[kHeads], out[kHeads][kVector];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      most[h] = kLeast;
      sum[h] = 0.f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[h][i] = 0.f;
    }
  }

  __device__ void add(int h, float score, const float (&value)[kVector]) {
    const float now = fmaxf(most[h], score), before = exp2f(most[h] - now), weight = exp2f(score - now);
    most[h] = now;
    sum[h] = sum[h] * before + weight;
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[h][i] = out[h][i] * before + weight * value[i];
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
      for (int i = 0; i < kVector; ++i) {
        out[h][i] = out[h][i] * mine + __shfl_xor_sync(kAll, out[h][i], offset) * theirs;
      }
    }
  }
};

__device__ float4 operator*(float4 v, float factor) { return {v.x * factor, v.y * factor, v.z * factor, v.w * factor}; }

__device__ float4 operator+(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// The outputs of `heads` heads from the shares of all splits, `stride` apart. scratch: kThreads float4.
template <typename T>
__device__ void finish(float* shares, int64_t stride, int splits, int heads, int d, T* out, float4* scratch) {
  __shared__ float most[kMostSplits][kMostHeads], sum[kMostSplits][kMostHeads];
  const int of_head = d / 4, columns = heads * of_head, together = kThreads / columns;
  const int column = threadIdx.x % columns, first = threadIdx.x / columns, head = column / of_head;
  const int64_t place = int64_t{head} * (d + kPad) + column % of_head * 4;
  float4 values[kMostSplits];
  if (first < together) {
    receive4(shares + first * stride + place, together * stride, (splits - first + together - 1) / together, values);
  }
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
#pragma unroll
    for (int i = 0; i < kMostSplits; ++i) {
      const int split = first + i * together;
      if (split < splits) mine = mine + values[i] * exp2f(most[split][head] - all);
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
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ Attention work) {
  constexpr int kRows = kThreads / kLanes, kTogether = kRows * kAhead;
  constexpr int kWidth = kLanes * kVector;  // d, rounded up
  constexpr int kOuts = kWarps * kHeads * kWidth, kScratch = 4 * kThreads;
  __shared__ float4 shared[(kOuts > kScratch ? kOuts : kScratch) / 4];
  auto& outs = reinterpret_cast<float(&)[kWarps][kHeads][kWidth]>(shared);
  __shared__ float mosts[kWarps][kHeads], sums[kWarps][kHeads];

  const DecodeAttention& of = work.of;
  const int split = blockIdx.x, splits = gridDim.x, group = blockIdx.y;
  const int key_head = group / work.groups_each, d = of.d;
  const int sharing = of.heads / of.key_heads;  // query heads of a key head
  const int first_head = key_head * sharing + group % work.groups_each * kHeads;
  const int heads = min(kHeads, (key_head + 1) * sharing - first_head);
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes, warp = threadIdx.x / kWarp;
  const bool inside = lane * kVector < d;

  let_next_start();
  // a position outside the cache must not reach beyond memory, nor go unseen: it writes nothing and gives NaN
  const int64_t position = *of.position;
  const bool valid = 0 <= position && position < of.capacity;
  const int newest = valid ? static_cast<int>(position) : 0, tokens = newest + 1;
  const int each = (tokens + splits - 1) / splits;
  const int begin = min(split * each, tokens), end = min(begin + each, tokens);
  const int64_t start = int64_t{key_head} * of.capacity * d + lane * kVector;
  T* const keys = static_cast<T*>(of.keys) + start;
  T* const values = static_cast<T*>(of.values) + start;
  const T* const cosines = static_cast<const T*>(of.cosines) + int64_t{newest} * of.rotary;
  const T* const sines = static_cast<const T*>(of.sines) + int64_t{newest} * of.rotary;

  Vector<T> key[kAhead], value[kAhead];
  const auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = from + row + i * kRows;
      key[i] = value[i] = zeros<T>();
      if (!inside || token >= min(end, newest)) continue;
      key[i] = vector_at(keys + int64_t{token} * d);
      value[i] = vector_at(values + int64_t{token} * d);
    }
  };
  fetch(begin);
  await_previous();

  const T* const qkv = static_cast<const T*>(of.qkv);
  float query[kHeads][kVector];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const T* const head = qkv + int64_t{first_head + min(h, heads - 1)} * d;
    turned<T, kLanes>(of, head, static_cast<const T*>(of.query_norm), cosines, sines, lane, query[h]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) query[h][i] *= valid ? work.scaling : nanf("");
  }
  Vector<T> new_key = zeros<T>(), new_value = zeros<T>();
  if (begin <= newest && newest < end) {
    const T* const head = qkv + int64_t{of.heads + key_head} * d;
    float k[kVector];
    turned<T, kLanes>(of, head, static_cast<const T*>(of.key_norm), cosines, sines, lane, k);
#pragma unroll
    for (int i = 0; i < kVector; ++i) new_key.v[i] = from_float<T>(k[i]);
    if (inside) new_value = vector_at(head + int64_t{of.key_heads} * d + lane * kVector);
    if (valid && inside && row == 0 && group % work.groups_each == 0) {
      vector_at(keys + int64_t{newest} * d) = new_key;
      vector_at(values + int64_t{newest} * d) = new_value;
    }
  }

  Seen<kHeads> seen;
  seen.clear();
  for (int from = begin; from < end; from += kTogether) {
    if (from > begin) fetch(from);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = from + row + i * kRows;
      float k[kVector], v[kVector];
      if (token == newest) {
        key[i] = new_key;
        value[i] = new_value;
      }
      unpack(key[i], k);
      unpack(value[i], v);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score = 0.f;
#pragma unroll
        for (int j = 0; j < kVector; ++j) score += query[h][j] * k[j];
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) score += __shfl_xor_sync(kAll, score, offset);
        if (token < end) seen.add(h, score, v);
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
      for (int i = 0; i < kVector; ++i) outs[warp][h][lane * kVector + i] = seen.out[h][i];
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
  return with_half(a.scalar, [&](auto scalar) { return with_lanes<decltype(scalar)>(a.d, sharing, work); });
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
  const Attention work{a, out, workspace, plan.groups_each, a.scaling * kLog2e};
  return with_attention(a, [&](auto kernel, int) {
    return launch(kernel, dim3(plan.splits, plan.groups), 0, plan.overlap, stream, work);
  });
}

}  // namespace decdec::cuda
