// What every kernel of the project agrees on, on any device: chunks, buckets, residual codes, hashes.
// Plain C++17 without torch, so that a CUDA file can include it too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DECDEC_HD __host__ __device__
#else
#define DECDEC_HD
#endif

namespace decdec {

constexpr int kChunk = 1024;  // consecutive channels that share one budget
constexpr int kBuckets = 32;  // of the bucketed top-k

// Channels that a chunk of `length` channels contributes.
DECDEC_HD constexpr int chunk_budget(int length, int k_chunk) { return k_chunk * length / kChunk; }

// Channels that a whole row of `in_features` contributes.
DECDEC_HD constexpr int64_t row_budget(int64_t in_features, int k_chunk) {
  return in_features / kChunk * k_chunk + chunk_budget(static_cast<int>(in_features % kChunk), k_chunk);
}

// The stored code that stands for zero; codes are kept unsigned with this offset.
DECDEC_HD constexpr int code_offset(int bits) { return 1 << (bits - 1); }

// Bytes of one residual channel: the codes of all outputs, in logical order, little end first.
DECDEC_HD constexpr int64_t channel_bytes(int64_t out_features, int bits) {
  return (out_features * bits + 7) / 8;
}

// A bijection of 32-bit words in which every input bit moves every output bit (Wellons' lowbias32).
// Word: uint32_t or a vector of them.
template <typename Word>
DECDEC_HD constexpr Word mix32(Word h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

// Both halves of a seed in one word, so that seeds differing anywhere draw differently.
DECDEC_HD constexpr uint32_t mix_seed(uint64_t seed) {
  return mix32(mix32(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32));
}

}  // namespace decdec
