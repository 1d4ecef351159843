// Which channels of each token are compensated.
//
//   x        (tokens, in)   float32, float16 or bfloat16
//   indices  (tokens, K)    int32, ascending within each chunk
//
// One thread takes whole tokens, and of a token one chunk of 1024 channels after the other:
//
//   x[t]     |----- chunk 0 -----|----- chunk 1 -----|- ragged -|
//               | make keys          4 KB on the stack: all later passes stay in the L1 cache
//               v
//   keys     |3|9|1|7|9|0|4|...|   31-bit integers, larger = sooner taken
//               | find the cut       each pass counts keys >= a candidate: one compare and one
//               v                    subtract for eight keys, no branch, no sort, no histogram
//   cut      above: taken | from..above: the lowest channels of these fill up what is left
//               | collect            skips sixteen keys at a time where none is taken
//               v
//   indices  |1|4|...|             exactly k of them, whatever the input
//
// A key is the bit pattern of |x| as float32, which orders as the values do and puts NaN above infinity
// above every number. Nothing here computes with x, so no input can lead out of bounds.
#include <algorithm>
#include <type_traits>

#include "../layout.h"
#include "kernels.h"
#include "lanes.h"

namespace decdec::cpu {
namespace {

constexpr int kStride = 2 * kLanes;  // keys looked at together
constexpr int32_t kSignBit = INT32_MIN;

// The keys of one chunk, padded to whole strides with -1, which is below every cut.
struct Keys {
  alignas(64) int32_t values[kChunk];
  int length;
  int padded;
};

// Keys above `above` are all taken, `taken` of them; keys in from..above fill up, lowest channel first.
struct Cut {
  int32_t above;
  int32_t from;
  int taken;
};

int count_at_least(const Keys& keys, int32_t candidate) {
  i32x8 even = {}, odd = {};
  for (int i = 0; i < keys.padded; i += kStride) {
    even -= load<i32x8>(keys.values + i) >= candidate;
    odd -= load<i32x8>(keys.values + i + kLanes) >= candidate;
  }
  even += odd;
  int count = 0;
  for (int lane = 0; lane < kLanes; ++lane) count += even[lane];
  return count;
}

int32_t largest(const Keys& keys) {
  i32x8 best = load<i32x8>(keys.values);
  for (int i = kLanes; i < keys.padded; i += kLanes) {
    const i32x8 next = load<i32x8>(keys.values + i);
    best = next > best ? next : best;
  }
  int32_t result = best[0];
  for (int lane = 1; lane < kLanes; ++lane) result = std::max(result, best[lane]);
  return result;
}

// Bisects the key range for the k-th largest key; stops early at any cut that k keys pass.
Cut cut_topk(const Keys& keys, int k) {
  if (k == keys.length) return {INT32_MAX, 0, 0};
  int32_t low = 0, high = largest(keys);  // at least k keys are >= low, fewer than k are > high
  int above_high = 0;
  while (low < high) {
    const int32_t middle = high - (high - low) / 2;
    const int count = count_at_least(keys, middle);
    if (count >= k) {
      low = middle;
      if (count == k) return {low - 1, low, k};
    } else {
      high = middle - 1;
      above_high = count;
    }
  }
  return {high, low, above_high};
}

// Bisects the 32 floors for the bucket in which the k-th channel falls. The last floor is 0, so there is one.
Cut cut_buckets(const Keys& keys, int k, const int32_t* floor_keys) {
  int first = 0, last = kBuckets - 1;
  int above_first = 0;
  while (first < last) {
    const int middle = (first + last) / 2;
    const int count = count_at_least(keys, floor_keys[middle]);
    if (count >= k) {
      last = middle;
    } else {
      first = middle + 1;
      above_first = count;
    }
  }
  const int32_t above = first == 0 ? INT32_MAX : floor_keys[first - 1] - 1;
  return {above, floor_keys[first], above_first};
}

bool any_at_least(const int32_t* keys, int32_t candidate) {
  const i32x8 hits = (load<i32x8>(keys) >= candidate) | (load<i32x8>(keys + kLanes) >= candidate);
  int64_t words[4];
  store(words, hits);
  return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// Writes the k channels that the cut lets through, counted from channel `first`.
void collect(const Keys& keys, const Cut& cut, int k, int32_t first, int32_t* out) {
  int32_t found[kChunk + 1];  // one more: every key is written before it is known to count
  int count = 0;
  int spare = k - cut.taken;
  for (int i = 0; i < keys.padded; i += kStride) {
    if (!any_at_least(keys.values + i, cut.from)) continue;
    for (int j = i; j < i + kStride; ++j) {
      const int whole = keys.values[j] > cut.above;
      const int part = !whole & (keys.values[j] >= cut.from) & (spare > 0);
      spare -= part;
      found[count] = first + j;
      count += whole | part;
    }
  }
  std::copy_n(found, k, out);
}

void pad(Keys& keys) {
  keys.padded = (keys.length + kStride - 1) / kStride * kStride;
  std::fill(keys.values + keys.length, keys.values + keys.padded, -1);
}

// Calls visit(i, bits) for each eight channels of x[token, first:first + length], the last time with zeros
// behind the end. bits: float32 bit patterns.
template <Scalar S, typename Visit>
void visit_bits(const Activations& x, int64_t token, int first, int length, Visit visit) {
  const char* row = static_cast<const char*>(x.data) + (token * x.in_features + first) * kScalarBytes<S>;
  const int whole = length / kLanes * kLanes;
  for (int i = 0; i < whole; i += kLanes) {
    visit(i, (i32x8)load_lanes<S>(row + i * kScalarBytes<S>));
  }
  if (whole == length) return;
  alignas(32) char rest[sizeof(f32x8)] = {};
  std::memcpy(rest, row + whole * kScalarBytes<S>, (length - whole) * kScalarBytes<S>);
  visit(whole, (i32x8)load_lanes<S>(rest));
}

template <Scalar S>
void magnitude_keys(const Activations& x, int64_t token, int first, Keys& keys) {
  visit_bits<S>(x, token, first, keys.length,
                [&](int i, i32x8 bits) { store(keys.values + i, bits & ~kSignBit); });
}

u32x8 channels_from(uint32_t first) { return u32x8{0, 1, 2, 3, 4, 5, 6, 7} + first; }

// The seed and the token's sign pattern in one word. A sum, so the order of channels does not enter; signs,
// so rounding the activations does not either.
template <Scalar S>
uint32_t fingerprint(const Activations& x, int64_t token, uint32_t seed) {
  u32x8 sums = {};
  for (int64_t first = 0; first < x.in_features; first += kChunk) {
    const int length = static_cast<int>(std::min<int64_t>(kChunk, x.in_features - first));
    visit_bits<S>(x, token, first, length, [&](int i, i32x8 bits) {
      const u32x8 negative = (u32x8)(bits >> 31);
      sums += mix32(channels_from(first + i)) & negative;
    });
  }
  uint32_t sum = seed;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return mix32(sum);
}

void random_keys(uint32_t print, int first, Keys& keys) {
  for (int i = 0; i < keys.length; i += kLanes) {
    const u32x8 scores = mix32(mix32(channels_from(first + i)) ^ print);
    store(keys.values + i, scores >> 1);
  }
}

// One token: keys_of(first, keys) fills the keys of a chunk, cut_of(keys, k) finds its cut.
template <typename KeysOf, typename CutOf>
void select_row(int64_t in_features, int k_chunk, int32_t* out, KeysOf keys_of, CutOf cut_of) {
  Keys keys;
  for (int64_t first = 0; first < in_features; first += kChunk) {
    keys.length = static_cast<int>(std::min<int64_t>(kChunk, in_features - first));
    const int k = chunk_budget(keys.length, k_chunk);
    if (k == 0) continue;
    keys_of(static_cast<int>(first), keys);
    pad(keys);
    collect(keys, cut_of(keys, k), k, static_cast<int32_t>(first), out);
    out += k;
  }
}

}  // namespace

void select_topk(const Activations& x, int k_chunk, int32_t* indices, int64_t token_begin, int64_t token_end) {
  const int64_t budget = row_budget(x.in_features, k_chunk);
  with_scalar(x.scalar, [&](auto scalar) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      select_row(
          x.in_features, k_chunk, indices + token * budget,
          [&](int first, Keys& keys) { magnitude_keys<scalar()>(x, token, first, keys); }, cut_topk);
    }
  });
}

