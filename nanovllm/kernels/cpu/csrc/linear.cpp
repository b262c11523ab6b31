// Linear layers on packed weights: float32, bf16 (whole or in 12 bits), int8 and int4, one copy of the
// weights for every number of rows.
//
// The outputs are cut into *panels* of four tiles, a work item being one panel and a block of rows.
// int8 and int4 round the activations to int8, by row and by group; the integer sums are then exact.
// Weights are kept unsigned; unless a product takes them signed, their zero point is subtracted
// through the sum of the activations.
// After "LLM.int8()" (Dettmers et al. 2022, section 2) and llama.cpp's Q4_0.

#include <algorithm>

#include "compact.h"
#include "gate.h"
#include "int4.h"
#include "linear.h"
#include "pool.h"
#include "replay.h"

namespace nanovllm {
namespace {

constexpr long kBlockRows = 32 * kDotRows;  // of a work item, in whole AMX tiles
constexpr long kExpandedRows = 768;         // the same where int4 is expanded for AMX
constexpr long kInt4PartRows = 24;          // so many at a time have their sums in the L1 cache

template <class T>
constexpr long kDepthBlock = 8192 / sizeof(T) / 2;  // keeps a panel's slice in half of a small L2
constexpr long kTiledDepthBlock = 512;  // two tiles' slice in L1
constexpr long kExpandingRows = 4;      // of many: more would leave no registers for it
constexpr long kInt4Ahead = 3072;       // bytes from what one or two rows read to what they fetch
constexpr long kFewestRows = 4;         // from so many on, a panel is fetched ahead
constexpr long kFewestInt4Rows = 3;     // the same of int4

// What some activations were rounded to.
struct Rounded {
  float scale;
  int32_t offset;  // minus the sum of the codes, times the zero point if all weights have the same
};

// Activations as a kernel reads them: elements of T.
template <class T>
struct Input {
  const T* data;
  long stride;
  const Rounded* rounded = nullptr;  // [rows, runs]
  long runs = 1;
};

// Where the results go; they take the place of what is there, or are added to it.
template <class Out>
struct Output {
  Out* data;
  bool add;
};

alignas(64) thread_local float block_sums[kExpandedRows * kPanel];

// Copies rows with their depth padded by zeros; rows beyond are zero too.
template <class From, class To>
Input<To> pad_rows(Session& session, const From* x, long rows, long depth, long padded_depth) {
  // Not a multiple of 4096 bytes, or rows would fall into the same sets of the cache.
  const long stride = padded_depth + 64 / sizeof(To), padded_rows = round_up(rows, 2 * kTileRows);
  To* data = static_cast<To*>(session.scratch(0, padded_rows * stride * sizeof(To)));
  session.parallel_rows(padded_rows, [&](long r) {
    for (long k = 0; k < stride; k += kWidth) {
      const long count = r < rows ? std::max(0L, depth - k) : 0;
      store(data + r * stride + k, load(x + r * depth + (count ? k : 0), count), stride - k);
    }
  });
  return {data, stride};
}

// Rounds each group of a row to int8 by its largest magnitude. A group is one or more runs, each with
// an offset of its own: `factor` times the sum of its codes.
template <class Code, class From>
void quantize_row(const From* x, long depth, long padded_depth, long group, long run, int32_t factor,
                  Code* codes, Rounded* rounded) {
  for (long first = 0; first < padded_depth; first += group) {
    const auto [scale, inverse] = int8_scale(x + first, std::clamp(depth - first, 0L, group));
    for (long begin = first; begin < first + group; begin += run, rounded++) {
      Ints total{};
      const auto round = [&](long k, Floats v) {
        const Ints code = (round_to_ints(v * inverse) << 24) >> 24;  // a NaN has any bits
        total += code;
        store_narrow(codes + k, code);
      };
      const long end = begin + run, whole = std::min(end, depth) - kWidth;
      long k = begin;
      for (; k <= whole; k += kWidth) round(k, load(x + k));
      for (; k < end; k += kWidth) round(k, k < depth ? load(x + k, depth - k) : Floats{});
      *rounded = {scale, factor * sum(total)};
    }
  }
}

template <class Code, class From>
Input<Code> quantize_rows(Session& session, const From* x, long rows, long depth, long padded_depth,
                          long group, long run, int32_t factor) {
  const long runs = padded_depth / run, padded_rows = round_up(rows, 2 * kTileRows);
  const long stride = padded_depth + 64;
  auto* data = static_cast<Code*>(session.scratch(0, padded_rows * stride * sizeof(Code)));
  auto* rounded = static_cast<Rounded*>(session.scratch(1, rows * runs * sizeof(Rounded)));
  session.parallel_rows(rows, [&](long r) {
    quantize_row(x + r * depth, depth, padded_depth, group, run, factor, data + r * stride,
                 rounded + r * runs);
  });
  return {data, stride, rounded, runs};
}

// A panel in memory.
Ahead bytes_of_panel(const Weights& w, long tile) {
  if (w.format == kCompact) {
    if (tile >= w.num_tiles) return {};
    const Block* first = blocks_of_panel(w, tile / kMaxColumnTiles);
    const Block* end = first + w.padded_depth / kBlockDepth;
    return {static_cast<const char*>(w.data) + first->line * kLine,
            static_cast<const char*>(w.data) + end->line * kLine};
  }
  const long tile_bytes = w.format == kInt4
                              ? w.padded_depth / w.group_size * Int4Panel::tile_bytes(w)
                              : w.padded_depth * kTile * bits_of(w.format) / 8;
  const char* at = static_cast<const char*>(w.data) + tile * tile_bytes;
  return {at, at + std::clamp<long>(w.num_tiles - tile, 0, kMaxColumnTiles) * tile_bytes};
}

// One item of work.
struct Panel {
  long row, rows, tile;
  int num_tiles;
  float* sums;  // [rows, kPanel]
  Ahead ahead;  // the panel that this thread will likely take next, if it is to be fetched
};

template <class T>
const T* tile_of(const Weights& w, long tile) {
  return static_cast<const T*>(w.data) + tile * w.padded_depth * kTile;
}

// Sums of one panel over the whole depth.
template <class T>
void multiply_panel(const Weights& w, const Input<Operand<T>>& in, bool tiled, Panel& panel) {
  auto* sums = reinterpret_cast<Accumulator<T>*>(panel.sums);
  const long step = tiled ? kTiledDepthBlock : kDepthBlock<T>;
  for (long k = 0; k < w.padded_depth; k += step) {
    const long depth = std::min<long>(step, w.padded_depth - k);
    const T* tiles[kMaxColumnTiles];
    for (int j = 0; j < panel.num_tiles; j++) tiles[j] = tile_of<T>(w, panel.tile + j) + k * kTile;
    multiply<T>(tiled, in.data + panel.row * in.stride + k, in.stride, panel.rows, tiles,
                panel.num_tiles, 0, 1, depth, sums, kPanel, k > 0, &panel.ahead);
  }
}

// The same of a compact weight. The first rows expand it in passing, for those that follow.
void multiply_compact_panel(const Weights& w, const Input<Operand<Bf16>>& in, bool tiled,
                            Panel& panel) {
  constexpr long kMost = kDepthBlock<Bf16>;
  alignas(64) static thread_local Bf16 expanded[kMaxColumnTiles * kMost * kTile];
  const long step = tiled ? kTiledDepthBlock : kMost;
  const long first = tiled ? 0 : panel.rows <= kDotRows ? panel.rows : kExpandingRows;
  const long others = panel.rows - first;
  CompactSlice slice(w, panel.tile / kMaxColumnTiles, expanded, step * kTile);
  const Bf16* tiles[kMaxColumnTiles];
  for (int j = 0; j < panel.num_tiles; j++) tiles[j] = expanded + j * slice.tile_size;
  for (long k = 0; k < w.padded_depth; k += step, slice.blocks += step / kBlockDepth) {
    slice.depth = std::min<long>(step, w.padded_depth - k);
    const auto* x = in.data + panel.row * in.stride + k;
    const auto multiply_first = others ? multiply_compact<true> : multiply_compact<false>;
    if (first) multiply_first(slice, x, in.stride, first, panel.sums, kPanel, k > 0);
    else expand(slice);
    if (others) {
      multiply<Bf16>(tiled, x + first * in.stride, in.stride, others, tiles, panel.num_tiles, 0, 1,
                     slice.depth, panel.sums + first * kPanel, kPanel, k > 0, &panel.ahead);
    }
  }
}

// int8, one group a row.
void multiply_int8(const Weights& w, const Input<Operand<int8_t>>& in, bool tiled, Panel& panel) {
  multiply_panel<int8_t>(w, in, tiled, panel);
  const auto* sums = reinterpret_cast<const int32_t*>(panel.sums);
  const float* scales = w.scales + panel.tile * kTile;
  for (long r = 0; r < panel.rows; r++) {
    const auto [x_scale, offset] = in.rounded[panel.row + r];
    for (int j = 0; j < panel.num_tiles * kTile; j += kWidth) {
      const Ints total = load_raw<Ints>(sums + r * kPanel + j) + offset;
      store(panel.sums + r * kPanel + j,
            __builtin_convertvector(total, Floats) * x_scale * load(scales + j));
    }
  }
}

inline Ints load_zero(bool has_zeros, const Int4Panel& panel, long group, long tile, int lane) {
  if (!has_zeros) return Ints{} + kInt4Zero;
  return widen(reinterpret_cast<const int8_t*>(panel.zeros(group, tile)) + lane);
}

// Exact sums of products with codes of four bits, over a *run* of inputs: a group, or as much of it as
// sums of 16 bits can take where there is no instruction for four int8, 15 * 128 * 32 / 2 < 2^15.
#if defined(NANOVLLM_INT8_DOT)
using NibbleSums = Ints;

inline long run_of(const Weights& w) { return w.group_size; }
inline NibbleSums add_nibbles(NibbleSums sums, Words x, Words codes) {
  return multiply_add(sums, int8_t{}, x, codes);
}
inline Ints total_of(NibbleSums sums) { return sums; }
#else
using NibbleSums = Shorts;

inline long run_of(const Weights&) { return 32; }  // a group is a multiple of it
inline NibbleSums add_nibbles(NibbleSums sums, Words x, Words codes) {
  return kept_in_register(sums + multiply_bytes(codes, x));
}
inline Ints total_of(NibbleSums sums) {
  return multiply_pairs(bit_cast<Words>(sums), splat_word(0x00010001u));
}
#endif

// Whether a block of int4 fetches the panel that comes next, or else what it reads soon itself.
template <int R>
constexpr bool kFetchesNext = R >= kFewestInt4Rows;

// R rows times C tiles of int4: exact within a run, then scaled into floats. Meanwhile a line is
// fetched every step, of the next panel from `next` on, if it is not null.
template <int R, int C, bool kZeros>
__attribute__((noinline))  // or its loops compete with others for registers
void int4_block(const Weights& w, const Int4Panel& panel, int tile, const Input<int8_t>& in, long row,
                float* c, const char* next) {
  constexpr int V = C * kSplits;
  // Sums of 32 bits begin with what the zero points add, which those of 16 bits could not hold.
  constexpr bool kBeginsExact = std::is_same_v<NibbleSums, Ints>;
  Sums<Floats, R, C> sums;
  const long run = run_of(w), stride = panel.stride(), runs = in.runs;
  const int8_t* x = in.data + row * in.stride;       // these two run on from group to group
  const Rounded* rounded = in.rounded + row * runs;
  [[maybe_unused]] const long next_step = next ? kLine : 0;
  if (!next) next = panel.codes(0, tile);  // any address that there is
  for (long g = 0; g * w.group_size < w.padded_depth; g++) {
    const char* line = panel.codes(g, tile);
    const auto zero_part = [&](int r, int j) {
      const Words offset = splat_word(uint32_t(rounded[r * runs].offset));
      if constexpr (!kZeros) return bit_cast<Ints>(offset);
      // A zero point is below 16, the sum of 256 int8 below 2^15.
      const Ints zero = load_zero(true, panel, g, tile + j / kSplits, j % kSplits * kWidth);
      return multiply_pairs(bit_cast<Words>(zero), offset);
    };
    for (long left = w.group_size; left > 0; left -= run, rounded++) {
      NibbleSums partial[R][V] = {};
      if constexpr (kBeginsExact) {
#pragma GCC unroll 16
        for (int j = 0; j < V; j++) {
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) partial[r][j] = zero_part(r, j);
        }
      }
      for (const int8_t* end = x + run; x < end; x += Int4Panel::kStep, line += stride) {
        if constexpr (kFetchesNext<R>) {
          __builtin_prefetch(next, 0, 2);
          next += next_step;
        } else {
          for (int j = 0; j < C; j++) __builtin_prefetch(line + kInt4Ahead + j * kLine);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
          const auto four = [&](int r) { return splat_word(word_at(x + r * in.stride + 4 * half)); };
          const auto codes = [&](int j) {
            return (load_raw<Words>(line + j * kVectorBytes) >> (4 * half)) & 0x0f0f0f0fu;
          };
          // Of rows and columns, registers hold the fewer.
          if constexpr (R < V) {
            Words held[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) held[r] = four(r);
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) {
              const Words held_codes = codes(j);
#pragma GCC unroll 8
              for (int r = 0; r < R; r++) partial[r][j] = add_nibbles(partial[r][j], held[r], held_codes);
            }
          } else {
            Words held[V];
#pragma GCC unroll 16
            for (int j = 0; j < V; j++) held[j] = codes(j);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
              const Words v = four(r);
#pragma GCC unroll 16
              for (int j = 0; j < V; j++) partial[r][j] = add_nibbles(partial[r][j], v, held[j]);
            }
          }
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < V; j++) {
        const Floats scale = load_half(panel.scales(g, tile + j / kSplits) + j % kSplits * kWidth);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          Ints total = total_of(partial[r][j]);
          if constexpr (!kBeginsExact) total += zero_part(r, j);
          const Floats factor = scale * rounded[r * runs].scale;
          sums.at[r][j] += __builtin_convertvector(total, Floats) * factor;
        }
      }
    }
  }
  sums.store(c, kPanel);
}

