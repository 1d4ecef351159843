// Codes of one row of a tile -> the sixteen registers, of two weights each, that the tensor cores take.
//
// A lane holds 32 consecutive inputs of a row in `bits` words. Register q stands for inputs 2q and 2q + 1; a step of
// the tensor cores takes two registers of a row, and a step's are unpacked just before it.
//
//   uniform    No conversion: a code is cut out of its word where it lies, in the mantissa, and an exponent put
//              over it. With a mantissa of M bits and the code at bit p this reads 2^(M-p) + code, whatever p:
//
//                word   |...|ccc|......|   (w & 7 << p) | exponent(M - p)   one instruction for two weights
//                half   |0 eeeee 0000ccc000|   = 2^(M-p) + code
//
//              The 2^(M-p) are the same for all rows, so that the sum of them times x is taken off afterwards
//              (product.cuh). Low and high half of a word hold the two inputs of a register at the same place;
//              at 3 bits, five registers to a word, and the sixteenth from the words' last bits.
//   codebook   A row's table lies in registers as low bytes and high bytes; a byte permutation (prmt) takes
//              four selectors at once, which are nibbles, and reads their low three bits. At 3 bits eight
//              codes to a word in nibbles, and the nibbles' spare bits hold the last eight.
#pragma once

#include <type_traits>
#include <utility>

#include "common.cuh"

namespace decdec::cuda {

constexpr int kRegisters = 16;  // of a row in a lane

template <typename T>
constexpr int kMantissa = 10;
template <>
constexpr int kMantissa<__nv_bfloat16> = 7;

template <typename T>
constexpr uint32_t kOnes = 0x3c003c00u;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3f803f80u;

// Two numbers 2^(M - p), as bit patterns.
template <typename T>
__host__ __device__ constexpr uint32_t exponent(int p) {
  const uint32_t biased = kMantissa<T> - p + (kMantissa<T> == 10 ? 15 : 127);
  return (biased << kMantissa<T>) * 0x10001u;
}

__device__ inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
  return d;
}

// Byte i of the result is the byte of (b, a) that nibble i of `selectors` counts; its sign, spread over the byte,
// where the nibble's top bit is set.
__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selectors));
  return d;
}

// Where register q's code lies once its word is shifted: bit p of each half, after a right shift.
struct Place {
  int word, shift, p;
};

template <typename T, int kBits>
__host__ __device__ constexpr Place place(int q) {
  constexpr int kPerWord = 16 / kBits;  // whole codes in a half
  const int word = q / kPerWord, bit = q % kPerWord * kBits;
  // at 3 bits the shift differs by word, so that the leftover bits of three words come to lie side by side
  const int lean = kBits == 3 ? word : 0;
  constexpr int M = kMantissa<T>;
  if (bit + kBits <= M) return {word, 0, bit};
  if (M == 10) {
    constexpr int kFirst = M / kBits * kBits;  // the first code that does not fit
    return {word, kFirst - lean, bit - kFirst + lean};
  }
  if (kBits == 4) return bit < 8 ? Place{word, 1, 3} : bit < 12 ? Place{word, 8, 0} : Place{word, 9, 3};
  if (bit < 12) return {word, 6, bit - 6};
  return {word, 12 - lean, bit - 12 + lean};
}

// The exponent of register q alone: what its weights are above their codes.
template <typename T, int kBits>
__host__ __device__ constexpr uint32_t offset(int q) {
  if (kBits == 3 && q == 15) return exponent<T>(kMantissa<T> == 10 ? 6 : 3);
  return exponent<T>(place<T, kBits>(q).p);
}

template <typename T, int kBits, int q>
__device__ inline uint32_t uniform_register(const uint32_t* words) {
  if constexpr (kBits == 3 && q == 15) {
    constexpr int kShift = kMantissa<T> == 10 ? 9 : 12;  // of word 0; the leftover bit lies at 15
    constexpr int p = 15 - kShift;
    uint32_t v = and_or(words[0] >> kShift, (1u << p) * 0x10001u, offset<T, kBits>(15));
    v = and_or(words[1] >> (kShift - 1), (2u << p) * 0x10001u, v);
    return and_or(words[2] >> (kShift - 2), (4u << p) * 0x10001u, v);
  } else {
    constexpr Place at = place<T, kBits>(q);
    constexpr uint32_t kMask = (((1u << kBits) - 1) << at.p) * 0x10001u;
    return and_or(words[at.word] >> at.shift, kMask, offset<T, kBits>(q));
  }
}

