// The product that everything else is made of: a few rows of activations times columns of packed
// weights (or keys, or values).
//
// Packed operands come in *tiles* of 16 columns. A tile is rows of 16 32-bit lanes, and a lane holds
// the next kPack<T> elements of one column along the depth: one float, two bf16 or four int8.
// This is the order of AMX tiles, of vdpbf16ps and vpdpbusd, and easily taken apart elsewhere.
#pragma once

#include <algorithm>

#include "amx.h"
#include "simd.h"
#include "weights.h"

namespace nanovllm {

constexpr int kTile = 16;                     // columns of a tile
constexpr int kSplits = kTile / kWidth;       // vectors in a row of a tile
constexpr int kMaxColumnTiles = 4;            // tiles that a panel has
constexpr int kPanel = kTile * kMaxColumnTiles;
constexpr long kLine = 64;                    // bytes of a cache line

inline int tiles_of_panel(const Weights& w, long panel) {
  return int(std::min<long>(kMaxColumnTiles, w.num_tiles - panel * kMaxColumnTiles));
}

template <class T>
constexpr int kPack = 4 / sizeof(T);

// Rows whose sums fit the registers, and tiles beside R of them: as many sums as hide the latency.
#if defined(NANOVLLM_AVX512)
constexpr int kDotRows = 6;
template <int R>
constexpr int kDotTiles = 4;
#elif defined(__AVX2__)
constexpr int kDotRows = 5;
template <int R>
constexpr int kDotTiles = R == 1 ? 4 : R == 2 ? 2 : 1;
#elif defined(__ARM_NEON)
constexpr int kDotRows = 4;
template <int R>
constexpr int kDotTiles = R == 1 ? 4 : R == 2 ? 2 : 1;
#else
constexpr int kDotRows = 4;
template <int R>
constexpr int kDotTiles = 1;
#endif

// Whether a lane of two bf16, or of four int8, is multiplied as a whole.
#if (defined(__AVX512BF16__) && defined(NANOVLLM_AVX512)) || \
    defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(NANOVLLM_EMULATE_AMX)
#define NANOVLLM_BF16_DOT 1
#endif
#if (defined(__AVX512VNNI__) && defined(NANOVLLM_AVX512)) || defined(__AVXVNNI__) || \
    defined(__ARM_FEATURE_MATMUL_INT8) || defined(NANOVLLM_EMULATE_AMX)
#define NANOVLLM_INT8_DOT 1
#endif

// Codes of int8 weights are stored unsigned, as those instructions want them. Without them AVX2 and
// AVX-512 multiply magnitudes by activations of the weights' signs, so codes are made signed again.
#if defined(__AVX2__) && !defined(NANOVLLM_INT8_DOT)
#define NANOVLLM_SIGNED_CODES 1
constexpr int32_t kCodeOffset = 0;
#else
constexpr int32_t kCodeOffset = kInt8Zero;
#endif

// The type of activations that are multiplied with columns of T. Where no instruction takes a lane as
// a whole, it has two *parts*: a float each, or two int16 each. Columns are taken apart in registers,
// once for all rows; activations beforehand.
template <class T>
struct OperandOf {
  using Type = T;
};
#if !defined(NANOVLLM_BF16_DOT)
template <>
struct OperandOf<Bf16> {
  using Type = float;
};
#endif
#if !defined(NANOVLLM_INT8_DOT) && !defined(NANOVLLM_SIGNED_CODES)
template <>
struct OperandOf<int8_t> {
  using Type = int16_t;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::Type;
template <class T>
constexpr int kParts = sizeof(Operand<T>) / sizeof(T);

inline uint32_t word_at(const void* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}

// A part of the lanes of columns of float, bf16, or codes of int8.
inline Words part_of(float, Words w, int) { return w; }

inline Words part_of(Bf16, Words w, int part) {
  if constexpr (kParts<Bf16> == 1) return w;
  return part ? w & 0xffff0000u : w << 16;
}

#if defined(NANOVLLM_SIGNED_CODES)
inline Words part_of(int8_t, Words w, int) { return w ^ 0x80808080u; }
#else
inline Words part_of(int8_t, Words w, int part) {
  if constexpr (kParts<int8_t> == 1) return w;
  const Words pair = part ? w >> 16 : w;
  return (pair & 0xffu) | (pair & 0xff00u) << 8;
}
#endif

inline Floats multiply_add(Floats acc, float, Words x, Words w) {
  return acc + bit_cast<Floats>(x) * bit_cast<Floats>(w);
}

inline Floats multiply_add(Floats acc, Bf16, Words x, Words w) {
#if defined(__AVX512BF16__) && defined(NANOVLLM_AVX512)
  return bit_cast<Floats>(
      _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(x), bit_cast<__m512bh>(w)));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
  return bit_cast<Floats>(vbfdotq_f32(bit_cast<float32x4_t>(acc), bit_cast<bfloat16x8_t>(x),
                                      bit_cast<bfloat16x8_t>(w)));
#elif defined(NANOVLLM_BF16_DOT)
  acc += bit_cast<Floats>(x << 16) * bit_cast<Floats>(w << 16);
  return acc + bit_cast<Floats>(x & 0xffff0000u) * bit_cast<Floats>(w & 0xffff0000u);
#else
  return multiply_add(acc, 0.0f, x, w);
#endif
}

// Signed activations between -127 and 127; weights as `part_of` yields them.
inline Ints multiply_add(Ints acc, int8_t, Words x, Words w) {
#if defined(__AVX512VNNI__) && defined(NANOVLLM_AVX512)
  return bit_cast<Ints>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(acc), bit_cast<__m512i>(w), bit_cast<__m512i>(x)));