// Rows whose exact sums fit the registers.
constexpr int kInt4Rows = kVectorBytes == 64 ? 6 : 4;

// Tiles times R rows whose exact sums fit the registers.
template <int R>
constexpr int kInt4Tiles = R > 2 ? std::min(2, kDotTiles<R>) : kDotTiles<R>;

template <bool kZeros>
void multiply_int4(const Weights& w, const Input<int8_t>& in, Panel& panel) {
  const Int4Panel packed(w, panel.tile / kMaxColumnTiles);
  for_blocks<kInt4Rows>(panel.rows, [&](auto num_rows, long r, long) {
    constexpr int R = num_rows(), C = kInt4Tiles<R>;
    float* sums = panel.sums + r * kPanel;
    int j = 0;
    for (; j + C <= panel.num_tiles; j += C) {
      const long steps = w.padded_depth / Int4Panel::kStep;
      const char* next = kFetchesNext<R> ? panel.ahead.take(steps) : nullptr;
      int4_block<R, C, kZeros>(w, packed, j, in, panel.row + r, sums + j * kTile, next);
    }
    for (; j < panel.num_tiles; j++) {
      int4_block<R, 1, kZeros>(w, packed, j, in, panel.row + r, sums + j * kTile, nullptr);
    }
  });
}

#if defined(NANOVLLM_AMX)

