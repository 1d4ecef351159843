// The CPU kernels: raw pointers, no torch, no checks. Each does a range of its work items on the calling
// thread, so that the caller decides how many threads there are.
#pragma once

#include <cstdint>

namespace decdec::cpu {

enum class Scalar { float32, float16, bfloat16 };

// x: (tokens, in_features), contiguous.
struct Activations {
  const void* data;
  Scalar scalar;
  int64_t in_features;
};

// indices: one row of `count` channels per token; `stride` is 0 where all tokens share one row.
struct Channels {
  const int32_t* indices;
  int64_t count;
  int64_t stride;
};

// codes: (in_features, channel_bytes(out_features, bits)); scale: (out_features,).
struct Residual {
  const void* codes;
  const float* scale;
  int bits;
  int64_t out_features;
};

// Each writes rows token_begin..token_end of indices (tokens, row_budget(in_features, k_chunk)).
void select_topk(const Activations& x, int k_chunk, int32_t* indices, int64_t token_begin, int64_t token_end);
void select_buckets(const Activations& x, const float* floors, int k_chunk, int32_t* indices,
                    int64_t token_begin, int64_t token_end);
void select_random(const Activations& x, uint64_t seed, int k_chunk, int32_t* indices, int64_t token_begin,
                   int64_t token_end);

// Adds to y (tokens, out_features) for items item_begin..item_end, where item = token * slabs + slab.
void compensate(const Activations& x, const Channels& channels, const Residual& residual, float* y,
                int64_t slabs, int64_t item_begin, int64_t item_end);

// The position of the first index outside 0..in_features - 1, or `count` where there is none.
int64_t first_outside(const int32_t* indices, int64_t count, int64_t in_features);

}  // namespace decdec::cpu
