#include "cpu.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/simd.h"

namespace efficient_detr {
namespace {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Fetches the row of a later token into the cache, unless the rows of a head lie side by side: then
// the processor looks ahead by itself.
template <class Real>
ED_INLINE void prefetch(const Tokens<const Real>& tokens, const Real* row) {
  if (tokens.token_stride == tokens.channels) return;
  for (int64_t c = 0; c < tokens.channels; c += 64 / sizeof(Real)) __builtin_prefetch(row + c);
}

// ------------------------------------------------------------------------------------------- hash

// Tokens that are projected together: with two vectors of rounds that makes 12 sums, which is what
// the 16 registers of AVX2 can hold beside the factors.
constexpr int64_t block_tokens = 6;
constexpr int64_t task_tokens = 8 * block_tokens;

// The projections as the inner loop reads them: rounds in groups of `lanes`, the last one filled up
// with zeros, whose cells are 0 and add nothing to a key.
template <class Real>
struct PackedProjections {
  static constexpr int64_t lanes = 8;

  explicit PackedProjections(const HashProblem<Real>& problem)
      : groups(divide_up(problem.rounds, lanes)),
        directions(groups * problem.points.channels * lanes),
        bias(groups * lanes),
        low(groups * lanes),
        high(groups * lanes) {
    std::fill_n(lowest, lanes, -static_cast<Real>(cell_limit));
    std::fill_n(highest, lanes, static_cast<Real>(cell_limit));
    for (int64_t t = 0; t < problem.rounds; ++t) {
      const int64_t group = t / lanes, lane = t % lanes;
      for (int64_t d = 0; d < problem.points.channels; ++d)
        directions[(group * problem.points.channels + d) * lanes + lane] =
            problem.directions[d * problem.rounds + t] / problem.width;
      bias[t] = problem.bias[t] / problem.width;
      // multiplier = low + 2^32 high with a signed low half, for signed 32-bit products.
      low[t] = static_cast<int32_t>(problem.multipliers[t]);
      high[t] = static_cast<uint32_t>(
          (static_cast<uint64_t>(problem.multipliers[t]) - static_cast<int64_t>(low[t])) >> 32);
    }
  }