constexpr long kExpandedDepth = 512;  // depth expanded at a time
constexpr long kMinExpandedRows = 16;

// Expands `depth` inputs of a tile of int4 to bf16.
void expand_int4(const Weights& w, const Int4Panel panel, int tile, long first, long depth, Bf16* out) {
  for (long k = first; k < first + depth; k += Int4Panel::kStep, out += Int4Panel::kStep * kTile) {
    const long group = k / w.group_size, step = k % w.group_size / Int4Panel::kStep;
    const char* line = panel.codes(group, tile) + step * panel.stride();
    for (int lane = 0; lane < kTile; lane += kWidth) {
      const Words codes = load_raw<Words>(line + lane * 4);
      const Ints zero = load_zero(w.has_zeros, panel, group, tile, lane);
      const Floats scale = load_half(panel.scales(group, tile) + lane);
      for (int pair = 0; pair < 4; pair++) {
        // Byte i of a word holds elements i and i + 4.
        const int shift = 16 * (pair % 2) + 4 * (pair / 2);
        const Ints even = bit_cast<Ints>((codes >> shift) & 15u) - zero;
        const Ints odd = bit_cast<Ints>((codes >> (shift + 8)) & 15u) - zero;
        const HalfWords low = to_bf16(__builtin_convertvector(even, Floats) * scale);
        const HalfWords high = to_bf16(__builtin_convertvector(odd, Floats) * scale);
        const Words word = __builtin_convertvector(low, Words) |
                           (__builtin_convertvector(high, Words) << 16);
        std::memcpy(out + pair * 2 * kTile + lane * 2, &word, sizeof(word));
      }
    }
  }
}