// A row's table: 2^kBits values, their low bytes, then their high bytes.
template <int kBits>
constexpr int kTableWords = (1 << kBits) / 2;

// Four codes, as the lower four nibbles of `selectors`, -> two registers.
template <int kBits>
__device__ inline void look_up(const uint32_t* table, uint32_t selectors, uint32_t upper, uint32_t* r) {
  constexpr int kHalf = kTableWords<kBits> / 2;
  uint32_t low, high;
  if constexpr (kBits == 2) {
    low = permute(table[0], 0, selectors);
    high = permute(table[1], 0, selectors);
  } else {
    low = permute(table[0], table[1], selectors);
    high = permute(table[kHalf], table[kHalf + 1], selectors);
  }
  if constexpr (kBits == 4) {  // `upper` has a byte of ones where the code is 8 or more
    const uint32_t low_upper = permute(table[2], table[3], selectors);
    const uint32_t high_upper = permute(table[6], table[7], selectors);
    low = (low & ~upper) | (low_upper & upper);
    high = (high & ~upper) | (high_upper & upper);
  }
  r[0] = permute(low, high, 0x5140);
  r[1] = permute(low, high, 0x7362);
}

// Eight codes to a word, as nibbles below 8: all that the permutations of a row read.
template <int kBits>
__device__ inline void selectors_of(const uint32_t* words, uint32_t (&selectors)[4]) {
  if constexpr (kBits == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) selectors[i] = words[i / 2] >> (i % 2 * 2) & 0x33333333u;
  } else {
#pragma unroll
    for (int i = 0; i < kBits; ++i) selectors[i] = words[i] & 0x77777777u;
  }
  if constexpr (kBits == 3) {
    selectors[3] = words[0] >> 3 & 0x11111111u;
    selectors[3] = and_or(words[1] >> 2, 0x22222222u, selectors[3]);
    selectors[3] = and_or(words[2] >> 1, 0x44444444u, selectors[3]);
  }
}

// Registers 2 * step and 2 * step + 1: codes 4 * step .. 4 * step + 3.
template <int kBits, int step>
__device__ inline void codebook_registers(const uint32_t* words, const uint32_t (&selectors)[4], const uint32_t* table,
                                          uint32_t* r) {
  const uint32_t four = step % 2 == 0 ? selectors[step / 2] : selectors[step / 2] >> 16;
  uint32_t upper = 0;
  if constexpr (kBits == 4) {
    // with its top bit set, a selector spreads the sign of a byte: of odd nibbles as they are, of even ones
    // shifted up
    const uint32_t word = words[step / 2];
    upper = permute(word, word << 4, step % 2 == 0 ? 0x9d8c : 0xbfae);
  }
  look_up<kBits>(table, four, upper, r);
}

// A row's words in a lane, and what is made of them once for all steps.
template <typename T, Format kFormat, int kBits>
struct Row {
  const uint32_t* const words;
  const uint32_t* const table;
  uint32_t selectors[4];

  __device__ Row(const uint32_t* words, const uint32_t* table) : words(words), table(table) {
    if constexpr (kFormat == Format::codebook) selectors_of<kBits>(words, selectors);
  }

  template <int step>
  __device__ void unpack(uint32_t (&r)[2]) const {
    if constexpr (kFormat == Format::codebook) {
      codebook_registers<kBits, step>(words, selectors, table, r);
    } else {
      r[0] = uniform_register<T, kBits, 2 * step>(words);
      r[1] = uniform_register<T, kBits, 2 * step + 1>(words);
    }
  }
};

// Calls work(std::integral_constant<int, step>{}) for each step of the tensor cores.
template <typename Work>
__device__ inline void for_steps(const Work& work) {
  [&]<int... kSteps>(std::integer_sequence<int, kSteps...>) {
    (work(std::integral_constant<int, kSteps>{}), ...);
  }(std::make_integer_sequence<int, kRegisters / 2>{});
}

}  // namespace decdec::cuda
