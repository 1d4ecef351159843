// y[t, o] += sum over the selected channels c of x[t, c] * (code[c, o] - offset) * scale[o]
//
//   x      (tokens, in)    codes  (in, channel_bytes), one channel after the other
//   y      (tokens, out)   scale  (out,)
//
// An item is one slab of one token's outputs, a run of blocks, and belongs to one thread; rows are
// cut into more than one slab only where there are fewer tokens than threads. A block's sums live in
// eight registers of eight floats while all selected channels pass by. At 4 bits:
//
//   channel c0   |....|32 bytes|....|      one block of one channel: eight words of eight codes
//   channel c1   |....|32 bytes|....|
//        :               | shift left, shift right: code p of each word, as a signed integer
//        :               v
//   register 0   outputs 0  8 16 24 32 40 48 56        += x[t, c] * code
//   register 1   outputs 1  9 17 25 33 41 49 57
//       :
//   register 7   outputs 7 15 23 31 39 47 55 63
//                        | once, after the last channel: transpose, times scale, add to y
//                        v
//   y[t]         |....|64 floats|....|
//
// The codes of a word stay in planes because separating them takes two shifts, while bringing them in order
// would cost shuffles per channel. The order of additions depends on nothing but the indices, so the
// result is the same bit for bit for any number of threads.
#include <algorithm>

#include "../layout.h"
#include "kernels.h"
#include "lanes.h"

namespace decdec::cpu {
namespace {

constexpr int kGathered = kChunk;  // channels taken at a time, so that their values fit on the stack

// A block of codes of `kBits` each. Register r of kRegisters holds code r % kPlanes of the words of vector
// r / kPlanes: eight registers, but sixteen at 2 bits, where a word holds sixteen codes.
template <int kBits>
struct Format {
  static constexpr int kPlanes = 32 / kBits;
  static constexpr int kVectors = kPlanes < 8 ? 8 / kPlanes : 1;
  static constexpr int kRegisters = kPlanes * kVectors;
  static constexpr int kBlock = kRegisters * kLanes;  // outputs
  static constexpr int kBytes = kBlock * kBits / 8;
  // with its highest bit flipped, a code with an offset is the same number in two's complement
  static constexpr uint32_t kFlip = UINT32_MAX / ((1u << kBits) - 1) << (kBits - 1);
};

// Plane `p` of eight words as floats. Halves are finite, being residuals, so that moving sign, exponent and
// mantissa to their places and rebasing the exponent by 127 - 15 = 112 is all that they need.
template <int kBits>
inline f32x8 decode(i32x8 words, int p) {
  const i32x8 topmost = words << (32 - kBits - p * kBits);
  if constexpr (kBits == 16) return (f32x8)((topmost >> 3) & ~0x70001fff) * 0x1p112f;
  return __builtin_convertvector(topmost >> (32 - kBits), f32x8);
}

// Adds value * code for one channel's block.
template <int kBits>
inline void add_channel(f32x8* sums, const char* codes, float value) {
  using F = Format<kBits>;
  for (int v = 0; v < F::kVectors; ++v) {
    i32x8 words = load<i32x8>(codes + v * sizeof(i32x8));
    if constexpr (kBits < 16) words ^= static_cast<int32_t>(F::kFlip);
    for (int p = 0; p < F::kPlanes; ++p) sums[v * F::kPlanes + p] += decode<kBits>(words, p) * value;
  }
}

// Adds the sums, in logical order and scaled, to `count` outputs of y.
template <int kBits>
inline void write_block(f32x8* sums, const float* scale, float* y, int count) {
  using F = Format<kBits>;
  constexpr int kRun = F::kPlanes < kLanes ? F::kPlanes : kLanes;  // neighbours within a transposed row
  float outputs[F::kBlock];
  for (int r = 0; r < F::kRegisters; r += kLanes) {
    transpose(sums + r);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int run = 0; run < kLanes; run += kRun) {
        const int word = run / kRun * kLanes + lane;
        std::memcpy(outputs + word * F::kPlanes + r, (const float*)(sums + r + lane) + run, kRun * sizeof(float));
      }
    }
  }
  if (count == F::kBlock) {
    for (int o = 0; o < F::kBlock; ++o) y[o] += outputs[o] * scale[o];
  } else {
    for (int o = 0; o < count; ++o) y[o] += outputs[o] * scale[o];
  }
}