void multiply_expanded(const Weights& w, const Input<Bf16>& in, Panel& panel) {
  alignas(64) static thread_local Bf16 expanded[kMaxColumnTiles][kExpandedDepth * kTile];
  const Int4Panel packed(w, panel.tile / kMaxColumnTiles);
  const Bf16* tiles[kMaxColumnTiles];
  for (long k = 0; k < w.padded_depth; k += kExpandedDepth) {
    const long depth = std::min<long>(kExpandedDepth, w.padded_depth - k);
    for (int j = 0; j < panel.num_tiles; j++) {
      expand_int4(w, packed, j, k, depth, expanded[j]);
      tiles[j] = expanded[j];
    }
    multiply<Bf16>(true, in.data + panel.row * in.stride + k, in.stride, panel.rows, tiles,
                   panel.num_tiles, 0, 1, depth, panel.sums, kPanel, k > 0);
  }
}

#endif

// Adds the bias, applies the gate, and writes a panel's sums to the output, or adds them to it.
template <bool kGated, class Out>
void finish_panel(const Weights& w, const Panel& panel, Output<Out> out) {
  constexpr long kTilesPerOutput = kGated ? 2 : 1;  // those of gate and up alternate
  const long width = w.columns / kTilesPerOutput, first = panel.tile / kTilesPerOutput * kTile;
  const long count = std::min(panel.num_tiles / kTilesPerOutput * kTile, width - first);
  const float* bias = w.bias ? w.bias + panel.tile * kTile : nullptr;
  for (long r = 0; r < panel.rows; r++) {
    const float* sums = panel.sums + r * kPanel;
    Out* target = out.data + (panel.row + r) * width + first;
    for (long c = 0; c < count; c += kWidth) {
      const long at = c + c / kTile * kTile * (kTilesPerOutput - 1);  // of gate and up, the gate's
      const auto value = [&](long i) { return bias ? load(sums + i) + load(bias + i) : load(sums + i); };
      Floats y = value(at);
      if constexpr (kGated) y = gated(w.gate, y, value(at + kTile));
      if (out.add) y += load(target + c, count - c);
      store(target + c, y, count - c);
    }
  }
}