void select_buckets(const Activations& x, const float* floors, int k_chunk, int32_t* indices,
                    int64_t token_begin, int64_t token_end) {
  const int64_t budget = row_budget(x.in_features, k_chunk);
  int32_t floor_keys[kBuckets];
  std::memcpy(floor_keys, floors, sizeof floor_keys);
  with_scalar(x.scalar, [&](auto scalar) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      select_row(
          x.in_features, k_chunk, indices + token * budget,
          [&](int first, Keys& keys) { magnitude_keys<scalar()>(x, token, first, keys); },
          [&](const Keys& keys, int k) { return cut_buckets(keys, k, floor_keys); });
    }
  });
}

void select_random(const Activations& x, uint64_t seed, int k_chunk, int32_t* indices, int64_t token_begin,
                   int64_t token_end) {
  const int64_t budget = row_budget(x.in_features, k_chunk);
  with_scalar(x.scalar, [&](auto scalar) {
    for (int64_t token = token_begin; token < token_end; ++token) {
      const uint32_t print = fingerprint<scalar()>(x, token, mix_seed(seed));
      select_row(
          x.in_features, k_chunk, indices + token * budget,
          [&](int first, Keys& keys) { random_keys(print, first, keys); }, cut_topk);
    }
  });
}

}  // namespace decdec::cpu