  int64_t groups;
  Real lowest[lanes], highest[lanes];  // cells, the same in all lanes
  std::vector<Real> directions;        // (groups, D, lanes)
  std::vector<Real> bias;
  std::vector<int32_t> low;
  std::vector<uint32_t> high;
};

ED_INLINE void store_cells(int32_t* to, Int8 cells) { std::memcpy(to, &cells, sizeof cells); }
ED_INLINE void store_cells(int32_t* to, Long4 cells) {
  for (int lane = 0; lane < 4; ++lane) to[lane] = static_cast<int32_t>(cells[lane]);
}

// Cells of `block_tokens` tokens in `width` vectors of rounds; the cells of a token lie `padded`
// apart from those of the next.
template <class Real, int width>
ED_INLINE void find_cells(const PackedProjections<Real>& packed, const Real* const* token,
                          int64_t channels, const Real* directions, int64_t vector_stride,
                          const Real* bias, int32_t* cells, int64_t padded) {
  using Vector = typename Simd<Real>::Vector;
  using Integer = typename Simd<Real>::Integer;
  constexpr int64_t lanes = Simd<Real>::lanes;
  Vector sum[block_tokens][width];
  for (int k = 0; k < block_tokens; ++k)
    for (int v = 0; v < width; ++v) sum[k][v] = load(bias + v * lanes);
  for (int64_t d = 0; d < channels; ++d) {
    Vector direction[width];
    for (int v = 0; v < width; ++v)
      direction[v] = load(directions + v * vector_stride + d * PackedProjections<Real>::lanes);
    for (int k = 0; k < block_tokens; ++k)
      for (int v = 0; v < width; ++v) sum[k][v] += direction[v] * token[k][d];
  }
  for (int k = 0; k < block_tokens; ++k)
    for (int v = 0; v < width; ++v) {
      // Read where they are used: kept in registers, they would displace sums.
      const Vector lowest = load(packed.lowest), highest = load(packed.highest);
      Vector position = sum[k][v];
      position = select(position > lowest, position, lowest);  // also for NaN
      position = select(position < highest, position, highest);
      store_cells(cells + k * padded + v * lanes, floor_to_integer(position, Integer{}));
    }
}

template <class Real>
ED_INLINE void find_block_cells(const PackedProjections<Real>& packed, const Real* const* token,
                                int64_t channels, int32_t* cells) {
  constexpr int64_t lanes = PackedProjections<Real>::lanes;
  const int64_t padded = packed.groups * lanes, group_size = channels * lanes;
  const Real *directions = packed.directions.data(), *bias = packed.bias.data();
  int64_t group = 0;
  if constexpr (Simd<Real>::lanes == lanes)
    for (; group + 2 <= packed.groups; group += 2)
      find_cells<Real, 2>(packed, token, channels, directions + group * group_size, group_size,
                          bias + group * lanes, cells + group * lanes, padded);
  for (; group < packed.groups; ++group)
    find_cells<Real, lanes / Simd<Real>::lanes>(
        packed, token, channels, directions + group * group_size, Simd<Real>::lanes,
        bias + group * lanes, cells + group * lanes, padded);
}

// The sum of cell * multiplier modulo 2^64. The compiler knows both products of this loop as
// instructions; it knows no 64-bit product below AVX-512.
ED_INLINE int64_t combine_cells(const int32_t* cells, const int32_t* low, const uint32_t* high,
                                int64_t rounds) {
  uint64_t low_sum = 0;
  uint32_t high_sum = 0;
  for (int64_t t = 0; t < rounds; ++t) {
    low_sum += static_cast<uint64_t>(static_cast<int64_t>(cells[t]) * low[t]);
    high_sum += static_cast<uint32_t>(cells[t]) * high[t];
  }
  return static_cast<int64_t>(low_sum + (static_cast<uint64_t>(high_sum) << 32));
}

template <class Real>
ED_INLINE void combine_all(const PackedProjections<Real>& packed, const int32_t* cells,
                           int64_t padded, int64_t tokens, int64_t* keys) {
  for (int64_t k = 0; k < tokens; ++k)
    keys[k] = combine_cells(cells + k * padded, packed.low.data(), packed.high.data(), padded);
}

// One task: up to `task_tokens` tokens of one row.
template <class Real>
ED_INLINE void hash_tokens(const HashProblem<Real>& problem, const PackedProjections<Real>& packed,
                           int32_t* cells, int64_t row, int64_t first, int64_t last) {
  const Tokens<const Real>& points = problem.points;
  const int64_t padded = packed.groups * PackedProjections<Real>::lanes;
  const Real* data = points.row(row);
  int64_t* keys = problem.keys + row * points.tokens;
  for (int64_t n = first; n < last; n += block_tokens) {
    const Real* token[block_tokens];
    for (int64_t k = 0; k < block_tokens; ++k) {
      token[k] = data + std::min(n + k, last - 1) * points.token_stride;
      prefetch(points, token[k] + 2 * block_tokens * points.token_stride);
    }
    find_block_cells(packed, token, points.channels, cells + (n - first) * padded);
  }
  // The usual number as a constant spares the loop over rounds.
  if (padded == 32)
    combine_all(packed, cells, 32, last - first, keys + first);
  else
    combine_all(packed, cells, padded, last - first, keys + first);
}

template <class Real>
ED_INLINE void run_hash_tasks(const HashProblem<Real>& problem,
                              const PackedProjections<Real>& packed, int32_t* cells,
                              int64_t first_task, int64_t last_task) {
  // All heads of some tokens in turn, because these are neighbours in a (B, N, H, D) tensor.
  const int64_t tokens = problem.points.tokens, heads = problem.points.heads;
  const int64_t chunks = divide_up(tokens, task_tokens);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t chunk = task / heads, first = chunk % chunks * task_tokens;
    hash_tokens(problem, packed, cells, chunk / chunks * heads + task % heads, first,
                std::min(first + task_tokens, tokens));
  }
}

// Templates cannot be dispatched.
ED_DISPATCHED void hash_dispatched(const HashProblem<float>& problem,
                                   const PackedProjections<float>& packed, int32_t* cells,
                                   int64_t first_task, int64_t last_task) {
  run_hash_tasks(problem, packed, cells, first_task, last_task);
}
ED_DISPATCHED void hash_dispatched(const HashProblem<double>& problem,
                                   const PackedProjections<double>& packed, int32_t* cells,
                                   int64_t first_task, int64_t last_task) {
  run_hash_tasks(problem, packed, cells, first_task, last_task);
}

// ------------------------------------------------------------------------------------------ group

// Hash table from keys to ids by open addressing, at most two thirds full. Slots remember the row
// that filled them, so that the next row finds an empty table without anyone clearing it.
class IdTable {
 public:
  explicit IdTable(int64_t tokens) {
    while ((int64_t{2} << bits_) < 3 * tokens) ++bits_;
    slots_.resize(size_t{1} << bits_);
  }

