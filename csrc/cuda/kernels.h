// The CUDA kernels as seen from the host: raw pointers, numbers and a stream; no torch, no checks.
// What takes a `stream` launches on it; each call returns the first error of what it asked of CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace decdec::cuda {

enum class Scalar { float32, float16, bfloat16 };
enum class Format { uniform, codebook };

// x: (tokens, in_features), contiguous.
struct Activations {
  const void* data;
  Scalar scalar;
  int tokens;
  int in_features;
};

// How channels are chosen. listed: `indices` holds rows of `count` channels, `stride` apart, 0 where all tokens
// share one row. floors: the bucket floors as bit patterns, passed by value so that they cost no memory.
struct Selection {
  enum class Kind { listed, topk, buckets, random };
  Kind kind;
  int k_chunk;
  uint64_t seed;
  int floors[32];
  const int32_t* indices;
  int count;
  int64_t stride;
};

// codes: (in_features, channel_bytes(out_features, bits)) and scale: (out_features,), in device memory or in
// pinned host memory that the device can read.
struct Residual {
  const void* codes;
  const float* scale;
  int bits;
};

// tiles: the weight in the kernels' order (packing.py); table: of the codebook format; bias may be null.
struct Weight {
  const void* tiles;
  const void* table;
  const float* bias;
  Format format;
  int bits;
  int out_features;
};

// Writes indices (tokens, row_budget).
cudaError_t select(const Activations& x, const Selection& selection, int32_t* indices, cudaStream_t stream);

// Words of workspace that compensate takes.
int64_t compensation_slots(const Activations& x, const Selection& selection, int bits, int out_features);

// y (tokens, out_features) += what the selected channels contribute; any selection but random.
// workspace: compensation_slots words, each kEmpty before and after.
cudaError_t compensate(const Activations& x, const Selection& selection, const Residual& residual, int out_features,
                       float* y, float* workspace, cudaStream_t stream);

// dense (out_features, in_features) in the activations' type.
cudaError_t dequantize(const Weight& weight, int in_features, Scalar scalar, void* dense, cudaStream_t stream);

// dense (rows, out_features) = the listed channels of the residual, or its first `rows` where `channels` is null. Rows
// of codes are `stride` bytes apart, which may be more than they hold. bits: 2, 4 or 8.
cudaError_t dequantize_residual(const Residual& residual, int64_t stride, const int32_t* channels, int rows,
                                int out_features, Scalar scalar, void* dense, cudaStream_t stream);

// The shape of a launch of `linear`. Every field follows from the device, the weight and n_tb.
struct Plan {
  int base_blocks;      // that stream the weight
  int tiles_each;       // tiles of such a block
  int columns, pieces;  // columns * pieces blocks compensate, at most n_tb
  bool overlap;         // with the end of the launch before it
  int64_t slots;        // floats of workspace
};

// Tokens that one launch takes on this device: kMaxTokens, or fewer where a block gets little shared memory (99 KB on
// compute capability 8.6, 8.9 and 12.0).
cudaError_t tokens_at_once(const Weight& weight, const Activations& x, int* tokens);

cudaError_t plan(const Weight& weight, const Activations& x, int n_tb, Plan* result);

// y (tokens, out_features) = the product, plus the compensation where residual is not null. 1 to 8 tokens; any
// selection but random.
// workspace: plan.slots words, each kEmpty before and after.
cudaError_t linear(const Weight& weight, const Activations& x, const Selection* selection,
                   const Residual* residual, const Plan& plan, void* y, float* workspace, cudaStream_t stream);

// One token's attention over a static cache, of float16 or bfloat16 throughout. qkv (heads + 2 key_heads, d): queries,
// then keys, then values; keys and values (key_heads, capacity, d), to which the token's are added; d a multiple of 8,
// at most 256. position: how many tokens came before it, below capacity. cosines, sines (capacity, rotary): of the first
// `rotary` values of a head, of which i turns with i + rotary / 2; a multiple of 16. query_norm, key_norm (d): weights
// of a root-mean-square norm of each head, or null.
struct DecodeAttention {
  const void* qkv;
  void* keys;
  void* values;
  const int64_t* position;
  const void* cosines;
  const void* sines;
  const void* query_norm;
  const void* key_norm;
  Scalar scalar;
  int heads, key_heads, capacity, d, rotary;
  float eps, scaling;
};

struct AttentionPlan {
  int groups_each, groups;  // of query heads that a block has: of a key head, of all
  int splits;               // of the tokens
  bool overlap;             // with the end of the launch before it
  int64_t slots;            // floats of workspace
};

cudaError_t plan(const DecodeAttention& attention, AttentionPlan* result);

// out (heads, d). Cache, position and tables must be complete before the chain of overlapping launches that this one
// is in.
// workspace: plan.slots words, each kEmpty before and after.
cudaError_t decode_attention(const DecodeAttention& attention, const AttentionPlan& plan, void* out, float* workspace,
                             cudaStream_t stream);

// hidden (size) += added, where that is not null; out = weight * hidden / its root mean square. float16 or bfloat16; each
// of the three is rounded. size a multiple of 8.
struct Norm {
  const void* added;
  void* hidden;
  const void* weight;
  void* out;
  Scalar scalar;
  int size;
  float eps;
};

cudaError_t add_norm(const Norm& norm, cudaStream_t stream);

// out (size) = silu(gate) * up, where gate_up (2 size) has gate, then up; both products are rounded to their type, float16
// or bfloat16. size a multiple of 8.
cudaError_t silu_mul(const void* gate_up, void* out, Scalar scalar, int size, cudaStream_t stream);

// The bit pattern of a workspace word that no value has reached yet; a NaN that no sum is stored as.
constexpr uint32_t kEmpty = 0xffffffffu;

constexpr int kMaxTokens = 8;

}  // namespace decdec::cuda
