// y = low-bit weight x (1 to 8 tokens), and in the same launch the compensation from host memory.
//
// The weight is cut into tiles of 32 outputs by 128 inputs, one group: 32 lanes x 128 codes, then the scales.
// Tiles lie slab after slab (32 outputs), and along the inputs within a slab:
//
//   blocks 0 ..            compensation: each a piece of the channels for a column of outputs; selects, fetches, sums,
//                          sends (compensate.cuh)
//   blocks behind them     the product: each a run of tiles, equally long whatever the matrix' shape, where it costs
//                          little a multiple of the warps
//
//     tiles   |------- slab 0 -------|------- slab 1 -------|------- slab 2 -------|
//     blocks  |--- block d ---|--- block c ---|--- block b ---|--- block a ---|
//     warps    01234567012345  a tile at a time, kStages of each warp on their way (cp.async, no registers)
//
//   A warp multiplies its tile by tensor-core products whose second operand is x, one column to a token: with
//   one token seven columns are idle, which costs nothing, since the tensor cores are. The warps of a block
//   meet in shared memory at the end of a slab. A block that starts amid a slab sends its share of it, the
//   first thing it has, to the block where the slab starts; that one, at its own end, receives what belongs to
//   its slabs, from other blocks and from compensation, and writes y. Every sum is in fixed order.
//
// A block waits only for blocks of lower index, which start earlier: so there is no deadlock, however many fit.
// That is why the runs are dealt out from the end. A block waits at its own end, or after every kSlots slabs.
//
// Which lane holds what in a tile, for the m16n8k16 product (g = lane / 4, t = lane % 4):
//
//   outputs  g, g + 8, g + 16, g + 24       inputs  32t .. 32t + 31, two to a register, four to a product
//   x        token g, inputs 32t .. 32t + 31       sums    tokens 2t, 2t + 1 of each of the four outputs
#pragma once

#include "compensate.cuh"
#include "unpack.cuh"

namespace decdec::cuda {

constexpr int kSlab = 32;   // outputs
constexpr int kDepth = 128; // inputs of a tile
constexpr int kStages = 4;

template <Format kFormat, int kBits>
constexpr int kTileBytes = kSlab * kDepth * kBits / 8 + (kFormat == Format::uniform ? kSlab * 4 : 0);

constexpr int kSlots = 8;     // slabs whose sums a block holds until its end
constexpr int kMeetings = 2;  // slabs whose warps' sums have a place: of one they are added up, of the next they come

// A tile, and behind it the inputs that go with it.
template <Format kFormat, int kBits>
__host__ __device__ constexpr int stage_bytes(int tokens) {
  return kTileBytes<kFormat, kBits> + tokens * kDepth * 2;
}

// The tables of a slab.
template <Format kFormat, int kBits>
constexpr int kTablesBytes = kFormat == Format::codebook ? kSlab * kTableWords<kBits> * 4 : 0;

constexpr int kPlaces = 4;  // of a slab whose sums of x a warp keeps

// What a warp has to itself: the stages, and the tables of this slab and the next or what it keeps.
template <Format kFormat, int kBits>
__host__ __device__ constexpr int warp_bytes(int tokens) {
  const int rest = kFormat == Format::codebook ? 2 * kTablesBytes<kFormat, kBits> : kPlaces * kWarp * 16;
  return kStages * stage_bytes<kFormat, kBits>(tokens) + rest;
}

// Bytes of shared memory of a launch.
template <Format kFormat, int kBits>
constexpr size_t shared_bytes(int tokens) {
  const size_t sums = (kMeetings * kWarps + kSlots) * kSlab * tokens * sizeof(float);
  const size_t base = kWarps * warp_bytes<kFormat, kBits>(tokens) + sums;
  return base > sizeof(Shared<4>) ? base : sizeof(Shared<4>);
}

struct Work {
  Activations x;
  Weight weight;
  Selection selection;
  Residual residual;
  int slabs, depth;         // tiles of the weight: slabs * depth
  int base_blocks;
  int tiles_each;           // tiles of a block, but the last has what is left
  int columns, pieces;      // blocks of the compensation: columns * pieces
  void* y;
  float* shares;        // workspace: (base_blocks, tokens, 32), then
  float* compensation;  // (tokens, pieces, slabs * 32)
};

template <typename T>
__device__ inline void compensate_part(const Work& work, Shared<4>& shared) {
  const int column = blockIdx.x / work.pieces, piece = blockIdx.x % work.pieces, in_features = work.x.in_features;
  const int begin = part_of(work.slabs, column, work.columns), end = part_of(work.slabs, column + 1, work.columns);
  const Piece own = piece_of(in_features, work.selection, piece, work.pieces);
  const uint32_t floor = floor_of_lane<T>(work.selection);
  wait_for_previous();
  for (int token = 0; token < work.x.tokens; ++token) {
    const T* row = static_cast<const T*>(work.x.data) + int64_t{token} * in_features;
    float* const slots = work.compensation + (int64_t{token} * work.pieces + piece) * work.slabs * kSlab;
    compensate_piece<4>(row, in_features, work.selection, work.selection.indices + token * work.selection.stride, floor,
                        own, work.residual, work.weight.out_features, begin, end, shared,
                        [&](int output, float4 sums) { send(slots + output, sums); });
  }
}

// `stage` is an address in shared memory, `from` that of the lane's first 16 bytes.
template <int kTile>
__device__ inline void fetch_tile(uint32_t stage, const char* from, int lane) {
#pragma unroll
  for (int at = 0; at < kTile; at += kWarp * 16) {
    if (at + kWarp * 16 <= kTile || lane * 16 < kTile - at) copy_async(stage + at + lane * 16, from + at);
  }
}

// The inputs of the lane's token, 32 of them; zeros behind the end. Only the lane itself reads them.
template <typename T>
__device__ inline void fetch_x(uint32_t stage, const T* row, const Work& work, int depth, int lane) {
  const int token = lane / 4, input = depth * kDepth + lane % 4 * 32;
  if (token >= work.x.tokens) return;
  const bool there = input < work.x.in_features;
  const T* const from = there ? row + input : row;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    copy_async_or_zero(stage + (i * 4 * work.x.tokens + lane) * 16, from + 8 * i, there);
  }
}