  void next_row() {
    ++row_;
    size_ = 0;
  }
  int64_t size() const { return size_; }

  // Where to look for a key. Fibonacci hashing takes the high bits of the product, which depend on
  // all bits below them; the fold lets them depend on the high half of the key too.
  ED_INLINE uint64_t start_of(uint64_t key) const {
    return ((key ^ (key >> 32)) * 0x9e3779b97f4a7c15u) >> (64 - bits_);
  }

  ED_INLINE int64_t id_of(uint64_t key) {
    uint64_t index = start_of(key);
    while (slots_[index].row == row_) {
      if (slots_[index].key == key) return slots_[index].id;
      index = (index + 1) & (slots_.size() - 1);
    }
    slots_[index] = {key, size_, row_};
    return size_++;
  }

 private:
  struct Slot {
    uint64_t key;
    uint32_t id;
    uint32_t row;
  };
  int bits_ = 1;
  uint32_t row_ = 0, size_ = 0;
  std::vector<Slot> slots_;
};

// -------------------------------------------------------------------------- reduce and broadcast

template <class Real>
ED_INLINE void add(Real* to, const Real* from, int64_t count) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(to + i) + load(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

template <class Real>
ED_INLINE void copy_scaled(Real* to, const Real* from, Real scale, int64_t count) {
  constexpr int64_t lanes = Simd<Real>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i) * scale);
  for (; i < count; ++i) to[i] = from[i] * scale;
}

// `channels` is passed apart so that the usual number can be a constant.
template <class Real>
ED_INLINE void reduce_row(const ReduceProblem<Real>& problem, int64_t row, int64_t channels) {
  const Tokens<const Real>& points = problem.points;
  const Real* data = points.row(row);
  const int64_t* ids = problem.ids + row * points.tokens;
  const int64_t clusters = problem.clusters;
  Real* prototypes = problem.prototypes + row * clusters * channels;
  std::fill_n(prototypes, clusters * channels, Real{0});
  for (int64_t n = 0; n < points.tokens; ++n) {
    prefetch(points, data + (n + 16) * points.token_stride);
    if (n + 8 < points.tokens) __builtin_prefetch(prototypes + ids[n + 8] * channels, 1);
    if (static_cast<uint64_t>(ids[n]) < static_cast<uint64_t>(clusters))
      add(prototypes + ids[n] * channels, data + n * points.token_stride, channels);
  }
  if (problem.counts == nullptr) return;
  const int64_t* counts = problem.counts + row * clusters;
  for (int64_t c = 0; c < clusters; ++c) {
    Real* prototype = prototypes + c * channels;
    if (counts[c] > 1) copy_scaled(prototype, prototype, Real{1} / counts[c], channels);
  }
}

template <class Real>
ED_INLINE void reduce_rows(const ReduceProblem<Real>& problem, int64_t first_row,
                           int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    if (problem.points.channels == 32)
      reduce_row(problem, row, 32);
    else
      reduce_row(problem, row, problem.points.channels);
  }
}

ED_DISPATCHED void reduce_dispatched(const ReduceProblem<float>& problem, int64_t first_row,
                                     int64_t last_row) {
  reduce_rows(problem, first_row, last_row);
}
ED_DISPATCHED void reduce_dispatched(const ReduceProblem<double>& problem, int64_t first_row,
                                     int64_t last_row) {
  reduce_rows(problem, first_row, last_row);
}

// Tokens of all heads of an image in turn, so that an output of layout (B, N, H, D) is written from
// front to back.
constexpr int64_t broadcast_task_tokens = 256;

template <class Real>
ED_INLINE void broadcast_tokens(const BroadcastProblem<Real>& problem, int64_t image,
                                int64_t first, int64_t last, int64_t channels) {
  const Tokens<Real>& output = problem.output;
  const int64_t heads = output.heads, clusters = problem.prototypes.tokens;
  for (int64_t n = first; n < last; ++n)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t row = image * heads + h;
      const int64_t id = problem.ids[row * output.tokens + n];
      Real* to = output.data + image * output.image_stride + h * output.head_stride +
                 n * output.token_stride;
      if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(clusters)) {
        std::fill_n(to, channels, Real{0});
        continue;
      }
      const Real* from = problem.prototypes.data + image * problem.prototypes.image_stride +
                         h * problem.prototypes.head_stride + id * problem.prototypes.token_stride;
      Real scale = 1;
      if (problem.counts != nullptr)
        scale /= std::max<int64_t>(problem.counts[row * clusters + id], 1);
      copy_scaled(to, from, scale, channels);
    }
}