#elif defined(__AVXVNNI__) && !defined(NANOVLLM_AVX512)
  return bit_cast<Ints>(
      _mm256_dpbusd_avx_epi32(bit_cast<__m256i>(acc), bit_cast<__m256i>(w), bit_cast<__m256i>(x)));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return bit_cast<Ints>(
      vusdotq_s32(bit_cast<int32x4_t>(acc), bit_cast<uint8x16_t>(w), bit_cast<int8x16_t>(x)));
#elif defined(NANOVLLM_INT8_DOT)
  for (int shift = 0; shift < 32; shift += 8) {
    acc += (bit_cast<Ints>(x << (24 - shift)) >> 24) * bit_cast<Ints>((w >> shift) & 0xffu);
  }
  return acc;
#elif defined(NANOVLLM_SIGNED_CODES)
  // 2 * 128 * 127 < 2^15.
  const Shorts pairs = multiply_bytes(magnitudes(w), apply_signs(x, w));
  return acc + multiply_pairs(bit_cast<Words>(pairs), splat_word(0x00010001u));
#else
  return acc + multiply_pairs(x, w);
#endif
}

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
template <class T>
using AccumulatorVector = std::conditional_t<std::is_same_v<T, int8_t>, Ints, Floats>;

// Sums of R rows times C tiles, in registers.
template <class Vector, int R, int C>
struct Sums {
  Vector at[R][C * kSplits] = {};

  template <class Element>
  void load(const Element* c, long stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
      for (int j = 0; j < C * kSplits; j++) at[r][j] = load_raw<Vector>(c + r * stride + j * kWidth);
    }
  }

  template <class Element>
  void store(Element* c, long stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 16
      for (int j = 0; j < C * kSplits; j++) {
        std::memcpy(c + r * stride + j * kWidth, &at[r][j], sizeof(Vector));
      }
    }
  }
};

// Adds the products of a lane of R rows, or a part of it, and a row of C tiles.
template <class T, int R, int C>
inline void multiply_row(Sums<AccumulatorVector<T>, R, C>& sums, const Operand<T>* a, long a_stride,
                         const Words (&w)[C * kSplits]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Words x = splat_word(word_at(a + r * a_stride));
#pragma GCC unroll 16
    for (int j = 0; j < C * kSplits; j++) {
      sums.at[r][j] = multiply_add(sums.at[r][j], T{}, x, w[j]);
    }
  }
}

// R rows times C tiles; see `multiply`. Meanwhile kAhead cache lines are fetched every step of the
// depth, from `ahead` on.
template <class T, int R, int C, int kAhead = 0>
inline void dot_block(const Operand<T>* a, long a_stride, const T* const* tiles, int tile_stride,
                      int segments, long length, Accumulator<T>* c, long c_stride,
                      bool accumulate, [[maybe_unused]] const char* ahead = nullptr) {
  Sums<AccumulatorVector<T>, R, C> sums;
  if (accumulate) sums.load(c, c_stride);
  for (int s = 0; s < segments; s++, a += length, tiles += tile_stride) {
    const T* columns[C];
    for (int j = 0; j < C; j++) columns[j] = tiles[j];
    for (long k = 0; k < length; k += kPack<T>) {
#pragma GCC unroll 4
      for (int line = 0; line < kAhead; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 2
      for (int part = 0; part < kParts<T>; part++) {
        Words w[C * kSplits];
#pragma GCC unroll 16
        for (int j = 0; j < C * kSplits; j++) {
          const T* row = columns[j / kSplits] + k * kTile;
          w[j] = part_of(T{}, load_raw<Words>(row + j % kSplits * kWidth * kPack<T>), part);
        }
        multiply_row<T>(sums, a + k + part * kPack<Operand<T>>, a_stride, w);
        // With AVX2 columns are loaded anew for the other part: compilers keep them in registers,
        // and some sums in memory, which takes a third more time.
        if constexpr (kVectorBytes == 32 && kParts<T> > 1 && R > 4) asm volatile("" ::: "memory");
      }
    }
  }
  sums.store(c, c_stride);
}

// What will be read next, to be fetched into the L2 cache during the products before. The memory
// then works on while rows are multiplied, instead of taking turns with them.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;

  // The next `lines` cache lines; null if there are not as many left.
  const char* take(long lines) {
    if (end - at < lines * 64) return nullptr;
    at += lines * 64;
    return at - lines * 64;
  }
};