__device__ inline void load_x(const char* stage, int tokens, int lane, uint32_t (&x)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 v{};
    if (lane < 4 * tokens) v = reinterpret_cast<const uint4*>(stage)[i * 4 * tokens + lane];
    x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
  }
}

using Sums = float[2][4];  // [outputs g and g + 8, or 16 more][as the tensor cores have them]

// What the exponents of a uniform tile's weights add (rows 0-7 of `shift`), and the sum of x (rows 8-15): the same
// for all slabs.
template <typename T, int kBits>
__device__ inline void sum_x(float (&shift)[4], const uint32_t (&x)[kRegisters]) {
  float other[4] = {};
  for_steps([&](auto step) {
    constexpr int s = decltype(step)::value;
    mma<T>(s % 2 ? other : shift, offset<T, kBits>(2 * s), kOnes<T>, offset<T, kBits>(2 * s + 1), kOnes<T>,
           x[2 * s], x[2 * s + 1]);
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) shift[i] += other[i];
}

// Adds what a tile gives.
template <typename T, Format kFormat, int kBits>
__device__ inline void add_tile(Sums& sums, const char* stage, const uint32_t* table, const float (&shift)[4],
                                const uint32_t (&x)[kRegisters], int lane) {
  constexpr bool kUniform = kFormat == Format::uniform;
  constexpr int kTable = kTableWords<kBits>;
  uint32_t words[4 * kBits];
#pragma unroll
  for (int v = 0; v < kBits; ++v) {
    const uint4 w = reinterpret_cast<const uint4*>(stage)[v * kWarp + lane];
    words[4 * v] = w.x, words[4 * v + 1] = w.y, words[4 * v + 2] = w.z, words[4 * v + 3] = w.w;
  }
  using R = Row<T, kFormat, kBits>;
  const R rows[4] = {R(words, table), R(words + kBits, table + kTable), R(words + 2 * kBits, table + 2 * kTable),
                     R(words + 3 * kBits, table + 3 * kTable)};
  float group[2][4] = {};
  for_steps([&](auto step) {
    constexpr int s = decltype(step)::value;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t upper[2], lower[2];
      rows[2 * m].template unpack<s>(upper);
      rows[2 * m + 1].template unpack<s>(lower);
      mma<T>(kUniform ? group[m] : sums[m], upper[0], lower[0], upper[1], lower[1], x[2 * s], x[2 * s + 1]);
    }
  });
  if constexpr (kUniform) {
    const uint4 packed = reinterpret_cast<const uint4*>(stage)[kBits * kWarp + lane / 4];
    const uint32_t scales[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 scale_zero = __half22float2(reinterpret_cast<const __half2&>(scales[2 * m + i / 2]));
        sums[m][i] += scale_zero.x * ((group[m][i] - shift[i % 2]) - scale_zero.y * shift[2 + i % 2]);
      }
    }
  }
}

template <typename T, Format kFormat, int kBits>
struct Product {
  static constexpr int kTile = kTileBytes<kFormat, kBits>;
  static constexpr bool kCodebook = kFormat == Format::codebook;