// The selected channels of one token, at most kGathered of them.
struct Gathered {
  float values[kGathered];
  int64_t rows[kGathered];  // byte offset of the channel in codes
  int count;
};

template <Scalar S>
void gather(const Activations& x, int64_t token, const int32_t* channels, int64_t row_bytes, Gathered& to) {
  const char* row = static_cast<const char*>(x.data) + token * x.in_features * kScalarBytes<S>;
  for (int j = 0; j < to.count; ++j) {
    to.values[j] = load_scalar<S>(row + channels[j] * kScalarBytes<S>);
    to.rows[j] = channels[j] * row_bytes;
  }
}

template <int kBits>
void add_block(const Gathered& from, const Residual& residual, int64_t block, float* y) {
  using F = Format<kBits>;
  const char* codes = static_cast<const char*>(residual.codes) + block * F::kBytes;
  const int64_t first = block * F::kBlock;
  const int count = static_cast<int>(std::min<int64_t>(F::kBlock, residual.out_features - first));
  f32x8 sums[F::kRegisters] = {};
  if (count == F::kBlock) {
    for (int j = 0; j < from.count; ++j) add_channel<kBits>(sums, codes + from.rows[j], from.values[j]);
  } else {
    // a ragged block goes through a copy: a load past the last channel would leave the tensor
    char copy[F::kBytes] = {};
    for (int j = 0; j < from.count; ++j) {
      std::memcpy(copy, codes + from.rows[j], channel_bytes(count, kBits));
      add_channel<kBits>(sums, copy, from.values[j]);
    }
  }
  write_block<kBits>(sums, residual.scale + first, y + first, count);
}

template <int kBits>
void compensate_items(const Activations& x, const Channels& channels, const Residual& residual, float* y,
                      int64_t slabs, int64_t item_begin, int64_t item_end) {
  const int64_t row_bytes = channel_bytes(residual.out_features, kBits);
  const int64_t blocks = (residual.out_features + Format<kBits>::kBlock - 1) / Format<kBits>::kBlock;
  Gathered gathered;
  for (int64_t item = item_begin; item < item_end; ++item) {
    const int64_t token = item / slabs, slab = item % slabs;
    const int32_t* selected = channels.indices + token * channels.stride;
    for (int64_t done = 0; done < channels.count; done += kGathered) {
      gathered.count = static_cast<int>(std::min<int64_t>(kGathered, channels.count - done));
      with_scalar(x.scalar, [&](auto scalar) {
        gather<scalar()>(x, token, selected + done, row_bytes, gathered);
      });
      for (int64_t block = blocks * slab / slabs; block < blocks * (slab + 1) / slabs; ++block) {
        add_block<kBits>(gathered, residual, block, y + token * residual.out_features);
      }
    }
  }
}

}  // namespace

void compensate(const Activations& x, const Channels& channels, const Residual& residual, float* y,
                int64_t slabs, int64_t item_begin, int64_t item_end) {
  const auto run = [&](auto items) { items(x, channels, residual, y, slabs, item_begin, item_end); };
  switch (residual.bits) {
    case 2: return run(compensate_items<2>);
    case 4: return run(compensate_items<4>);
    case 8: return run(compensate_items<8>);
    case 16: return run(compensate_items<16>);
  }
}

int64_t first_outside(const int32_t* indices, int64_t count, int64_t in_features) {
  // one branch-free pass first: nothing is outside but once in a bug
  const uint64_t limit = static_cast<uint64_t>(in_features);
  uint32_t largest = 0;  // a negative index is a large unsigned one
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(indices[i]));
  if (largest < limit) return count;
  return std::find_if(indices, indices + count,
                      [&](int32_t index) { return static_cast<uint32_t>(index) >= limit; }) -
         indices;
}

}  // namespace decdec::cpu
