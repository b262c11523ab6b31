// From logits to token ids without sorting the vocabulary.
//
// Weights e^((logit - max) / temperature) are counted into buckets by their leading bits; top-k and
// top-p then need only the bucket in which they cut put in order. The draw inverts the cumulative
// distribution in the order of the vocabulary, as torch_kernels.py does.

#include <algorithm>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace nanovllm {
namespace {

constexpr int kBucketShift = 19;  // keeps the exponent and four bits of the mantissa
constexpr long kBuckets = (0x3f800000 >> kBucketShift) + 1;  // weights are at most 1
constexpr long kBlock = 1024;     // entries whose weights are summed before one is looked for

struct Settings {
  float temperature;
  long top_k;
  float top_p, min_p, uniform;
};

// The least entry that is kept: by weight, then the earlier one.
struct Cut {
  float weight = 0;
  long index = std::numeric_limits<long>::max() - 1;
  bool keeps(float w, long i) const { return w > weight || (w == weight && i <= index); }
};

struct Best {
  float logit;
  long index;
  bool valid;
};

Best find_best(const float* logits, long size) {
  Floats best = splat(-kInfinity);
  Ints unordered{};
  for (long i = 0; i < size; i += kWidth) {
    Floats v = i + kWidth <= size ? load(logits + i) : splat(-kInfinity);
    if (i + kWidth > size) std::memcpy(&v, logits + i, (size - i) * sizeof(float));
    unordered |= v != v;
    best = vector_max(v, best);
  }
  bool ordered = true;
  for (int i = 0; i < kWidth; i++) ordered &= unordered[i] == 0;
  const float top = max(best);
  const long index = std::find(logits, logits + size, top) - logits;
  return {top, std::min(index, size - 1), ordered && std::isfinite(top)};
}

class RowSampler {
 public:
  // Turns the logits into weights, in place: nothing reads them again.
  RowSampler(float* logits, long size, const Best& best, const Settings& settings)
      : weights_(logits), size_(size), settings_(settings) {
    const float scale = kLog2E / settings.temperature;
    for (long i = 0; i < size; i += kWidth) {
      const long count = size - i;
      const Floats w = exp2((load(logits + i, count) - best.logit) * scale);
      store(logits + i, w < settings.min_p ? Floats{} : w, count);
    }
  }

  long draw() {
    if (settings_.top_k < size_ || settings_.top_p < 1) drop_below(find_cut());
    std::vector<double> sums;
    double total = 0;
    for (long first = 0; first < size_; first += kBlock) {
      Floats block{};
      for (long i = first; i < std::min(size_, first + kBlock); i += kWidth) {
        block += load(weights_ + i, size_ - i);
      }
      sums.push_back(sum(block));
      total += sums.back();
    }
    const double target = settings_.uniform * total;
    double before = 0;
    size_t block = 0;
    while (block + 1 < sums.size() && before + sums[block] <= target) before += sums[block++];
    const long first = block * kBlock;
    for (long i = first; i < std::min(size_, first + kBlock); i++) {
      before += weights_[i];
      if (before > target && weights_[i] > 0) return i;
    }
    // Rounding took the draw past the block, or up to the total: the last token before its end.
    for (long i = std::min(size_, first + kBlock) - 1; i > 0; i--) {
      if (weights_[i] > 0) return i;
    }
    return 0;
  }

 private:
  static long bucket(float weight) { return long(bit_cast<uint32_t>(weight) >> kBucketShift); }

  void drop_below(const Cut& cut) {
    for (long i = 0; i < size_; i++) weights_[i] = weights_[i] < cut.weight ? 0 : weights_[i];
    for (long i = cut.index; ++i < size_;) {
      weights_[i] = weights_[i] == cut.weight ? 0 : weights_[i];
    }
  }

  // Entries of a bucket, the best first.
  std::vector<long> sorted_bucket(long which) const {
    std::vector<long> entries;
    for (long i = 0; i < size_; i++) {
      if (weights_[i] > 0 && bucket(weights_[i]) == which) entries.push_back(i);
    }
    std::stable_sort(entries.begin(), entries.end(),
                     [&](long a, long b) { return weights_[a] > weights_[b]; });
    return entries;
  }

  Cut cut_at(long index) const { return {weights_[index], index}; }

  // Top-k first; top-p is a share of what that leaves.
  Cut find_cut() const {
    std::vector<long> counts(kBuckets, 0);
    std::vector<double> masses(kBuckets, 0.0);
    for (long i = 0; i < size_; i++) {
      if (weights_[i] == 0) continue;
      counts[bucket(weights_[i])]++;
      masses[bucket(weights_[i])] += weights_[i];
    }
    Cut cut;
    double total = 0;
    long left = settings_.top_k;
    for (long b = kBuckets - 1; b >= 0; b--) {
      if (counts[b] > left) {
        const auto entries = sorted_bucket(b);
        for (long i = 0; i < left; i++) total += weights_[entries[i]];
        if (left > 0) cut = cut_at(entries[left - 1]);
        else cut = cut_above(b);
        break;
      }
      left -= counts[b];
      total += masses[b];
    }
    if (settings_.top_p >= 1) return cut;
    const double wanted = double(settings_.top_p) * total;
    double before = 0;
    for (long b = kBuckets - 1; b >= 0; b--) {
      if (counts[b] && before + masses[b] >= wanted) {
        for (const long i : sorted_bucket(b)) {
          before += weights_[i];
          if (!cut.keeps(weights_[i], i)) return cut;
          if (before >= wanted) return cut_at(i);
        }
      } else {
        before += masses[b];
      }
    }
    return cut;
  }

  // Keeps all buckets above this one.
  static Cut cut_above(long which) {
    return {bit_cast<float>(uint32_t(which + 1) << kBucketShift)};
  }

  float* weights_;
  const long size_;
  const Settings settings_;
};

}  // namespace
}  // namespace nanovllm

using namespace nanovllm;

// One token a row of logits [rows, vocab_size], which are overwritten. Rows of temperature 0 are
// greedy. token_ids are [rows]; valid is 0 where a row has a NaN or nothing finite.
NANOVLLM_API void nanovllm_sample(float* logits, int64_t rows, int64_t vocab_size,
                                  const float* temperature, const int64_t* top_k,
                                  const float* top_p, const float* min_p, const float* uniforms,
                                  int64_t* token_ids, uint8_t* valid) {
  Session session;
  session.parallel(rows, [&](long r) {
    float* row = logits + r * vocab_size;
    const Best best = find_best(row, vocab_size);
    valid[r] = best.valid;
    token_ids[r] = best.index;
    if (!best.valid || temperature[r] <= 0) return;
    const Settings settings{temperature[r], top_k ? long(top_k[r]) : long(vocab_size),
                            top_p ? top_p[r] : 1.0f, min_p ? min_p[r] : 0.0f, uniforms[r]};
    token_ids[r] = RowSampler(row, vocab_size, best, settings).draw();
  });
}