// R rows times any number of tiles, fetching kAhead lines a step.
template <class T, int R, int kAhead>
inline void dot_rows(const Operand<T>* a, long a_stride, const T* const* tiles, int num_tiles,
                     int tile_stride, int segments, long length, Accumulator<T>* c, long c_stride,
                     bool accumulate, Ahead& ahead) {
  constexpr int C = kDotTiles<R>;
  int j = 0;
  for (; j + C <= num_tiles; j += C) {
    const char* lines = kAhead ? ahead.take(segments * length / kPack<T> * kAhead) : nullptr;
    if (lines) {
      dot_block<T, R, C, kAhead>(a, a_stride, tiles + j, tile_stride, segments, length,
                                 c + j * kTile, c_stride, accumulate, lines);
    } else {
      dot_block<T, R, C>(a, a_stride, tiles + j, tile_stride, segments, length, c + j * kTile,
                         c_stride, accumulate);
    }
  }
  for (; j < num_tiles; j++) {
    dot_block<T, R, 1>(a, a_stride, tiles + j, tile_stride, segments, length, c + j * kTile,
                       c_stride, accumulate);
  }
}

// Calls `body` with the number of rows, 1 to kMost, as a constant.
template <int kMost = kDotRows, class Body>
inline void for_rows(long rows, Body&& body) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return for_rows<kMost - 1>(rows, body);
  }
  body(std::integral_constant<int, kMost>{});
}

// Calls `body` for blocks of up to kMost rows, with their number in a block as a constant, its first
// row, and the number of blocks. They are of about equal size: one or two rows at the end would wait
// for their sums.
template <int kMost = kDotRows, class Body>
inline void for_blocks(long rows, Body&& body) {
  const long blocks = (rows + kMost - 1) / kMost;
  for (long r = 0, block = 0; block < blocks; block++) {
    const long count = (rows - r + blocks - block - 1) / (blocks - block);
    for_rows<kMost>(count, [&](auto num_rows) { body(num_rows, r, blocks); });
    r += count;
  }
}

// c[rows, 16 * num_tiles] (+)= a[rows, segments * length] x tiles.
//
// The depth may lie in several segments, as values do in blocks: segment s of column tile j is at
// tiles[s * tile_stride + j] and starts at a[., s * length]. `length` is a multiple of kPack<T>.
// Every row is summed in the same order whatever the number of rows.
template <class T>
inline void multiply_vectors(const Operand<T>* a, long a_stride, long rows, const T* const* tiles,
                             int num_tiles, int tile_stride, int segments, long length,
                             Accumulator<T>* c, long c_stride, bool accumulate, Ahead& ahead) {
  for_blocks(rows, [&](auto num_rows, long r, long blocks) {
    constexpr int R = num_rows();
    // A step reads a line of each tile, which is as much as all blocks together fetch.
    const long lines = ahead.at == ahead.end ? 0 : (kDotTiles<R> + blocks - 1) / blocks;
    const auto rows_of = lines > 2    ? dot_rows<T, R, 4>
                         : lines == 2 ? dot_rows<T, R, 2>
                         : lines == 1 ? dot_rows<T, R, 1>
                                      : dot_rows<T, R, 0>;
    rows_of(a + r * a_stride, a_stride, tiles, num_tiles, tile_stride, segments, length,
            c + r * c_stride, c_stride, accumulate, ahead);
  });
}

#if defined(NANOVLLM_AMX)

inline void tile_dot(Bf16, int which) {
  switch (which) {
    case 0: TILE_DOT_BF16(0, 4, 6); break;
    case 1: TILE_DOT_BF16(1, 4, 7); break;
    case 2: TILE_DOT_BF16(2, 5, 6); break;
    default: TILE_DOT_BF16(3, 5, 7);
  }
}
inline void tile_dot(int8_t, int which) {
  switch (which) {
    case 0: TILE_DOT_INT8(0, 4, 6); break;
    case 1: TILE_DOT_INT8(1, 4, 7); break;
    case 2: TILE_DOT_INT8(2, 5, 6); break;
    default: TILE_DOT_INT8(3, 5, 7);
  }
}