// A work item is a panel and `block_rows` rows, of which `part_rows` at a time are computed and written.
template <class Out, class Multiply>
void run_panels(Session& session, const Weights& w, long rows, long block_rows, long part_rows,
                Output<Out> out, Multiply&& multiply) {
  const long blocks = (rows + block_rows - 1) / block_rows;
  const long panels = (w.num_tiles + kMaxColumnTiles - 1) / kMaxColumnTiles;
  session.parallel(panels * blocks, [&](long item) {
    const long index = item % panels, row = item / panels * block_rows;
    Panel panel{row, std::min(block_rows, rows - row), index * kMaxColumnTiles,
                tiles_of_panel(w, index), block_sums, {}};
    const long fewest = w.format == kInt4 ? kFewestInt4Rows : kFewestRows;
    if (w.format == kCompact || rows >= fewest) {
      panel.ahead = bytes_of_panel(w, (index + num_threads()) * kMaxColumnTiles);
    }
    for (const long end = panel.row + panel.rows; panel.row < end; panel.row += panel.rows) {
      panel.rows = std::min(part_rows, end - panel.row);
      multiply(panel);
      if (w.gate) finish_panel<true>(w, panel, out);
      else finish_panel<false>(w, panel, out);
    }
  });
}

template <class T, class In, class Out>
void run_plain(Session& session, const Weights& w, const In* x, long rows, Output<Out> out, bool always) {
  using Element = Operand<T>;
  const bool tiled = uses_tiles<T>(rows, w.padded_depth, always);
  Input<Element> in{reinterpret_cast<const Element*>(x), w.depth};
  if (tiled || w.depth != w.padded_depth || !std::is_same_v<Element, In>) {
    in = pad_rows<In, Element>(session, x, rows, w.depth, w.padded_depth);
  }
  run_panels(session, w, rows, kBlockRows, kBlockRows, out, [&](Panel& panel) {
    if constexpr (std::is_same_v<T, Bf16>) {
      if (w.format == kCompact) return multiply_compact_panel(w, in, tiled, panel);
    }
    multiply_panel<T>(w, in, tiled, panel);
  });
}