  const Work& work;
  char* const ring;      // shared memory, the warp's own
  float* const meeting;  // shared memory: [kMeetings][warp][token][32]
  float* const held;     // shared memory: [kSlots][token][32]
  const int range, warp, lane;
  const int begin, end;  // tiles

  __device__ int range_of(int tile) const { return tile / work.tiles_each; }

  __device__ void run() const {
    const int stage_size = stage_bytes<kFormat, kBits>(work.x.tokens);
    const uint32_t ring_address = static_cast<uint32_t>(__cvta_generic_to_shared(ring));
    const int first_slab = begin / work.depth;
    int ahead = begin + warp, ahead_depth = ahead - first_slab * work.depth;
    const char* ahead_tile = static_cast<const char*>(work.weight.tiles) + int64_t{ahead} * kTile + lane * 16;
    const T* const row = static_cast<const T*>(work.x.data) + int64_t{lane / 4} * work.x.in_features;
    // the first tiles and scales do not depend on the launch before this one, whose work has to be another than to write
    // them
    int unwritten = first_slab;
    float scale = scale_of(unwritten);
    if constexpr (kCodebook) fetch_tables(first_slab);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (ahead + s * kWarps < end) {
        fetch_tile<kTile>(ring_address + s * stage_size, ahead_tile + s * kWarps * kTile, lane);
      }
      copies_commit();
    }
    wait_for_previous();
    const auto fetch_next = [&](int stage, bool with_tile) {
      if (ahead < end) {
        while (ahead_depth >= work.depth) ahead_depth -= work.depth;
        const uint32_t to = ring_address + stage * stage_size;
        if (with_tile) fetch_tile<kTile>(to, ahead_tile, lane);
        fetch_x(to + kTile, row, work, ahead_depth, lane);
      }
      copies_commit();
      ahead += kWarps, ahead_depth += kWarps, ahead_tile += kWarps * kTile;
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fetch_next(s, false);
    int stage = 0, slab = first_slab;
    uint32_t known = 0;  // places whose sums of x are kept
    int seen = kStages;  // tiles since the tables were asked for, which came with the first of them
    for (int tile = begin + warp; slab * work.depth < end; ++slab) {
      const int slab_end = min(end, (slab + 1) * work.depth);
      Sums sums = {};
      uint32_t table[4 * kTableWords<kBits>];
      if constexpr (kCodebook) {
        if (seen < kStages) {
          copies_commit();
          copies_wait<0>();
        } else {
          copies_wait<kStages - 2>();
        }
        load_tables(table, slab);
        if (slab_end < end) fetch_tables(slab + 1);
        seen = 0;
      }
      for (; tile < slab_end; tile += kWarps) {
        copies_wait<kStages - 2>();
        __syncwarp();
        fetch_next((stage + kStages - 1) % kStages, true);  // the stage that the warp has just left
        const char* const here = ring + stage * stage_size;
        uint32_t x[kRegisters];
        load_x(here + kTile, work.x.tokens, lane, x);
        float shift[4] = {};
        if constexpr (!kCodebook) shift_of(tile - slab * work.depth, x, known, shift);
        add_tile<T, kFormat, kBits>(sums, here, table, shift, x, lane);
        stage = (stage + 1) % kStages;
        ++seen;
      }
      leave(sums, slab);
      __syncthreads();
      if (warp == slab % kWarps) meet(slab);  // the others go on, to another slot
      if (slab + 1 - unwritten == kSlots) {
        write(unwritten, slab + 1, scale);
        unwritten = slab + 1;
        scale = scale_of(unwritten);
      }
    }
    write(unwritten, slab, scale);
  }

  // Where a warp meets the same few places of each slab again, what sum_x gave there is kept.
  __device__ void shift_of(int depth, const uint32_t (&x)[kRegisters], uint32_t& known, float (&shift)[4]) const {
    const int place = depth / kWarps;
    float4* const kept = reinterpret_cast<float4*>(ring + kStages * stage_bytes<kFormat, kBits>(work.x.tokens)) +
                         place % kPlaces * kWarp + lane;
    if (place < kPlaces && known >> place & 1) {
      const float4 v = *kept;
      shift[0] = v.x, shift[1] = v.y, shift[2] = v.z, shift[3] = v.w;
      return;
    }
    sum_x<T, kBits>(shift, x);
    *kept = {shift[0], shift[1], shift[2], shift[3]};
    if (work.depth % kWarps == 0 && work.depth <= kPlaces * kWarps) known |= 1u << place;
  }

  __device__ char* tables(int slab) const {
    return ring + kStages * stage_bytes<kFormat, kBits>(work.x.tokens) + slab % 2 * kTablesBytes<kFormat, kBits>;
  }