// Up to 32 rows times up to two tiles, in the eight tile registers: 0 to 3 accumulate, 4 and 5 hold
// activations, 6 and 7 weights.
template <class T, bool kTwoRows, bool kTwoTiles>
inline void tile_block(const T* a, long a_stride, const T* const* tiles, int tile_stride,
                       int segments, long length, Accumulator<T>* c, long c_stride,
                       bool accumulate) {
  constexpr int kDepth = kTileBytes / sizeof(T);
  const long c_bytes = c_stride * 4, a_bytes = a_stride * sizeof(T);
  Accumulator<T>* c_low = c + kTileRows * c_stride;
  if (accumulate) {
    TILE_LOAD(0, c, c_bytes);
    if constexpr (kTwoTiles) TILE_LOAD(1, c + kTile, c_bytes);
    if constexpr (kTwoRows) TILE_LOAD(2, c_low, c_bytes);
    if constexpr (kTwoRows && kTwoTiles) TILE_LOAD(3, c_low + kTile, c_bytes);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int s = 0; s < segments; s++, a += length, tiles += tile_stride) {
    for (long k = 0; k < length; k += kDepth) {
      TILE_LOAD(6, tiles[0] + k * kTile, kTileBytes);
      if constexpr (kTwoTiles) TILE_LOAD(7, tiles[1] + k * kTile, kTileBytes);
      TILE_LOAD(4, a + k, a_bytes);
      tile_dot(T{}, 0);
      if constexpr (kTwoTiles) tile_dot(T{}, 1);
      if constexpr (kTwoRows) {
        TILE_LOAD(5, a + kTileRows * a_stride + k, a_bytes);
        tile_dot(T{}, 2);
        if constexpr (kTwoTiles) tile_dot(T{}, 3);
      }
    }
  }
  TILE_STORE(0, c, c_bytes);
  if constexpr (kTwoTiles) TILE_STORE(1, c + kTile, c_bytes);
  if constexpr (kTwoRows) TILE_STORE(2, c_low, c_bytes);
  if constexpr (kTwoRows && kTwoTiles) TILE_STORE(3, c_low + kTile, c_bytes);
}

template <class T>
inline void multiply_tiles(const T* a, long a_stride, long rows, const T* const* tiles,
                           int num_tiles, int tile_stride, int segments, long length,
                           Accumulator<T>* c, long c_stride, bool accumulate) {
  for (int j = 0; j < num_tiles; j += 2) {
    for (long r = 0; r < rows; r += 2 * kTileRows) {
      const auto block = [&](auto two_rows, auto two_tiles) {
        tile_block<T, decltype(two_rows)::value, decltype(two_tiles)::value>(
            a + r * a_stride, a_stride, tiles + j, tile_stride, segments, length,
            c + r * c_stride + j * kTile, c_stride, accumulate);
      };
      const bool two_rows = rows - r > kTileRows, two_tiles = num_tiles - j > 1;
      if (two_rows && two_tiles) block(std::true_type{}, std::true_type{});
      else if (two_rows) block(std::true_type{}, std::false_type{});
      else if (two_tiles) block(std::false_type{}, std::true_type{});
      else block(std::false_type{}, std::false_type{});
    }
  }
}

#endif

// Whether `multiply` uses AMX tiles: then `a` and `c` have room for the rows rounded up to
// kTileRows (32 at a time), whatever lies there.
template <class T>
constexpr bool uses_tiles([[maybe_unused]] long rows, [[maybe_unused]] long length,
                          [[maybe_unused]] bool always) {
#if defined(NANOVLLM_AMX)
  constexpr int kFewRows = 3;  // up to here memory is the limit, and vectors waste no work
  if constexpr (sizeof(T) < 4) {
    return (always || rows > kFewRows) && length % (kTileBytes / sizeof(T)) == 0;
  }
#endif
  return false;
}

// See `multiply_vectors`; on AMX tiles if `tiled`, which is what `uses_tiles` said.
template <class T>
inline void multiply([[maybe_unused]] bool tiled, const Operand<T>* a, long a_stride, long rows,
                     const T* const* tiles, int num_tiles, int tile_stride, int segments,
                     long length, Accumulator<T>* c, long c_stride, bool accumulate,
                     Ahead* ahead = nullptr) {
#if defined(NANOVLLM_AMX)
  if constexpr (sizeof(T) < 4) {
    if (tiled) {
      return multiply_tiles(a, a_stride, rows, tiles, num_tiles, tile_stride, segments, length, c,
                            c_stride, accumulate);
    }
  }
#endif
  Ahead nothing;
  multiply_vectors(a, a_stride, rows, tiles, num_tiles, tile_stride, segments, length, c, c_stride,
                   accumulate, ahead ? *ahead : nothing);
}

}  // namespace nanovllm