template <class Real>
ED_INLINE void run_broadcast_tasks(const BroadcastProblem<Real>& problem, int64_t first_task,
                                   int64_t last_task) {
  const int64_t tokens = problem.output.tokens, channels = problem.output.channels;
  const int64_t tasks_per_image = divide_up(tokens, broadcast_task_tokens);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t image = task / tasks_per_image;
    const int64_t first = task % tasks_per_image * broadcast_task_tokens;
    const int64_t last = std::min(first + broadcast_task_tokens, tokens);
    if (channels == 32)
      broadcast_tokens(problem, image, first, last, 32);
    else
      broadcast_tokens(problem, image, first, last, channels);
  }
}

ED_DISPATCHED void broadcast_dispatched(const BroadcastProblem<float>& problem, int64_t first_task,
                                        int64_t last_task) {
  run_broadcast_tasks(problem, first_task, last_task);
}
ED_DISPATCHED void broadcast_dispatched(const BroadcastProblem<double>& problem, int64_t first_task,
                                        int64_t last_task) {
  run_broadcast_tasks(problem, first_task, last_task);
}

}  // namespace

template <class Real>
int64_t hash_tasks(const HashProblem<Real>& problem) {
  return problem.points.rows() * divide_up(problem.points.tokens, task_tokens);
}

template <class Real>
void hash_keys(const HashProblem<Real>& problem, int64_t first_task, int64_t last_task) {
  const PackedProjections<Real> packed(problem);
  std::vector<int32_t> cells(task_tokens * packed.groups * PackedProjections<Real>::lanes);
  hash_dispatched(problem, packed, cells.data(), first_task, last_task);
}

void group_by_key(const GroupProblem& problem, int64_t* members, int64_t first_row,
                  int64_t last_row) {
  IdTable table(problem.tokens);
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t* keys = problem.keys + row * problem.tokens;
    int64_t* ids = problem.ids + row * problem.tokens;
    int64_t* count = members + row * problem.tokens;
    std::fill_n(count, problem.tokens, 0);
    const bool* padding =
        problem.padding ? problem.padding + row / problem.heads * problem.tokens : nullptr;
    table.next_row();
    for (int64_t n = 0; n < problem.tokens; ++n) {
      ids[n] = padding && padding[n] ? -1 : table.id_of(keys[n]);
      if (ids[n] >= 0) ++count[ids[n]];
    }
    problem.num_clusters[row] = table.size();
    if (problem.capacity == 0 || table.size() <= problem.capacity) continue;
    for (int64_t n = 0; n < problem.tokens; ++n)
      if (ids[n] >= problem.capacity) ids[n] %= problem.capacity;
    for (int64_t id = problem.capacity; id < table.size(); ++id)
      count[id % problem.capacity] += count[id];
  }
}

template <class Real>
void cluster_reduce(const ReduceProblem<Real>& problem, int64_t first_row, int64_t last_row) {
  reduce_dispatched(problem, first_row, last_row);
}

template <class Real>
int64_t broadcast_tasks(const BroadcastProblem<Real>& problem) {
  return problem.output.images * divide_up(problem.output.tokens, broadcast_task_tokens);
}

template <class Real>
void cluster_broadcast(const BroadcastProblem<Real>& problem, int64_t first_task,
                       int64_t last_task) {
  broadcast_dispatched(problem, first_task, last_task);
}

#define ED_INSTANTIATE(Real)                                                     \
  template int64_t hash_tasks(const HashProblem<Real>&);                         \
  template void hash_keys(const HashProblem<Real>&, int64_t, int64_t);           \
  template void cluster_reduce(const ReduceProblem<Real>&, int64_t, int64_t);    \
  template int64_t broadcast_tasks(const BroadcastProblem<Real>&);               \
  template void cluster_broadcast(const BroadcastProblem<Real>&, int64_t, int64_t);
ED_INSTANTIATE(float)
ED_INSTANTIATE(double)

}  // namespace efficient_detr