  // Joins the group of copies that is committed next. A lane fetches, and reads, what its four outputs need: one
  // of the four lanes that need the same.
  __device__ void fetch_tables(int slab) const {
    const char* from = static_cast<const char*>(work.weight.table) + int64_t{slab} * kTablesBytes<kFormat, kBits>;
    for (int at = lane * 16; at < kTablesBytes<kFormat, kBits>; at += kWarp * 16) {
      copy_async(shared_address(tables(slab) + at), from + at);
    }
  }

  __device__ void load_tables(uint32_t* table, int slab) const {
    __syncwarp();
    constexpr int kVectors = kTableWords<kBits>;  // of four outputs: 4 * kTableWords words
    const uint4* from = reinterpret_cast<const uint4*>(tables(slab)) + lane / 4 * kVectors;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint4 v = from[i];
      table[4 * i] = v.x, table[4 * i + 1] = v.y, table[4 * i + 2] = v.z, table[4 * i + 3] = v.w;
    }
    __syncwarp();
  }

  __device__ void leave(const Sums& sums, int slab) const {
    const int g = lane / 4, t = lane % 4, tokens = work.x.tokens;
    float* const mine = meeting + (slab % kMeetings * kWarps + warp) * tokens * kSlab;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 2 * t + i % 2;
        if (token < tokens) mine[token * kSlab + m * 16 + i / 2 * 8 + g] = sums[m][i];
      }
    }
  }

  // One warp: the sum of a slab over the warps, to be held, or sent where the slab starts in another block.
  __device__ void meet(int slab) const {
    const int tokens = work.x.tokens;
    const float* const left = meeting + slab % kMeetings * kWarps * tokens * kSlab + lane;
    for (int token = 0; token < tokens; ++token) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += left[(w * tokens + token) * kSlab];
      if (slab * work.depth < begin) {
        send(work.shares + (int64_t{range} * tokens + token) * kSlab + lane, sum);
      } else {
        held[(slab % kSlots * tokens + token) * kSlab + lane] = sum;
      }
    }
  }

  // The residual's scale for the output that the lane will write after the slabs from `from` on: asked for long before,
  // since it may lie in host memory.
  __device__ float scale_of(int from) const {
    static_assert(kSlots <= kWarps, "a warp writes one slab at most");
    const int slab = from + warp, output = slab * kSlab + lane;
    const bool written = warp < kSlots && slab * work.depth >= begin && slab * work.depth < end;
    return work.pieces > 0 && written && output < work.weight.out_features ? work.residual.scale[output] : 0.f;
  }

  // The whole block: what is missing from the slabs that start here, and y; a lane has one output of a slab.
  __device__ void write(int from, int to, float scale) const {
    __syncthreads();
    const int tokens = work.x.tokens;
    const int slab = from + warp;
    if (slab < to && slab * work.depth >= begin) {
      const int output = slab * kSlab + lane, last_range = range_of((slab + 1) * work.depth - 1);
      for (int token = 0; token < tokens; ++token) {
        float sum = held[(slab % kSlots * tokens + token) * kSlab + lane];
        for (int other = range + 1; other <= last_range; ++other) {
          sum += receive(work.shares + (int64_t{other} * tokens + token) * kSlab + lane);
        }
        if (output >= work.weight.out_features) continue;
        if (work.pieces > 0) {
          const int64_t row = int64_t{work.slabs} * kSlab;
          sum += scale * receive_sum(work.compensation + token * work.pieces * row + output, row, work.pieces);
        }
        if (work.weight.bias != nullptr) sum += work.weight.bias[output];
        static_cast<T*>(work.y)[int64_t{token} * work.weight.out_features + output] = from_float<T>(sum);
      }
    }
    __syncthreads();
  }
};

template <typename T, Format kFormat, int kBits>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const __grid_constant__ Work work) {
  extern __shared__ __align__(16) char memory[];
  const int compensation_blocks = work.columns * work.pieces;
  if (blockIdx.x < compensation_blocks) {
    compensate_part<T>(work, *reinterpret_cast<Shared<4>*>(memory));
    return;
  }
  using P = Product<T, kFormat, kBits>;
  const int range = work.base_blocks - 1 - (blockIdx.x - compensation_blocks);
  const int own = warp_bytes<kFormat, kBits>(work.x.tokens);
  float* const meeting = reinterpret_cast<float*>(memory + kWarps * own);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int begin = range * work.tiles_each, end = min(begin + work.tiles_each, work.slabs * work.depth);
  const P product{work, memory + warp * own, meeting, meeting + kMeetings * kWarps * work.x.tokens * kSlab,
                  range, warp, lane, begin, end};
  product.run();
}

}  // namespace decdec::cuda