template <class In, class Out>
void run_int8(Session& session, const Weights& w, const In* x, long rows, Output<Out> out, bool always) {
  const bool tiled = uses_tiles<int8_t>(rows, w.padded_depth, always);
  const auto in = quantize_rows<Operand<int8_t>>(session, x, rows, w.depth, w.padded_depth,
                                                 w.padded_depth, w.padded_depth, -kCodeOffset);
  run_panels(session, w, rows, kBlockRows, kBlockRows, out,
             [&](Panel& panel) { multiply_int8(w, in, tiled, panel); });
}

template <class In, class Out>
void run_int4(Session& session, const Weights& w, const In* x, long rows, Output<Out> out,
              [[maybe_unused]] bool always) {
#if defined(NANOVLLM_AMX)
  if constexpr (std::is_same_v<In, Bf16>) {
    if (!always && rows >= kMinExpandedRows) {
      const auto in = pad_rows<In, Bf16>(session, x, rows, w.depth, w.padded_depth);
      return run_panels(session, w, rows, kExpandedRows, kExpandedRows, out,
                        [&](Panel& panel) { multiply_expanded(w, in, panel); });
    }
  }
#endif
  const auto in = quantize_rows<int8_t>(session, x, rows, w.depth, w.padded_depth, w.group_size,
                                        run_of(w), w.has_zeros ? -1 : -kInt4Zero);
  run_panels(session, w, rows, kBlockRows, kInt4PartRows, out, [&](Panel& panel) {
    if (w.has_zeros) multiply_int4<true>(w, in, panel);
    else multiply_int4<false>(w, in, panel);
  });
}

template <class In, class Out>
void run(const Weights& w, const In* x, long rows, Output<Out> out, bool always) {
  Session session;
  switch (w.format) {
    case kFloat32: return run_plain<float>(session, w, x, rows, out, always);
    case kBFloat16:
    case kCompact: return run_plain<Bf16>(session, w, x, rows, out, always);
    case kInt8: return run_int8(session, w, x, rows, out, always);
    default: return run_int4(session, w, x, rows, out, always);
  }
}

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// out = x W^T + b, or activation(gate) * up where the weights are gated; or if `add`, out += that.
//
// x is [rows, depth] of the weights' activation type, out [rows, columns] (half of them if gated) of
// that type, or float if `float_out`. `one_path` keeps to kernels that treat every number of rows
// alike.
NANOVLLM_API void nanovllm_linear(const Weights* w, const void* x, int64_t rows, void* out,
                                  int32_t float_out, int32_t one_path, int32_t add) {
  const auto* floats = static_cast<const float*>(x);
  const auto* halves = static_cast<const Bf16*>(x);
  const Output<float> to_floats{static_cast<float*>(out), add != 0};
  if (w->activation == kFloat32) run(*w, floats, rows, to_floats, one_path);
  else if (float_out) run(*w, halves, rows, to_floats, one_path);
  else run(*w, halves, rows, Output<Bf16>{static_cast<Bf16*>(out), add != 0}, one_path);
}
NANOVLLM_REPLAYABLE(nanovllm_linear)
